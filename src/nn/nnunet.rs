//! nnU-Net's networks: the plain and the residual-encoder U-Net, planned per data set.

use burn::module::Module;
use burn::tensor::{Device, Tensor, activation};
use serde::{Deserialize, Serialize};

use super::blocks::{Init, LEAKY_SLOPE};
use super::planned::{AxisConv, AxisUp, ConvNorm, ConvShape};
use crate::kernel::{self, ComputeDtype};

/// How much coarser the coarsest stage may be along an axis.
const MAX_REDUCTION: usize = 128;

/// How the encoder is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoder {
    /// Convolution, norm, leaky ReLU, repeated: `PlainConvUNet`.
    Plain,
    /// A stem and residual blocks: `ResidualEncoderUNet`.
    Residual,
}

/// One resolution of the encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NnunetStage {
    /// Channels.
    pub width: usize,
    /// Sides of its kernels along the network's axes, odd.
    pub kernel: [usize; 3],
    /// How much coarser it is than the stage before, along the network's axes.
    pub stride: [usize; 3],
    /// Convolutions (plain) or residual blocks.
    pub blocks: usize,
}

/// The shape of an nnU-Net network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NnunetConfig {
    /// How the encoder is built.
    pub encoder: Encoder,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output (logits).
    pub out_channels: usize,
    /// Its resolutions, finest first.
    pub stages: Vec<NnunetStage>,
    /// Convolutions at each resolution of the decoder, coarsest first: one fewer than stages.
    pub decoder_blocks: Vec<usize>,
}

impl NnunetConfig {
    /// Makes a network whose weights follow from `seed` alone.
    ///
    /// # Panics
    /// When there is no stage, or not one entry of `decoder_blocks` per step up.
    pub fn init(&self, device: &Device, seed: u64) -> Nnunet {
        let init = &mut Init::new(device, seed);
        let stages = &self.stages;
        assert_eq!(self.decoder_blocks.len() + 1, stages.len(), "one step up per step down");
        let stem = (self.encoder == Encoder::Residual).then(|| {
            let shape = ConvShape::keeping([self.in_channels, stages[0].width], stages[0].kernel);
            ConvNorm::new(init, shape)
        });
        let entry = if stem.is_some() {
            stages[0].width
        } else {
            self.in_channels
        };
        let down = (0..stages.len())
            .map(|i| {
                let from = if i == 0 { entry } else { stages[i - 1].width };
                Stage::new(init, self.encoder, from, &stages[i])
            })
            .collect();
        let up = (1..stages.len()).rev().zip(&self.decoder_blocks);
        let up = up.map(|(i, blocks)| Step::new(init, [&stages[i], &stages[i - 1]], *blocks));
        let up: Vec<Step> = up.collect();
        let heads = stages.iter().rev().skip(1);
        let heads =
            heads.map(|stage| AxisConv::new(init, ConvShape::keeping([stage.width, self.out_channels], [1; 3])));
        Nnunet {
            stem,
            down,
            up,
            heads: heads.collect(),
            dtype: ComputeDtype::default(),
        }
    }

