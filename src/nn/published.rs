//! The published generator and discriminator: one U-Net, of the kind that Models Genesis uses.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, activation};
use serde::{Deserialize, Serialize};

use super::blocks::{Conv, Init, UpConv};
use crate::kernel::{self, ComputeDtype};

/// Channels of the first and the second convolution of every encoder level over those of the first one, finest first.
const WIDTHS: [[usize; 2]; 4] = [[1, 2], [2, 4], [4, 8], [8, 16]];

/// What the output goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputActivation {
    /// Nothing: logits, as the discriminator gives them.
    #[default]
    None,
    /// Hyperbolic tangent: the abdominal generator.
    Tanh,
    /// Logistic function: the chest generator.
    Sigmoid,
}

/// The shape of a published network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedConfig {
    /// Channels of the first convolution, from which all others follow: 32 as published; fewer where no GPU is at hand.
    #[serde(default = "published_width", skip_serializing_if = "is_published_width")]
    pub width: usize,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output: one per organ (generator), or background, real and synthetic (discriminator).
    pub out_channels: usize,
    /// What the output goes through.
    #[serde(default)]
    pub activation: OutputActivation,
}

fn published_width() -> usize {
    PublishedConfig::PUBLISHED_WIDTH
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_published_width(width: &usize) -> bool {
    *width == PublishedConfig::PUBLISHED_WIDTH
}

impl PublishedConfig {
    /// The published number of channels of the first convolution.
    pub const PUBLISHED_WIDTH: usize = 32;

    /// Returns the published generator for so many organs, with `width` channels in its first convolution.
    pub fn generator(width: usize, organs: usize) -> Self {
        Self {
            width,
            in_channels: 1,
            out_channels: organs,
            activation: OutputActivation::Tanh,
        }
    }

    /// Returns the published discriminator: logits of background, real and synthetic tumour.
    pub fn discriminator(width: usize) -> Self {
        Self {
            width,
            in_channels: 1,
            out_channels: 3,
            activation: OutputActivation::None,
        }
    }

    fn widths(&self) -> [[usize; 2]; 4] {
        WIDTHS.map(|pair| pair.map(|times| times * self.width))
    }

    /// Makes a network whose weights follow from `seed` alone.
    pub fn init(&self, device: &Device, seed: u64) -> Published {
        let (init, all) = (&mut Init::new(device, seed), self.widths());
        let down = all
            .iter()
            .enumerate()
            .map(|(level, widths)| {
                let from = if level == 0 {
                    self.in_channels
                } else {
                    all[level - 1][1]
                };
                ConvPair::new(init, [from, widths[0], widths[1]])
            })
            .collect();
        let up = (1..all.len())
            .rev()
            .map(|level| {
                let (coarse, fine) = (all[level][1], all[level - 1][1]);
                UpStep {
                    up: UpConv::new(init, [coarse, coarse]),
                    conv: ConvPair::new(init, [coarse + fine, fine, fine]),
                }
            })
            .collect();
        Published {
            down,
            up,
            head: Conv::new(init, [all[0][1], self.out_channels], 1, 1, 1.0),
            activation: self.activation,
            dtype: ComputeDtype::default(),
        }
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> u64 {
        let pair =
            |from: usize, [first, second]: [usize; 2]| 27 * (from * first + first * second) + 3 * (first + second);
        let all = self.widths();
        let mut sum = pair(self.in_channels, all[0]) + (all[0][1] + 1) * self.out_channels;
        for level in 1..all.len() {
            let (coarse, fine) = (all[level][1], all[level - 1][1]);
            sum += pair(fine, all[level]) + 8 * coarse * coarse + coarse + pair(coarse + fine, [fine, fine]);
        }
        sum as u64
    }

    /// Tells what is wrong with the shape, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let counts = [
            ("width", self.width),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ];
        counts
            .into_iter()
            .find(|(_, n)| !(1..=128).contains(n))
            .map(|(name, n)| format!("{name}: expected 1 to 128, got {n}"))
    }

    /// Returns how many multiply-adds one forward pass takes for a cube whose side is a multiple of 8.
    pub fn multiply_adds(&self, side: usize) -> u64 {
        let voxels = |level: usize| (side >> level).pow(3);
        let pair = |from: usize, [first, second]: [usize; 2]| 27 * (from * first + first * second);
        let all = self.widths();
        let mut sum = pair(self.in_channels, all[0]) * voxels(0);
        for level in 1..all.len() {
            let (coarse, fine) = (all[level][1], all[level - 1][1]);
            sum += pair(fine, all[level]) * voxels(level);
            // Every voxel of a doubled grid comes from one voxel and one of the eight kernel positions.
            sum += (coarse * coarse + pair(coarse + fine, [fine, fine])) * voxels(level - 1);
        }
        (sum + all[0][1] * self.out_channels * voxels(0)) as u64
    }
}

/// Whose mean and variance a norm takes.
#[derive(Clone, Copy, Debug)]
enum Statistics {
    /// The sample's own.
    Sample,
    /// Those of the whole batch.
    Batch,
}

/// Twice convolution, norm, ReLU, each with its own number of channels.
#[derive(Module, Debug)]
pub struct ConvPair {
    first: NormedConv,
    second: NormedConv,
}

impl ConvPair {
    fn new(init: &mut Init, [from, middle, to]: [usize; 3]) -> Self {
        Self {
            first: NormedConv::new(init, [from, middle]),
            second: NormedConv::new(init, [middle, to]),
        }
    }

    fn forward(&self, x: Tensor<5>, of: Statistics) -> Tensor<5> {
        self.second.forward(self.first.forward(x, of), of)
    }

