//! Random textures: a smooth Gaussian field for the analytic synthesizer.

use ndarray::Array3;

use crate::rng::Rng;
use crate::volume::Shape as Size;

/// What a texture must be.
#[derive(Clone, Copy, Debug)]
pub struct TextureRequest {
    /// Voxels along (z, y, x).
    pub size: Size,
    /// Voxel size along (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
    /// Distance in mm over which the autocorrelation falls to exp(-1/2).
    pub correlation_mm: f64,
}

/// Draws a smooth Gaussian random field with zero mean and unit variance over its box.
///
/// White noise blurred with standard deviation s has autocorrelation exp(-r^2 / (4 s^2)), so s is the correlation length
/// over the square root of 2.
pub fn gaussian_field(request: &TextureRequest, rng: &mut Rng) -> Array3<f32> {
    let mut values = rng.normals(request.size.iter().product());
    for axis in 0..3 {
        let sigma = request.correlation_mm / std::f64::consts::SQRT_2 / request.spacing_mm[axis];
        if sigma > 0.2 {
            blur_axis(&mut values, request.size, axis, &gaussian_kernel(sigma, 3.0));
        }
    }
    let n = values.len().max(1) as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let gain = 1.0 / libm::sqrt(variance.max(1e-12));
    values
        .iter_mut()
        .for_each(|v| *v = ((f64::from(*v) - mean) * gain) as f32);
    Array3::from_shape_vec(request.size, values).expect("one value per voxel")
}

/// Returns a normalised Gaussian kernel cut at `cut` standard deviations.
pub(super) fn gaussian_kernel(sigma: f64, cut: f64) -> Vec<f32> {
    let radius = (cut * sigma + 0.5) as i64;
    let weight = |i: i64| libm::exp(-0.5 * (i as f64 / sigma) * (i as f64 / sigma));
    let total: f64 = (-radius..=radius).map(weight).sum();
    (-radius..=radius).map(|i| (weight(i) / total) as f32).collect()
}

/// Filters along one axis; beyond the border the values are mirrored, the border value counted twice.
pub(super) fn blur_axis(values: &mut [f32], size: Size, axis: usize, kernel: &[f32]) {
    let n = size[axis];
    let inner: usize = size[axis + 1..].iter().product();
    let radius = kernel.len() / 2;
    let mut source = vec![0.0; n * inner];
    for block in values.chunks_exact_mut((n * inner).max(1)) {
        source.copy_from_slice(block);
        for (i, line) in block.chunks_exact_mut(inner).enumerate() {
            line.fill(0.0);
            for (k, weight) in kernel.iter().enumerate() {
                let from = mirrored(i as i64 + k as i64 - radius as i64, n) * inner;
                let add = |(value, other): (&mut f32, &f32)| *value += weight * other;
                line.iter_mut().zip(&source[from..from + inner]).for_each(add);
            }
        }
    }
}

/// Returns the index that stands for `i` when a line is continued by its mirror image.
pub(super) fn mirrored(i: i64, n: usize) -> usize {
    let n = n as i64;
    let folded = i.rem_euclid(2 * n);
    (if folded < n { folded } else { 2 * n - 1 - folded }) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    #[test]
    fn fields_have_the_requested_correlation_on_anisotropic_grids() {
        let request = TextureRequest {
            size: [40, 64, 64],
            spacing_mm: [3.0, 1.5, 1.5],
            correlation_mm: 6.0,
        };
        let field = gaussian_field(&request, &mut Rng::keyed(1, 0, 0, Purpose::Test));
        let n = field.len() as f64;
        let mean = field.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = field.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 1e-4 && (variance - 1.0).abs() < 1e-3, "{mean} {variance}");
        for (axis, lag) in [(0, 2), (1, 4), (2, 4)] {
            let ahead = field.slice_axis(ndarray::Axis(axis), (lag..).into());
            let behind = field.slice_axis(ndarray::Axis(axis), (..-(lag as isize)).into());
            let product = ahead.iter().zip(&behind).map(|(a, b)| f64::from(a * b)).sum::<f64>() / ahead.len() as f64;
            // exp(-1/2) = 0.61 at one correlation length; the box holds some hundred independent blobs.
            assert!((product - 0.61).abs() < 0.08, "axis {axis}: {product}");
        }
    }
}