    /// Returns the factor that input sizes must be divisible by, per axis of the network.
    pub fn stride(&self) -> [usize; 3] {
        std::array::from_fn(|axis| self.stages.iter().map(|stage| stage.stride[axis]).product())
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> u64 {
        let normed =
            |from: usize, to: usize, kernel: &[usize; 3]| from * to * kernel.iter().product::<usize>() + 3 * to;
        let stages = &self.stages;
        let mut sum = 0;
        let mut from = self.in_channels;
        if self.encoder == Encoder::Residual {
            sum += normed(from, stages[0].width, &stages[0].kernel);
            from = stages[0].width;
        }
        for stage in stages {
            let repeated = normed(stage.width, stage.width, &stage.kernel);
            sum += normed(from, stage.width, &stage.kernel) + (stage.blocks - 1) * repeated;
            if self.encoder == Encoder::Residual {
                sum += stage.blocks * repeated;
                // The skip's convolution has no bias.
                sum += if from == stage.width {
                    0
                } else {
                    from * stage.width + 2 * stage.width
                };
            }
            from = stage.width;
        }
        for (pair, blocks) in stages.windows(2).rev().zip(&self.decoder_blocks) {
            let [fine, coarse] = [&pair[0], &pair[1]];
            sum += coarse.width * fine.width * coarse.stride.iter().product::<usize>() + fine.width;
            sum += normed(2 * fine.width, fine.width, &fine.kernel);
            sum += (blocks - 1) * normed(fine.width, fine.width, &fine.kernel);
            sum += (fine.width + 1) * self.out_channels;
        }
        sum as u64
    }

    /// Tells what is wrong with the shape, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let count = self.stages.len();
        if !(2..=8).contains(&count) {
            return Some(format!("stages: expected 2 to 8, got {count}"));
        }
        if self.decoder_blocks.len() + 1 != count || !self.decoder_blocks.iter().all(|n| (1..=8).contains(n)) {
            let got = &self.decoder_blocks;
            return Some(format!(
                "decoder_blocks: expected {} numbers of 1 to 8, got {got:?}",
                count - 1
            ));
        }
        for channels in [self.in_channels, self.out_channels] {
            if !(1..=128).contains(&channels) {
                return Some(format!("channels in and out: expected 1 to 128, got {channels}"));
            }
        }
        for (i, stage) in self.stages.iter().enumerate() {
            let fits = (1..=1024).contains(&stage.width)
                && (1..=16).contains(&stage.blocks)
                && stage.kernel.iter().all(|side| [1, 3, 5, 7].contains(side))
                && stage.stride.iter().all(|stride| [1, 2, 3, 4].contains(stride));
            if !fits {
                return Some(format!(
                    "stages.{i}: expected 1 to 1024 channels, 1 to 16 blocks, kernels of 1, 3, 5 or 7, strides of 1 to 4, \
                     got {stage:?}"
                ));
            }
        }
        let reduced: [usize; 3] =
            std::array::from_fn(|axis| self.stages.iter().map(|stage| stage.stride[axis]).product());
        if self.stages[0].stride != [1; 3] || reduced.iter().any(|factor| *factor > MAX_REDUCTION) {
            return Some(format!(
                "stages: expected a first stride of 1 and at most {MAX_REDUCTION} along an axis in all, got {:?} and {reduced:?}",
                self.stages[0].stride
            ));
        }
        None
    }
}

/// A residual block: two convolutions beside a skip that averages and projects where the shapes differ.
#[derive(Module, Debug)]
pub struct ResidualBlock {
    first: ConvNorm,
    second: ConvNorm,
    skip: Option<ConvNorm>,
    #[module(skip)]
    stride: [usize; 3],
}

impl ResidualBlock {
    fn new(init: &mut Init, from: usize, stage: &NnunetStage, stride: [usize; 3]) -> Self {
        let first = ConvShape {
            stride,
            ..ConvShape::keeping([from, stage.width], stage.kernel)
        };
        let skip = ConvShape {
            bias: false,
            ..ConvShape::keeping([from, stage.width], [1; 3])
        };
        Self {
            first: ConvNorm::new(init, first),
            second: ConvNorm::new(init, ConvShape::keeping([stage.width; 2], stage.kernel)),
            skip: (from != stage.width).then(|| ConvNorm::new(init, skip)),
            stride,
        }
    }

    fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let mut skip = x.clone();
        if self.stride != [1; 3] {
            skip = kernel::average_pool3d(skip, self.stride);
        }
        if let Some(project) = &self.skip {
            skip = project.linear(skip);
        }
        let y = self.second.linear(self.first.forward(x));
        activation::leaky_relu(y + skip, LEAKY_SLOPE)
    }
}

/// One resolution of the encoder; the plain one has convolutions, the residual one blocks.
#[derive(Module, Debug)]
pub struct Stage {
    convs: Vec<ConvNorm>,
    blocks: Vec<ResidualBlock>,
}