    /// Takes the channels of two inputs, one behind the other.
    fn forward_pair(&self, first: Tensor<5>, second: Tensor<5>, of: Statistics) -> Tensor<5> {
        self.second.forward(self.first.forward_pair(first, second, of), of)
    }
}

/// Convolution, norm, ReLU.
#[derive(Module, Debug)]
pub struct NormedConv {
    conv: Conv,
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
}

impl NormedConv {
    fn new(init: &mut Init, channels: [usize; 2]) -> Self {
        Self {
            conv: Conv::new(init, channels, 3, 1, 1.0),
            gamma: init.constant(channels[1], 1.0),
            beta: init.constant(channels[1], 0.0),
        }
    }

    fn forward(&self, x: Tensor<5>, of: Statistics) -> Tensor<5> {
        self.norm_act(self.conv.forward(x), of)
    }

    fn forward_pair(&self, first: Tensor<5>, second: Tensor<5>, of: Statistics) -> Tensor<5> {
        self.norm_act(self.conv.forward_pair(first, second), of)
    }

    fn norm_act(&self, x: Tensor<5>, of: Statistics) -> Tensor<5> {
        let [b, c, d, h, w] = x.dims();
        match of {
            Statistics::Sample => self.norm_samples(x),
            Statistics::Batch => {
                // The whole batch as one sample, one behind the other.
                let whole = self.norm_samples(x.swap_dims(0, 1).reshape([1, c, b * d, h, w]));
                whole.reshape([c, b, d, h, w]).swap_dims(0, 1)
            }
        }
    }

    fn norm_samples(&self, x: Tensor<5>) -> Tensor<5> {
        let [b, c, ..] = x.dims();
        let rows = |vector: &Param<Tensor<1>>| vector.val().unsqueeze::<2>().expand([b, c]);
        // A leaky ReLU that leaks nothing.
        kernel::instance_norm_leaky_relu(x, rows(&self.gamma), rows(&self.beta), 0.0)
    }
}

/// One step back to a finer resolution.
#[derive(Module, Debug)]
pub struct UpStep {
    up: UpConv,
    conv: ConvPair,
}

/// The published generator or discriminator: four levels, 19 million parameters at the published width.
///
/// # Source
/// FreeTumor's released `UNet3D` (method, section 3.1). Departure: each sample is normalised by its own statistics. The
/// released batch norm uses those of the whole batch, also when it is applied, so that a patch depends on its batch mates
/// (method, section 7, item 10); for a batch of one the two are the same.
#[derive(Module, Debug)]
pub struct Published {
    down: Vec<ConvPair>,
    up: Vec<UpStep>,
    head: Conv,
    #[module(skip)]
    activation: OutputActivation,
    #[module(skip)]
    dtype: ComputeDtype,
}

impl Published {
    /// Computes in another type; the weights stay what they are.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Returns what it computes in.
    pub fn compute_dtype(&self) -> ComputeDtype {
        self.dtype
    }

    /// # Shape
    /// x `[B, in, D, H, W]` (sizes divisible by 8) -> `[B, out, D, H, W]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        self.normalised(x, Statistics::Sample)
    }

    /// Normalises by the statistics of the whole batch, as the released code does: for comparisons with it alone.
    ///
    /// # Shape
    /// As [`Self::forward`].
    pub fn forward_over_batch(&self, x: Tensor<5>) -> Tensor<5> {
        self.normalised(x, Statistics::Batch)
    }

    fn normalised(&self, x: Tensor<5>, of: Statistics) -> Tensor<5> {
        let mut skips = Vec::with_capacity(self.down.len());
        let mut x = self.dtype.enter(x);
        for (level, pair) in self.down.iter().enumerate() {
            if level > 0 {
                skips.push(x.clone());
                x = kernel::max_pool3d_k2(x);
            }
            x = pair.forward(x, of);
        }
        for step in &self.up {
            let skip = skips.pop().expect("one skip per step up");
            // The released order: what came up first, the skip behind it.
            x = step.conv.forward_pair(step.up.forward(x), skip, of);
        }
        let x = self.dtype.leave(self.head.forward(x));
        match self.activation {
            OutputActivation::None => x,
            OutputActivation::Tanh => x.tanh(),
            OutputActivation::Sigmoid => activation::sigmoid(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_and_cost_are_the_published_ones() {
        let generator = PublishedConfig::generator(PublishedConfig::PUBLISHED_WIDTH, 3);
        let net = generator.init(&Device::flex(), 1);
        assert_eq!(net.num_params(), 19_073_795);
        assert_eq!(generator.parameters(), 19_073_795);
        let narrow = PublishedConfig::generator(4, 3);
        assert_eq!(narrow.init(&Device::flex(), 1).num_params() as u64, narrow.parameters());
        // What hooks in PyTorch count (`benches/peers/torch_nn.py --count`), and the 824 billion of a patch of 96^3.
        assert_eq!(generator.multiply_adds(32), 30_531_387_392);
        assert_eq!(generator.multiply_adds(96) / 1_000_000_000, 824);
    }

    #[test]
    fn a_sample_ignores_its_batch_mates() {
        let device = Device::flex();
        let net = PublishedConfig::generator(4, 3).init(&device, 1);
        let values = crate::rng::Rng::keyed(1, 0, 0, crate::rng::Purpose::Test).normals(2 * 16 * 16 * 16);
        let x: Tensor<5> = Tensor::from_data(burn::tensor::TensorData::new(values, [2, 1, 16, 16, 16]), &device);
        let both = net.forward(x.clone());
        assert_eq!(both.dims(), [2, 3, 16, 16, 16]);
        for sample in 0..2 {
            let alone = net.forward(x.clone().narrow(0, sample, 1));
            let beside = both.clone().narrow(0, sample, 1);
            assert_eq!(alone.into_data(), beside.into_data());
        }
    }
}
