//! A plain 3D U-Net: critic, discriminator, segmentor, and the body of the conditional generator.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::blocks::{Conv, DoubleConv, Init, UpConv};
use crate::kernel::{self, ComputeDtype};

/// The shape of a U-Net.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnetConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output (logits).
    pub out_channels: usize,
    /// Channels at each resolution, finest first; every further one halves the resolution.
    pub widths: Vec<usize>,
    /// Length of the condition vector, 0 for none.
    #[serde(default)]
    pub condition: usize,
}

impl UnetConfig {
    /// Makes a network whose weights follow from `seed` alone.
    ///
    /// # Panics
    /// When `widths` is empty.
    pub fn init(&self, device: &Device, seed: u64) -> Unet {
        let init = &mut Init::new(device, seed);
        let widths = &self.widths;
        let down = (0..widths.len())
            .map(|i| {
                let from = if i == 0 { self.in_channels } else { widths[i - 1] };
                DoubleConv::new(init, [from, widths[i]], self.condition)
            })
            .collect();
        let up = (0..widths.len() - 1)
            .rev()
            .map(|i| Up {
                up: UpConv::new(init, [widths[i + 1], widths[i]]),
                conv: DoubleConv::new(init, [2 * widths[i], widths[i]], self.condition),
            })
            .collect();
        Unet {
            down,
            up,
            head: Conv::new(init, [widths[0], self.out_channels], 1, 1, 1.0),
            dtype: ComputeDtype::default(),
        }
    }

    /// Returns the factor that input sizes must be divisible by.
    pub fn stride(&self) -> usize {
        1 << (self.widths.len() - 1)
    }
}

/// One step back to a finer resolution.
#[derive(Module, Debug)]
pub struct Up {
    up: UpConv,
    conv: DoubleConv,
}

/// A plain 3D U-Net with instance norm and leaky ReLU.
///
/// # Source
/// Çiçek et al., arXiv 1606.06650. Departure: instance instead of batch norm, so that a patch's output does not depend
/// on its batch mates (the released FreeTumor code's batch statistics do; method, section 7, item 10).
#[derive(Module, Debug)]
pub struct Unet {
    down: Vec<DoubleConv>,
    up: Vec<Up>,
    head: Conv,
    #[module(skip)]
    dtype: ComputeDtype,
}

impl Unet {
    /// Computes in another type; the weights stay what they are.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Returns what it computes in.
    pub fn compute_dtype(&self) -> ComputeDtype {
        self.dtype
    }

    /// Returns the factor that input sizes must be divisible by.
    pub fn stride(&self) -> usize {
        1 << self.up.len()
    }

    /// # Shape
    /// x `[B, in, D, H, W]` (sizes divisible by the stride), condition `[B, K]` -> logits `[B, out, D, H, W]`.
    pub fn forward(&self, x: Tensor<5>, condition: Option<&Tensor<2>>) -> Tensor<5> {
        let mut skips = Vec::with_capacity(self.down.len());
        let mut x = self.dtype.enter(x);
        for (level, block) in self.down.iter().enumerate() {
            if level > 0 {
                x = kernel::max_pool3d_k2(x);
            }
            x = block.forward(x, condition);
            skips.push(x.clone());
        }
        skips.pop();
        for block in &self.up {
            let skip = skips.pop().expect("one skip per step up");
            x = block.conv.forward_pair(skip, block.up.forward(x), condition);
        }
        self.dtype.leave(self.head.forward(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_and_seeds() {
        let device = Device::flex();
        let config = UnetConfig {
            in_channels: 1,
            out_channels: 3,
            widths: vec![4, 8],
            condition: 2,
        };
        let net = config.init(&device, 1);
        let x = Tensor::<5>::ones([2, 1, 8, 8, 8], &device);
        let condition = Tensor::<2>::ones([2, 2], &device);
        assert_eq!(net.forward(x.clone(), Some(&condition)).dims(), [2, 3, 8, 8, 8]);
        let again = config.init(&device, 1);
        assert_eq!(
            net.forward(x.clone(), Some(&condition)).into_data(),
            again.forward(x, Some(&condition)).into_data()
        );
    }
}
