//! The conditional generator: CT, soft mask and noise in, a lesion's residual in HU out.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::unet::{Unet, UnetConfig};
use crate::kernel::ComputeDtype;

/// Keeps quotients finite where no voxel of the mask reaches 0.5, as in a coarser view of a tiny lesion.
const EMPTY: f64 = 1e-6;

/// The shape of a conditional generator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorConfig {
    /// Channels at each resolution, finest first.
    pub widths: Vec<usize>,
    /// How many organs it knows.
    pub organs: usize,
    /// Largest deviation of the texture from its mean, in HU.
    pub spread_hu: f64,
    /// Over what the mean contrast is the requested one.
    #[serde(default, skip_serializing_if = "ContrastOver::is_full_mask")]
    pub contrast_over: ContrastOver,
}

/// Over what of a painted lesion the mean contrast is the requested one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContrastOver {
    /// Where the mask is 1: the soft edge takes a share of a lesion's mean, the more the smaller it is. What generators did before there
    /// was a choice, and what a manifest means that does not say.
    #[default]
    FullMask,
    /// The mean over the lesion, {mask >= 0.5}: what the contrast of a real tumour is measured over, too.
    Lesion,
}

impl ContrastOver {
    /// Tells whether it is what is meant where nothing is said.
    pub fn is_full_mask(&self) -> bool {
        *self == Self::FullMask
    }
}

impl GeneratorConfig {
    /// Makes a generator whose weights follow from `seed` alone.
    pub fn init(&self, device: &Device, seed: u64) -> Generator {
        let condition = super::Condition::len(self.organs);
        let unet = UnetConfig {
            in_channels: 3,
            out_channels: 1,
            widths: self.widths.clone(),
            condition,
        };
        Generator {
            body: unet.init(device, seed),
            spread_hu: self.spread_hu,
            contrast_over: self.contrast_over,
        }
    }
}

/// Paints a lesion: residual = mask x (gain x contrast + spread x texture). The network decides on structure alone: the texture's mean
/// is taken out, each voxel counted by its mask.
///
/// With [`ContrastOver::Lesion`] that mean is over {mask >= 0.5} and the gain is those voxels over the sum of their mask, so that the
/// residual's mean over the lesion is the requested contrast. With [`ContrastOver::FullMask`] the mean is over all of the mask and the gain 1.
///
/// Departure: a gain of 1 leaves measured contrast short of the requested one by what the soft edge takes: a slope of 0.88 over 192
/// lesions of 12 to 50 mm in voxels of 4 mm.
#[derive(Module, Debug)]
pub struct Generator {
    body: Unet,
    spread_hu: f64,
    #[module(skip)]
    contrast_over: ContrastOver,
}

impl Generator {
    /// Computes in another type; the weights stay what they are, and contrast and mask are applied in single precision.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        Self {
            body: self.body.with_compute_dtype(dtype),
            ..self
        }
    }

    /// Returns over what the mean contrast is the requested one.
    pub fn contrast_over(&self) -> ContrastOver {
        self.contrast_over
    }

    /// Returns what it computes in.
    pub fn compute_dtype(&self) -> ComputeDtype {
        self.body.compute_dtype()
    }

    /// Returns the residual in HU.
    ///
    /// # Shape
    /// image (in [0, 1]), mask (in [0, 1]) and noise (standard normal) `[B, 1, D, H, W]`; contrast in HU `[B]`;
    /// condition `[B, K]` -> `[B, 1, D, H, W]`.
    pub fn forward(
        &self,
        image: Tensor<5>,
        mask: Tensor<5>,
        noise: Tensor<5>,
        contrast_hu: Tensor<1>,
        condition: &Tensor<2>,
    ) -> Tensor<5> {
        let texture = self
            .body
            .forward(Tensor::cat(vec![image, mask.clone(), noise], 1), Some(condition))
            .tanh();
        let weights = match self.contrast_over {
            ContrastOver::Lesion => lesion(&mask) * mask.clone(),
            ContrastOver::FullMask => mask.clone(),
        };
        let mean = sum(texture.clone() * weights.clone()) / (sum(weights) + EMPTY);
        mask.clone() * (self.full_hu(&mask, contrast_hu) + (texture - mean) * self.spread_hu)
    }

    /// Returns gain x contrast, in HU: what is painted where the mask is 1, but for texture.
    ///
    /// # Shape
    /// mask `[B, 1, D, H, W]`, contrast `[B]` -> `[B, 1, 1, 1, 1]`.
    pub fn full_hu(&self, mask: &Tensor<5>, contrast_hu: Tensor<1>) -> Tensor<5> {
        let contrast_hu = contrast_hu.reshape([mask.dims()[0], 1, 1, 1, 1]);
        match self.contrast_over {
            ContrastOver::Lesion => {
                let lesion = lesion(mask);
                contrast_hu * ((sum(lesion.clone()) + EMPTY) / (sum(lesion * mask.clone()) + EMPTY))
            }
            ContrastOver::FullMask => contrast_hu,
        }
    }
}

