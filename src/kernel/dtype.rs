//! What the networks' arithmetic is done in.

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use serde::Serialize;

/// What convolutions and activations are computed in. Whatever is chosen, weights, their gradients, the optimiser's state,
/// the statistics of norms, logits and losses are single precision.
///
/// # Source
/// Micikevicius et al., Mixed precision training, arXiv 1710.03740. Departure: bfloat16 has the range of single precision,
/// so that losses need no scaling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// Single precision. On NVIDIA's tensor cores products are rounded to TF32 (10 bits of mantissa) and summed in single
    /// precision; burn gives no way to tell it not to.
    #[default]
    F32,
    /// Bfloat16 (7 bits of mantissa), summed in single precision.
    Bf16,
}

impl ComputeDtype {
    /// Returns the fastest precision in which a device computes: bfloat16 on GPUs that have it, single on the CPU.
    pub fn best(device: &Device) -> Self {
        if is_cpu(device) || !device.supports_dtype(FloatDType::BF16) {
            Self::F32
        } else {
            Self::Bf16
        }
    }

    /// Converts what enters a network. The operators follow their input: they convert weights to its type.
    pub fn enter(self, x: Tensor<5>) -> Tensor<5> {
        match self {
            Self::F32 => x,
            Self::Bf16 => x.cast(FloatDType::BF16),
        }
    }

    /// Converts what leaves a network to single precision.
    pub fn leave(self, x: Tensor<5>) -> Tensor<5> {
        match self {
            Self::F32 => x,
            Self::Bf16 => x.cast(FloatDType::F32),
        }
    }

    /// Returns the class of results that are equal bit for bit on one kind of device, such as `cpu-avx512` or `cuda-bf16`.
    pub fn numerics(self, device: &Device) -> String {
        match (is_cpu(device), self) {
            (true, Self::F32) => super::numerics().into(),
            (true, Self::Bf16) => "cpu-bf16".into(),
            (false, Self::F32) => "cuda-tf32".into(),
            (false, Self::Bf16) => "cuda-bf16".into(),
        }
    }
}

/// Returns whether a device is burn's CPU backend.
pub(super) fn is_cpu(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::Flex(_))
}

/// Converts a parameter to the type of what it works on.
pub(crate) fn follow<const D: usize>(parameter: Tensor<D>, x: &Tensor<5>) -> Tensor<D> {
    match (parameter.dtype(), x.dtype()) {
        (DType::F32, DType::BF16) => parameter.cast(FloatDType::BF16),
        (DType::F32, DType::F64) => parameter.cast(FloatDType::F64),
        _ => parameter,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::nn::UnetConfig;
    use crate::rng::{Purpose, Rng};

    /// Returns a network's output and the gradient of its input; bfloat16 comes from burn's own operators.
    fn run(dtype: ComputeDtype) -> (Vec<f32>, Vec<f32>) {
        let config = UnetConfig {
            in_channels: 1,
            out_channels: 2,
            widths: vec![4, 8],
            condition: 0,
        };
        let device = Device::flex().autodiff();
        let net = config.init(&device, 3).with_compute_dtype(dtype);
        let values = Rng::keyed(1, 0, 0, Purpose::Test).normals(8 * 8 * 8);
        let x = Tensor::<5>::from_data(TensorData::new(values, [1, 1, 8, 8, 8]), &device).require_grad();
        let y = net.forward(x.clone(), None);
        assert_eq!(y.dtype(), DType::F32, "logits leave in single precision");
        let gradients = y.clone().powi_scalar(2).mean().backward();
        let slope = x.grad(&gradients).expect("the input has a gradient");
        assert_eq!(slope.dtype(), DType::F32, "gradients arrive in single precision");
        let list = |data: TensorData| data.try_to_vec().expect("single precision");
        (list(y.into_data()), list(slope.into_data()))
    }

    /// Returns by how much two lists differ, in relation to the second's root mean square.
    fn difference(a: &[f32], b: &[f32]) -> f64 {
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let of_both = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
        (of_both / square(&mut b.iter().map(|b| f64::from(*b)))).sqrt()
    }

    #[test]
    fn bfloat16_stays_near_single_precision() {
        let (half, single) = (run(ComputeDtype::Bf16), run(ComputeDtype::F32));
        // PyTorch 2.15's autocast on such a network, five seeds: 0.007 to 0.012 of the output's root mean square, 0.13 to
        // 0.22 of the input gradient's, which passes every norm backwards.
        for (half, single, bound) in [(half.0, single.0, 0.015), (half.1, single.1, 0.22)] {
            let difference = difference(&half, &single);
            assert!(difference > 1e-4, "nothing was rounded: {difference:e}");
            assert!(difference < bound, "off by {difference:e} of the root mean square");
        }
    }

    #[test]
    fn the_cpu_is_best_in_single_precision_and_says_so() {
        let device = Device::flex();
        assert_eq!(ComputeDtype::best(&device), ComputeDtype::F32);
        assert!(ComputeDtype::F32.numerics(&device).starts_with("cpu-"));
        assert_ne!(
            ComputeDtype::F32.numerics(&device),
            ComputeDtype::Bf16.numerics(&device)
        );
    }
}
