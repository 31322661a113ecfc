//! The conditional generator: CT, soft mask and noise in, a lesion's residual in HU out.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::unet::{Unet, UnetConfig};
use crate::kernel::ComputeDtype;

/// The shape of a conditional generator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorConfig {
    /// Channels at each resolution, finest first.
    pub widths: Vec<usize>,
    /// How many organs it knows.
    pub organs: usize,
    /// Largest deviation of the texture from the requested contrast, in HU.
    pub spread_hu: f64,
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
        }
    }
}

/// Paints a lesion: residual = mask x (contrast + spread x texture), the texture's mean over the mask being zero, so
/// that the requested contrast is kept by construction and the network decides on structure alone.
#[derive(Module, Debug)]
pub struct Generator {
    body: Unet,
    spread_hu: f64,
}

impl Generator {
    /// Computes in another type; the weights stay what they are, and contrast and mask are applied in single precision.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        Self {
            body: self.body.with_compute_dtype(dtype),
            ..self
        }
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
        let batch = image.dims()[0];
        let texture = self
            .body
            .forward(Tensor::cat(vec![image, mask.clone(), noise], 1), Some(condition))
            .tanh();
        let over_mask = |x: Tensor<5>| -> Tensor<5> {
            let sum: Tensor<2> = x.flatten::<2>(1, 4).sum_dim(1);
            sum.reshape([batch, 1, 1, 1, 1])
        };
        let mean = over_mask(texture.clone() * mask.clone()) / (over_mask(mask.clone()) + 1e-6);
        mask * (contrast_hu.reshape([batch, 1, 1, 1, 1]) + (texture - mean) * self.spread_hu)
    }
}