/// Returns 1 where the mask is at least 0.5: what counts as lesion.
fn lesion(mask: &Tensor<5>) -> Tensor<5> {
    mask.clone().greater_equal_elem(0.5).float()
}

/// Adds each sample up: `[B, ..]` -> `[B, 1, 1, 1, 1]`.
fn sum(x: Tensor<5>) -> Tensor<5> {
    let batch = x.dims()[0];
    let sum: Tensor<2> = x.flatten::<2>(1, 4).sum_dim(1);
    sum.reshape([batch, 1, 1, 1, 1])
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, TensorData};

    use super::*;
    use crate::nn::Condition;

    fn config(contrast_over: ContrastOver) -> GeneratorConfig {
        GeneratorConfig {
            widths: vec![4, 8],
            organs: 2,
            spread_hu: 30.0,
            contrast_over,
        }
    }

    /// The effect of a ball of radius 3 in a cube of 16, whose edge is two voxels wide; the first sample of two has none.
    fn balls() -> Vec<f32> {
        let distance = |at: i32| {
            (0..3)
                .map(|axis| (at >> (4 * axis)) % 16 - 8)
                .map(|d| d * d)
                .sum::<i32>()
        };
        let ball = (0..4096).map(|at| (2.0 - 0.5 * f64::from(distance(at)).sqrt()).clamp(0.0, 1.0) as f32);
        std::iter::repeat_n(0.0, 4096).chain(ball).collect()
    }

    /// The residual of a lesion of -50 HU.
    fn residual(contrast_over: ContrastOver) -> Vec<f32> {
        let device = Device::flex();
        let shape = [2, 1, 16, 16, 16];
        let condition = Condition {
            organ: 1,
            diameter_mm: 20.0,
            contrast_hu: -50.0,
        };
        let condition = [condition.vector(2), condition.vector(2)].concat();
        let width = condition.len() / 2;
        let generator = config(contrast_over).init(&device, 3);
        let painted = generator.forward(
            Tensor::random(shape, Distribution::Uniform(0.0, 1.0), &device),
            Tensor::from_data(TensorData::new(balls(), shape), &device),
            Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device),
            Tensor::from_data([-50.0, -50.0], &device),
            &Tensor::from_data(TensorData::new(condition, [2, width]), &device),
        );
        painted.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn a_lesions_mean_is_the_requested_contrast() {
        let mask = balls();
        let mean = |residual: &[f32]| {
            let inside = residual.iter().zip(&mask).filter(|(_, mask)| **mask >= 0.5);
            let (sum, count) = inside.fold((0.0, 0), |(sum, count), (hu, _)| (sum + f64::from(*hu), count + 1));
            sum / f64::from(count)
        };
        let lesion = residual(ContrastOver::Lesion);
        assert!((mean(&lesion) + 50.0).abs() < 0.01, "{}", mean(&lesion));
        // Without gain the mean over the mask is the requested one, and that over the lesion falls short.
        let full = residual(ContrastOver::FullMask);
        let total = |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>();
        let over_mask = total(&full) / total(&mask);
        assert!((over_mask + 50.0).abs() < 0.01, "{over_mask}");
        assert!((-46.0..-32.0).contains(&mean(&full)), "{}", mean(&full));
        // Nothing is painted where there is no mask, and no mask at all is no mistake.
        for (hu, mask) in lesion.iter().zip(&mask) {
            assert!(hu.is_finite() && (*mask > 0.0 || *hu == 0.0));
        }
    }

    #[test]
    fn a_manifest_that_does_not_say_means_the_full_mask() {
        let text = serde_json::to_string(&config(ContrastOver::FullMask)).unwrap();
        assert_eq!(text, r#"{"widths":[4,8],"organs":2,"spread_hu":30.0}"#);
        assert_eq!(
            serde_json::from_str::<GeneratorConfig>(&text).unwrap(),
            config(ContrastOver::FullMask)
        );
        let text = serde_json::to_string(&config(ContrastOver::Lesion)).unwrap();
        assert!(text.ends_with(r#""contrast_over":"lesion"}"#), "{text}");
        assert_eq!(
            serde_json::from_str::<GeneratorConfig>(&text).unwrap(),
            config(ContrastOver::Lesion)
        );
    }
}
