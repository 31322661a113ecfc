//! Means over patients with bootstrap intervals: seeded, so that the same scores give the same interval.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::rng::{Purpose, Rng};

/// How intervals are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bootstrap {
    /// How often the patients are drawn anew; 0: no intervals.
    pub resamples: u32,
    /// The seed of the draws.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self {
            resamples: 2000,
            seed: 0,
        }
    }
}

/// The shares of the resamples' values below the interval's ends: a 95 % interval.
const ENDS: [f64; 2] = [0.025, 0.975];

/// A mean over patients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Mean over patients of their cases' means; nothing where no case has a value.
    pub mean: Option<f64>,
    /// Sample standard deviation over patients; nothing for fewer than two.
    pub sd: Option<f64>,
    /// 95 % percentile bootstrap interval of the mean over patients; nothing for fewer than two.
    pub interval: Option<[f64; 2]>,
    /// Patients with a value.
    pub patients: usize,
    /// Cases with a value.
    pub cases: usize,
}

impl Summary {
    /// Summarises cases' values, each with its patient.
    pub fn of<'a>(values: impl IntoIterator<Item = (&'a str, f64)>, bootstrap: &Bootstrap) -> Self {
        let mut by_patient: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let mut cases = 0;
        for (patient, value) in values {
            by_patient.entry(patient).or_default().push(value);
            cases += 1;
        }
        let of_patients: Vec<f64> = by_patient.values().filter_map(|values| mean(values)).collect();
        Self {
            mean: mean(&of_patients),
            sd: deviation(&of_patients),
            interval: bootstrap.interval(&of_patients, |drawn| {
                mean(&drawn.into_iter().copied().collect::<Vec<_>>())
            }),
            patients: of_patients.len(),
            cases,
        }
    }
}

impl Bootstrap {
    /// Returns the interval of a statistic over patients, who are drawn with replacement; draws without a value are left out.
    ///
    /// # Source
    /// The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13), ends interpolated as
    /// numpy's `quantile` does.
    pub fn interval<T>(&self, patients: &[T], statistic: impl Fn(Vec<&T>) -> Option<f64>) -> Option<[f64; 2]> {
        if patients.len() < 2 {
            return None;
        }
        let draw = |resample: u32| {
            let mut rng = Rng::keyed(self.seed, resample.into(), 0, Purpose::Bootstrap);
            let drawn = (0..patients.len()).map(|_| &patients[rng.below(patients.len())]);
            statistic(drawn.collect())
        };
        let mut values: Vec<f64> = (0..self.resamples).filter_map(draw).collect();
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then(|| ENDS.map(|share| quantile(&values, share)))
    }
}

/// Returns a quantile of sorted values, interpolated between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let below = at as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (at - below as f64) * (sorted[above] - sorted[below])
}

/// Returns the mean; nothing without values.
pub(super) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Returns the sample standard deviation; nothing for fewer than two values.
fn deviation(values: &[f64]) -> Option<f64> {
    let centre = mean(values)?;
    let squares: f64 = values.iter().map(|value| (value - centre) * (value - centre)).sum();
    (values.len() > 1).then(|| libm::sqrt(squares / (values.len() - 1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patients_count_once_whatever_their_scans() {
        let values = [("a", 1.0), ("a", 0.5), ("b", 0.25), ("c", 0.5)];
        let summary = Summary::of(values, &Bootstrap::default());
        assert_eq!((summary.patients, summary.cases), (3, 4));
        assert_eq!(summary.mean, Some(0.5));
        assert_eq!(summary.sd, Some(0.25));
        assert_eq!(summary, Summary::of(values, &Bootstrap::default()));
        let interval = summary.interval.unwrap();
        // Three patients: the resample of one patient alone has a chance of 1/27 on either side, more than 2.5 %.
        assert_eq!(interval, [0.25, 0.75]);
        let one = Summary::of([("a", 0.5)], &Bootstrap::default());
        assert_eq!((one.mean, one.sd, one.interval), (Some(0.5), None, None));
        assert_eq!(Summary::of([], &Bootstrap::default()), Summary::default());
    }

    #[test]
    fn an_interval_is_two_standard_errors_wide_for_many_patients() {
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        let values: Vec<f64> = rng.normals(400).into_iter().map(f64::from).collect();
        let (centre, deviation) = (mean(&values).unwrap(), deviation(&values).unwrap());
        let found =
            Bootstrap::default().interval(&values, |drawn| mean(&drawn.into_iter().copied().collect::<Vec<_>>()));
        let half = 1.96 * deviation / 20.0;
        // The ends of 2000 resamples scatter by about 5 % of the half width.
        for (end, expected) in found.unwrap().into_iter().zip([centre - half, centre + half]) {
            assert!((end - expected).abs() < 0.15 * half, "{end} {expected}");
        }
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // numpy.quantile([1, 2, 4, 8], [0.025, 0.5, 0.975])
        let values = [1.0, 2.0, 4.0, 8.0];
        for (share, expected) in [(0.025, 1.075), (0.5, 3.0), (0.975, 7.7)] {
            assert!((quantile(&values, share) - expected).abs() < 1e-12);
        }
    }
}
