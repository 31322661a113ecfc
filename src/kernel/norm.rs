//! Instance norm, affine map and leaky ReLU in one pass, and its gradients.
//!
//! Legend, per sample and channel over its N voxels: m mean, r = 1 / sqrt(variance + eps), g the affine scale, b its
//! shift, y = (x - m) r g + b, out = y where y > 0, else slope y. All sums are `f64` in an order that N alone fixes.

use rayon::prelude::*;

use super::isa::Isa;
use super::layout::{Shared, from_zeros};
use super::reduce;

/// Compiles a function for every instruction set; none of them changes its result, because nothing is fused.
macro_rules! for_every_isa {
    ($(#[$doc:meta])* $visible:vis fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        $visible fn $name(isa: Isa, $($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512($($arg: $type),*) $(-> $out)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $type),*) $(-> $out)? { body($($arg),*) }
            match isa {
                // SAFETY: the instruction set was detected when `isa` was chosen.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(super) use for_every_isa;

/// What the norm of one channel of one sample needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// m.
    mean: f32,
    /// r.
    inverse_deviation: f32,
    /// r g.
    scale: f32,
    /// b.
    shift: f32,
    /// Slope below zero.
    slope: f32,
}

impl Affine {
    /// Returns y.
    #[inline(always)]
    fn apply(&self, x: f32) -> f32 {
        (x - self.mean) * self.scale + self.shift
    }

    /// Returns the gradient with respect to y.
    #[inline(always)]
    fn through_activation(&self, x: f32, gradient: f32) -> f32 {
        if self.apply(x) > 0.0 {
            gradient
        } else {
            gradient * self.slope
        }
    }
}

/// The per-channel inputs: each of `statistics` (m and r interleaved), `gamma` and `beta` has a row per sample.
#[derive(Clone, Copy)]
pub struct Parameters<'a> {
    /// `[B, C, 2]`.
    pub statistics: &'a [f32],
    /// `[B, C]`.
    pub gamma: &'a [f32],
    /// `[B, C]`.
    pub beta: &'a [f32],
    /// Slope below zero.
    pub slope: f32,
}

impl Parameters<'_> {
    /// Returns those of one channel of one sample.
    fn at(&self, row: usize) -> Affine {
        let [mean, inverse_deviation] = [self.statistics[2 * row], self.statistics[2 * row + 1]];
        Affine {
            mean,
            inverse_deviation,
            scale: inverse_deviation * self.gamma[row],
            shift: self.beta[row],
            slope: self.slope,
        }
    }
}

for_every_isa! {
    /// Returns the mean and the biased variance.
    fn moments(x: &[f32]) -> [f64; 2] {
        let n = x.len() as f64;
        let mean = reduce::sum_of([x], #[inline(always)] |[v]| v) / n;
        let variance = reduce::sum_of([x], #[inline(always)] |[v]| (v - mean) * (v - mean)) / n;
        [mean, variance]
    }
}

for_every_isa! {
    /// Writes the activations.
    fn apply(x: &[f32], affine: Affine, out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            let y = affine.apply(x);
            *out = if y > 0.0 { y } else { y * affine.slope };
        }
    }
}

for_every_isa! {
    /// Replaces inputs by activations.
    fn apply_in_place(x: &mut [f32], affine: Affine) {
        for x in x {
            let y = affine.apply(*x);
            *x = if y > 0.0 { y } else { y * affine.slope };
        }
    }
}

for_every_isa! {
    /// Replaces a gradient with respect to the output by that with respect to y; `out` may start as anything.
    fn through_activation(x: &[f32], gradient: &[f32], affine: Affine, out: &mut [f32]) {
        for ((out, &x), &gradient) in out.iter_mut().zip(x).zip(gradient) {
            *out = affine.through_activation(x, gradient);
        }
    }
}

for_every_isa! {
    /// Returns the sums of dy and of dy (x - m).
    fn gradient_sums(x: &[f32], dy: &[f32], mean: f64) -> [f64; 2] {
        let plain = reduce::sum_of([dy], #[inline(always)] |[d]| d);
        [plain, reduce::sum_of([x, dy], #[inline(always)] |[x, d]| d * (x - mean))]
    }
}

for_every_isa! {
    /// Turns dy into dx = scale (dy - offset - (x - m) tilt).
    fn finish(x: &[f32], affine: Affine, offset_tilt: [f32; 2], dy: &mut [f32]) {
        let [offset, tilt] = offset_tilt;
        for (d, &x) in dy.iter_mut().zip(x) {
            *d = affine.scale * (*d - offset - (x - affine.mean) * tilt);
        }
    }
}

/// Computes m and r of every channel of every sample, `[B, C, 2]`.
pub fn statistics(isa: Isa, x: &[f32], voxels: usize) -> Vec<f32> {
    let of_channel = |x: &[f32]| {
        let [mean, variance] = moments(isa, x);
        [mean as f32, (1.0 / (variance + super::NORM_EPSILON).sqrt()) as f32]
    };
    let rows: Vec<[f32; 2]> = x.par_chunks_exact(voxels).map(of_channel).collect();
    rows.into_flattened()
}

/// Computes the output, shaped like x.
pub fn forward(isa: Isa, x: &[f32], parameters: Parameters, voxels: usize) -> Vec<f32> {
    from_zeros(x.len(), voxels, |row, out| {
        apply(isa, &x[row * voxels..][..voxels], parameters.at(row), out);
    })
}

/// Computes the output in the place of x.
pub fn replace(isa: Isa, x: &mut [f32], parameters: Parameters, voxels: usize) {
    let channels = x.par_chunks_exact_mut(voxels).enumerate();
    channels.for_each(|(row, x)| apply_in_place(isa, x, parameters.at(row)));
}

/// Computes the gradients with respect to x (shaped like x), gamma and beta (`[B, C]`).
///
/// # Source
/// Ioffe and Szegedy, arXiv 1502.03167, section 3, with an instance in place of the batch.
pub fn gradients(isa: Isa, x: &[f32], gradient: &[f32], parameters: Parameters, voxels: usize) -> [Vec<f32>; 3] {
    // Gradients of (gamma, beta), a pair per channel of a sample.
    let mut of_affine = vec![0.0; x.len() / voxels * 2];
    let pairs = Shared::new(&mut of_affine);
    let dx = from_zeros(x.len(), voxels, |row, dx| {
        let (x, gradient) = (&x[row * voxels..][..voxels], &gradient[row * voxels..][..voxels]);
        let affine = parameters.at(row);
        through_activation(isa, x, gradient, affine, dx);
        let [plain, centred] = gradient_sums(isa, x, dx, f64::from(affine.mean));
        let r = f64::from(affine.inverse_deviation);
        let n = voxels as f64;
        finish(isa, x, affine, [plain / n, centred * r * r / n].map(|v| v as f32), dx);
        // SAFETY: every row has its own pair.
        let pair = unsafe { pairs.slice(2 * row, 2) };
        pair.copy_from_slice(&[(centred * r) as f32, plain as f32]);
    });
    let [gamma, beta] = [0, 1].map(|i| of_affine.iter().skip(i).step_by(2).copied().collect());
    [dx, gamma, beta]
}