impl Stage {
    fn new(init: &mut Init, encoder: Encoder, from: usize, stage: &NnunetStage) -> Self {
        let at = |i: usize| {
            if i == 0 {
                (from, stage.stride)
            } else {
                (stage.width, [1; 3])
            }
        };
        let (mut convs, mut blocks) = (Vec::new(), Vec::new());
        for (from, stride) in (0..stage.blocks).map(at) {
            let shape = ConvShape {
                stride,
                ..ConvShape::keeping([from, stage.width], stage.kernel)
            };
            match encoder {
                Encoder::Plain => convs.push(ConvNorm::new(init, shape)),
                Encoder::Residual => blocks.push(ResidualBlock::new(init, from, stage, stride)),
            }
        }
        Self { convs, blocks }
    }

    fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let x = self.convs.iter().fold(x, |x, conv| conv.forward(x));
        self.blocks.iter().fold(x, |x, block| block.forward(x))
    }
}

/// One step back to a finer resolution.
#[derive(Module, Debug)]
pub struct Step {
    up: AxisUp,
    convs: Vec<ConvNorm>,
}

impl Step {
    fn new(init: &mut Init, [coarse, fine]: [&NnunetStage; 2], blocks: usize) -> Self {
        let up = AxisUp::new(init, [coarse.width, fine.width], coarse.stride, true);
        let convs = (0..blocks).map(|i| {
            let from = if i == 0 { 2 * fine.width } else { fine.width };
            ConvNorm::new(init, ConvShape::keeping([from, fine.width], fine.kernel))
        });
        Self {
            up,
            convs: convs.collect(),
        }
    }

    fn forward(&self, x: Tensor<5>, skip: Tensor<5>) -> Tensor<5> {
        let x = Tensor::cat(vec![self.up.forward(x), skip], 1);
        self.convs.iter().fold(x, |x, conv| conv.forward(x))
    }
}

/// nnU-Net's plain or residual-encoder U-Net.
///
/// # Source
/// Isensee et al., nnU-Net, doi 10.1038/s41592-020-01008-z, and nnU-Net Revisited, arXiv 2404.09556; built as the package
/// `dynamic_network_architectures` builds them from a plans file: instance norm (eps 1e-5) and leaky ReLU (0.01).
#[derive(Module, Debug)]
pub struct Nnunet {
    stem: Option<ConvNorm>,
    down: Vec<Stage>,
    up: Vec<Step>,
    heads: Vec<AxisConv>,
    #[module(skip)]
    dtype: ComputeDtype,
}

impl Nnunet {
    /// Computes in another type; the weights stay what they are.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        Self { dtype, ..self }
    }

    /// Returns what it computes in.
    pub fn compute_dtype(&self) -> ComputeDtype {
        self.dtype
    }

    /// # Shape
    /// x `[B, in, D, H, W]` (sizes divisible by the stride) -> logits `[B, out, D, H, W]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let finest = self.decoded(x).pop().expect("a step up at least");
        let head = self.heads.last().expect("one head per step up");
        self.dtype.leave(head.forward(finest))
    }

    /// Returns the logits of every resolution of the decoder, finest first: what deep supervision compares.
    ///
    /// # Shape
    /// x `[B, in, D, H, W]` -> logits `[B, out, D, H, W]`, then those of every coarser stage but the coarsest.
    pub fn forward_deep(&self, x: Tensor<5>) -> Vec<Tensor<5>> {
        let decoded = self.decoded(x).into_iter().zip(&self.heads).rev();
        decoded.map(|(x, head)| self.dtype.leave(head.forward(x))).collect()
    }

    /// Returns the decoder's features, coarsest first.
    fn decoded(&self, x: Tensor<5>) -> Vec<Tensor<5>> {
        let mut x = self.dtype.enter(x);
        if let Some(stem) = &self.stem {
            x = stem.forward(x);
        }
        let mut skips = Vec::with_capacity(self.down.len());
        for stage in &self.down {
            x = stage.forward(x);
            skips.push(x.clone());
        }
        skips.pop();
        let steps = self.up.iter().zip(skips.into_iter().rev());
        let decoded = steps.scan(x, |x, (step, skip)| {
            *x = step.forward(x.clone(), skip);
            Some(x.clone())
        });
        decoded.collect()
    }
}
