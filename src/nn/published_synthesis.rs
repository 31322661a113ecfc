//! The published synthesis equation and losses, on tensors, with gradients where those have some.
//!
//! # Source
//! FreeTumor's released code for the abdomen (method, sections 3.2 and 3.3) with its errors corrected: every organ has the
//! generator's channel of its own (section 7, item 7), and the discriminator is told of organs alike (item 6).

use burn::tensor::{Tensor, TensorData, activation};

use super::{REAL, SYNTHETIC};
use crate::kernel;

/// Voxels over which the generator's output is smoothed.
const TAPS: usize = 7;
/// Standard deviation of that filter in voxels.
const SIGMA: f64 = 1.0;
/// Keeps the mean over an empty mask finite.
const EPSILON: f64 = 1e-6;

/// Returns d = k * sum over organs c of g_c O_c, O_c being 1 in the healthy tissue of organ c and k a normalised Gaussian of
/// 7 x 7 x 7 voxels with zeros beyond the border.
///
/// # Shape
/// generated (after its activation) and healthy (1 in each organ's healthy tissue) `[B, organs, D, H, W]` -> `[B, 1, D, H, W]`.
pub fn published_residual(generated: Tensor<5>, healthy: Tensor<5>) -> Tensor<5> {
    let device = generated.device();
    let middle = (TAPS / 2) as f64;
    let weights: Vec<f64> = (0..TAPS)
        .map(|i| libm::exp(-(i as f64 - middle).powi(2) / (2.0 * SIGMA * SIGMA)))
        .collect();
    let total: f64 = weights.iter().sum::<f64>().powi(3);
    let mut kernel = Vec::with_capacity(TAPS.pow(3));
    for z in &weights {
        for y in &weights {
            kernel.extend(weights.iter().map(|x| (z * y * x / total) as f32));
        }
    }
    let kernel = Tensor::from_data(TensorData::new(kernel, [1, 1, TAPS, TAPS, TAPS]), &device);
    kernel::conv3d((generated * healthy).sum_dim(1), kernel, Tensor::zeros([1], &device), 1)
}

/// What the equation takes beside the residual.
pub struct PublishedScene {
    /// The mask M with a soft edge, in [0, 1].
    pub soft: Tensor<5>,
    /// The texture t, a factor around 0.53.
    pub texture: Tensor<5>,
    /// 1 in the organ's healthy tissue, which alone is changed.
    pub host: Tensor<5>,
}

impl PublishedScene {
    /// Returns -O M d t, which is added to the windowed image.
    ///
    /// # Shape
    /// All `[B, 1, D, H, W]`.
    pub fn change(&self, residual: Tensor<5>) -> Tensor<5> {
        (self.soft.clone() * residual * self.texture.clone() * self.host.clone()).neg()
    }
}

/// Returns the mean over a mask, all of the batch together: sum(v A) / (sum(A) + 1e-6).
fn mean_over(values: Tensor<5>, mask: Tensor<5>) -> Tensor<1> {
    kernel::total(values * mask.clone()) / (kernel::total(mask) + EPSILON)
}

/// Returns L_seg = 1 - the mean, over the painted lesions, of the critic's probability of any tumour.
///
/// # Shape
/// critic's logits `[B, classes, D, H, W]`, lesion (1 inside) `[B, 1, D, H, W]` -> `[1]`.
pub fn published_missing(critic: Tensor<5>, tumours: &[usize], lesion: Tensor<5>) -> Tensor<1> {
    let chances = activation::softmax(critic, 1);
    let of = |class: &usize| chances.clone().narrow(1, *class, 1);
    mean_over(Tensor::cat(tumours.iter().map(of).collect(), 1).sum_dim(1), lesion).neg() + 1.0
}

/// Returns L_adv = 1 - the mean, over the painted lesions, of the discriminator's probability of "real tumour".
///
/// # Shape
/// discriminator's logits `[B, 3, D, H, W]`, lesion (1 inside) `[B, 1, D, H, W]` -> `[1]`.
pub fn published_adversarial(discriminator: Tensor<5>, lesion: Tensor<5>) -> Tensor<1> {
    let chances = activation::softmax(discriminator, 1);
    mean_over(chances.narrow(1, REAL, 1), lesion).neg() + 1.0
}

/// Returns L_D = ((1 - mean over painted lesions of "synthetic") + (1 - mean over real ones of "real")) / 2.
///
/// # Shape
/// discriminator's logits `[B, 3, D, H, W]`, lesion and real (1 inside) `[B, 1, D, H, W]` -> `[1]`.
pub fn published_discrimination(discriminator: Tensor<5>, lesion: Tensor<5>, real: Tensor<5>) -> Tensor<1> {
    let chances = activation::softmax(discriminator, 1);
    let wrong = |class: usize, mask: Tensor<5>| mean_over(chances.clone().narrow(1, class, 1), mask).neg() + 1.0;
    (wrong(SYNTHETIC, lesion) + wrong(REAL, real)) * 0.5
}
