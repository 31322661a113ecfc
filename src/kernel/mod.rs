//! The 3D operators that networks are made of, on whatever device the tensors live.
//!
//! On the CPU (burn's Flex backend) they are kernels of ours with handwritten gradients; on other devices they are
//! compositions of burn's operators, which are also what the tests hold the kernels against. Every operator works in the type of
//! its input, see [`ComputeDtype`].

mod autodiff;
mod composed;
mod convolution;
mod dtype;
mod extension;
mod general;
mod isa;
mod layout;
mod loss;
mod norm;
mod parity;
mod pool;
mod reduce;
mod strided;
mod transposed;
mod upsampling;
mod weight_gradient;
mod wide;
mod winograd;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use crate::volume::ClassSet;
use extension::Operators;

pub use composed::{log_sum_exp, total};
pub use dtype::ComputeDtype;
pub(crate) use dtype::follow;
pub use general::{average_pool3d, conv_transpose3d_blocks, conv_transpose3d_k3, conv3d_per_axis};
pub use loss::{DiceOver, LossForm};
pub use upsampling::Upsampling;

/// Returns the class of CPU results that are equal bit for bit: it follows from the vector instructions in use.
pub fn numerics() -> &'static str {
    isa::Isa::chosen().numerics()
}

/// Returns whether our kernels can work on a tensor.
fn is_ours<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && dtype::is_cpu(&x.device())
}

/// Added to the variance by [`instance_norm_leaky_relu`].
const NORM_EPSILON: f64 = 1e-5;

/// Convolves with a cubic kernel and zero padding of half its side.
///
/// # Shape
/// x `[B, Ci, D, H, W]`, weight `[Co, Ci, k, k, k]` (k odd), bias `[Co]` -> `[B, Co, D', H', W']`, D' = D / stride
/// rounded up.
pub fn conv3d(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>, stride: usize) -> Tensor<5> {
    let k = weight.dims()[2];
    if !(1..=2).contains(&stride) || (k != 1 && k != 3) || !is_ours(&x) {
        return composed::conv3d(x, weight, bias, stride);
    }
    let [x, weight, bias] = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(match stride {
        1 => Dispatch::same_conv3d(x, weight, bias),
        _ => Dispatch::halving_conv3d(x, weight, bias),
    })
}

/// Convolves as [`conv3d`] does with stride 1, the channels of `second` following those of `first`: what a step up of a
/// U-Net does with its skip connection, without joining the two in memory.
///
/// # Shape
/// first `[B, C1, D, H, W]`, second `[B, C2, D, H, W]`, weight `[Co, C1 + C2, k, k, k]` (k odd), bias `[Co]`
/// -> `[B, Co, D, H, W]`.
pub fn conv3d_of_pair(first: Tensor<5>, second: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>) -> Tensor<5> {
    let k = weight.dims()[2];
    if (k != 1 && k != 3) || !is_ours(&first) {
        return composed::conv3d(Tensor::cat(vec![first, second], 1), weight, bias, 1);
    }
    let [first, second, weight] = [first, second, weight].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::paired_conv3d(first, second, weight, bias.into_dispatch()))
}

/// Doubles the resolution with a transposed convolution of kernel and stride 2.
///
/// # Shape
/// x `[B, Ci, D, H, W]`, weight `[Ci, Co, 2, 2, 2]`, bias `[Co]` -> `[B, Co, 2D, 2H, 2W]`.
pub fn conv_transpose3d_k2s2(x: Tensor<5>, weight: Tensor<5>, bias: Tensor<1>) -> Tensor<5> {
    if !is_ours(&x) {
        return composed::conv_transpose3d_blocks(x, weight, bias);
    }
    let [x, weight, bias] = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(Dispatch::doubling_conv3d(x, weight, bias))
}

/// Normalises every channel of every sample over its voxels, scales, shifts, and applies a leaky ReLU.
///
/// # Shape
/// x `[B, C, D, H, W]`; gamma and beta `[B, C]` (one row per sample, so that FiLM is the same operator).
///
/// # Source
/// Ulyanov et al., arXiv 1607.08022; biased variance, eps 1e-5, as in PyTorch's `InstanceNorm3d`.
pub fn instance_norm_leaky_relu(x: Tensor<5>, gamma: Tensor<2>, beta: Tensor<2>, slope: f64) -> Tensor<5> {
    if !is_ours(&x) {
        return composed::instance_norm_leaky_relu(x, gamma, beta, slope);
    }
    let [x, gamma, beta] = [x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch()];
    Tensor::from_dispatch(Dispatch::norm_leaky_relu(x, gamma, beta, slope as f32))
}

/// Halves the resolution by the maximum over blocks of 2x2x2.
///
/// # Shape
/// `[B, C, D, H, W]` (even sizes) -> `[B, C, D/2, H/2, W/2]`.
pub fn max_pool3d_k2(x: Tensor<5>) -> Tensor<5> {
    let [_, _, d, h, w] = x.dims();
    assert!(
        [d, h, w].iter().all(|size| size % 2 == 0),
        "pooling expected even sizes, got {:?}",
        [d, h, w]
    );
    if !is_ours(&x) {
        return composed::max_pool3d_k2(x);
    }
    Tensor::from_dispatch(Dispatch::halving_max(x.into_dispatch()))
}

/// Doubles the resolution by interpolation.
///
/// # Shape
/// `[B, C, D, H, W]` -> `[B, C, 2D, 2H, 2W]`.
pub fn upsample3d_x2(x: Tensor<5>, how: Upsampling) -> Tensor<5> {
    if !is_ours(&x) {
        return composed::upsample3d_x2(x, how);
    }
    Tensor::from_dispatch(Dispatch::doubling_interpolation(x.into_dispatch(), how))
}

/// Returns marginal cross-entropy plus marginal Dice loss as [`crate::nn::marginal_loss`] defines them.
///
/// # Shape
/// logits `[B, C, D, H, W]`, sets the admissible classes of every voxel, `[B, D, H, W]` flattened.
///
/// # Panics
/// When there are not as many sets as voxels.
pub fn marginal_loss(logits: Tensor<5>, sets: Arc<[ClassSet]>, form: LossForm) -> Tensor<1> {
    let [b, _, d, h, w] = logits.dims();
    assert_eq!(sets.len(), b * d * h * w, "one set per voxel");
    if !is_ours(&logits) {
        return composed::marginal_loss(logits, &sets, &form);
    }
    Tensor::from_dispatch(Dispatch::marginal_loss(logits.into_dispatch(), sets, form))
}

#[cfg(test)]
mod tests;
