//! The synthesizer without weights: a requested contrast and a smooth random texture.

use ndarray::{Array3, Zip};

use super::{LesionCube, SynthError, Synthesizer};
use crate::lesion::{TextureRequest, gaussian_field};
use crate::rng::{Purpose, Rng};

/// Standard deviation of the texture, in HU: between its least and its most. A lesion no wider than the correlation
/// shows less of it; stretching it to the full spread there would make it finer and noisier than the tissue around.
const SPREAD_HU: [f64; 2] = [6.0, 10.0];
/// Distance over which the texture's autocorrelation falls to exp(-1/2), in mm.
const CORRELATION_MM: f64 = 4.0;

/// Paints residual = mask x (contrast + spread x texture), the texture's mean over the mask being zero.
#[derive(Clone, Copy, Debug, Default)]
pub struct Analytic;

impl Synthesizer for Analytic {
    fn name(&self) -> &'static str {
        "analytic"
    }

    fn needs_weights(&self) -> bool {
        false
    }

    fn residuals(&self, batch: &[LesionCube]) -> Result<Vec<Array3<f32>>, SynthError> {
        Ok(batch.iter().map(residual).collect())
    }
}

fn residual(cube: &LesionCube) -> Array3<f32> {
    let [seed, index, attempt] = cube.key;
    let mut rng = Rng::keyed(seed, index, attempt, Purpose::Noise);
    let spread_hu = rng.range(SPREAD_HU[0], SPREAD_HU[1]);
    let texture = gaussian_field(
        &TextureRequest {
            size: {
                let (d, h, w) = cube.soft.dim();
                [d, h, w]
            },
            spacing_mm: cube.spacing_mm,
            correlation_mm: CORRELATION_MM,
        },
        &mut rng,
    );
    // Sums run in array order and in double precision, so they do not depend on anything but the voxels.
    let (mut weight, mut sum) = (0.0, 0.0);
    Zip::from(&texture).and(&cube.soft).for_each(|t, soft| {
        weight += f64::from(*soft);
        sum += f64::from(*soft) * f64::from(*t);
    });
    let mean = if weight > 0.0 { sum / weight } else { 0.0 };
    Zip::from(&texture).and(&cube.soft).map_collect(|t, soft| {
        let value = cube.contrast_hu + spread_hu * (f64::from(*t) - mean);
        (f64::from(*soft) / 255.0 * value) as f32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Paints a ball; returns mean and standard deviation of the residual where the mask is full.
    fn painted(side: usize, radius: f64) -> [f64; 2] {
        let soft = Array3::from_shape_fn([side; 3], |(z, y, x)| {
            let middle = side as f64 / 2.0;
            let squared = [z, y, x].iter().map(|v| (*v as f64 - middle).powi(2)).sum::<f64>();
            ((radius - squared.sqrt()) * 80.0).clamp(0.0, 255.0) as u8
        });
        let cube = LesionCube {
            image: Array3::zeros([side; 3]),
            soft: soft.clone(),
            organ: 0,
            host: soft.mapv(|soft| u8::from(soft > 0)),
            diameter_mm: 18.0,
            contrast_hu: -35.0,
            spacing_mm: [1.5; 3],
            key: [1, 2, 3],
            cancelled: super::super::Cancelled::default(),
        };
        let residual = Analytic.residuals(std::slice::from_ref(&cube)).unwrap().remove(0);
        assert!(residual.iter().zip(&soft).all(|(r, soft)| *soft > 0 || *r == 0.0));
        let full = residual.iter().zip(&soft).filter(|(_, soft)| **soft == 255);
        let full: Vec<f64> = full.map(|(r, _)| f64::from(*r)).collect();
        let mean = full.iter().sum::<f64>() / full.len() as f64;
        let squares = full.iter().map(|r| (r - mean).powi(2)).sum::<f64>();
        [mean, (squares / full.len() as f64).sqrt()]
    }

    #[test]
    fn the_contrast_is_kept_and_nothing_leaves_the_mask() {
        let [mean, wide] = painted(48, 20.0);
        assert!(
            (mean + 35.0).abs() < 2.0 && (5.0..11.0).contains(&wide),
            "{mean} {wide}"
        );
        // The full part is 11 mm wide, less than three correlation lengths: the texture is not stretched to its spread.
        let [mean, narrow] = painted(24, 7.0);
        assert!(
            (mean + 35.0).abs() < 4.0 && (1.5..6.0).contains(&narrow),
            "{mean} {narrow}"
        );
    }
}
