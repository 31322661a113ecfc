//! The numbers of a step: finite, averaged, by name.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use super::{LearnError, Metrics};

/// Refuses a number that is not finite.
pub(super) fn check_finite(step: u64, metric: &str, value: f64) -> Result<(), LearnError> {
    if value.is_finite() {
        return Ok(());
    }
    let metric = metric.into();
    Err(LearnError::NotFinite { step, metric, value })
}

/// Returns the one number of a tensor.
pub(super) fn scalar(tensor: Tensor<1>) -> f64 {
    f64::from(tensor.into_scalar::<f32>())
}

/// Averages numbers; 0 where there are none.
pub(super) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    if count > 0.0 { sum / count } else { 0.0 }
}

/// Collects named numbers.
pub(super) fn metrics<const N: usize>(entries: [(&str, f64); N]) -> Metrics {
    BTreeMap::from(entries.map(|(name, value)| (name.to_string(), value)))
}
