//! SwinUNETR: the published critic and segmentor, a transformer on shifted windows with a convolutional decoder.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, activation, module, ops::ConvOptions};
use serde::{Deserialize, Serialize};

use super::blocks::{Init, LEAKY_SLOPE};
use super::planned::{AxisConv, AxisUp, ConvShape};
use super::swin_blocks::{Merge, SwinBlock, normalise_tokens};
use crate::kernel;

/// Side of the attention windows in tokens.
const WINDOW: usize = 7;

/// In which order a merge puts the eight tokens of a block side by side. The weights fit either, so a file does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Merging {
    /// MONAI up to 1.3, which the published models were trained with: two tokens twice, two never.
    #[default]
    Released,
    /// Later MONAI (1.6.1 was read): every token once.
    Corrected,
}

impl Merging {
    fn order(self) -> [[usize; 3]; 8] {
        match self {
            Self::Released => [
                [0, 0, 0],
                [1, 0, 0],
                [0, 1, 0],
                [0, 0, 1],
                [1, 0, 1],
                [0, 1, 0],
                [0, 0, 1],
                [1, 1, 1],
            ],
            Self::Corrected => [
                [0, 0, 0],
                [1, 0, 0],
                [0, 1, 0],
                [0, 0, 1],
                [1, 1, 0],
                [1, 0, 1],
                [0, 1, 1],
                [1, 1, 1],
            ],
        }
    }
}

/// The shape of a SwinUNETR.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwinUnetrConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output (logits).
    pub out_channels: usize,
    /// Channels at the finest resolution.
    pub feature_size: usize,
    /// Transformer blocks of every stage.
    pub depths: [usize; 4],
    /// Attention heads of every stage.
    pub heads: [usize; 4],
    /// Whether a residual block of convolutions precedes every stage (version 2).
    pub stage_convolutions: bool,
    /// In which order tokens are merged.
    pub merging: Merging,
}

impl SwinUnetrConfig {
    /// Returns the published critic and segmentor: version 2, 48 features, MONAI 1.3.
    pub fn published(out_channels: usize) -> Self {
        Self {
            in_channels: 1,
            out_channels,
            feature_size: 48,
            depths: [2; 4],
            heads: [3, 6, 12, 24],
            stage_convolutions: true,
            merging: Merging::Released,
        }
    }

    /// Returns the factor that input sizes must be divisible by.
    pub fn stride(&self) -> usize {
        32
    }

    /// Makes a network whose weights follow from `seed` alone.
    pub fn init(&self, device: &Device, seed: u64) -> SwinUnetr {
        let init = &mut Init::new(device, seed);
        let f = self.feature_size;
        let stages = (0..4).map(|i| SwinStage::new(init, self, i)).collect();
        let encoders = [
            [self.in_channels, f],
            [f, f],
            [2 * f, 2 * f],
            [4 * f, 4 * f],
            [16 * f, 16 * f],
        ];
        let decoders = [[16 * f, 8 * f], [8 * f, 4 * f], [4 * f, 2 * f], [2 * f, f], [f, f]];
        SwinUnetr {
            embed: init.he([f, self.in_channels, 2, 2, 2], 8 * self.in_channels, 1.0),
            embed_bias: init.constant(f, 0.0),
            stages,
            encoders: encoders.map(|channels| ResBlock::new(init, channels)).into(),
            decoders: decoders.map(|channels| UpBlock::new(init, channels)).into(),
            head: AxisConv::new(init, ConvShape::keeping([f, self.out_channels], [1; 3])),
            merging: self.merging,
        }
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> u64 {
        let f = self.feature_size;
        let res = |from: usize, to: usize| 27 * to * (from + to) + if from == to { 0 } else { from * to };
        let up = |from: usize, to: usize| 8 * from * to + res(2 * to, to);
        let mut sum = 8 * self.in_channels * f + f;
        for stage in 0..4 {
            let c = f << stage;
            let block =
                4 * c + 3 * c * (c + 1) + c * (c + 1) + (2 * WINDOW - 1).pow(3) * self.heads[stage] + 8 * c * c + 5 * c;
            sum += self.depths[stage] * block + 16 * c + 16 * c * c;
            sum += if self.stage_convolutions { res(c, c) } else { 0 };
        }
        sum += res(self.in_channels, f) + res(f, f) + res(2 * f, 2 * f) + res(4 * f, 4 * f) + res(16 * f, 16 * f);
        sum += up(16 * f, 8 * f) + up(8 * f, 4 * f) + up(4 * f, 2 * f) + up(2 * f, f) + up(f, f);
        (sum + (f + 1) * self.out_channels) as u64
    }

    /// Tells what is wrong with the shape, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        for (name, channels) in [("in_channels", self.in_channels), ("out_channels", self.out_channels)] {
            if !(1..=128).contains(&channels) {
                return Some(format!("{name}: expected 1 to 128, got {channels}"));
            }
        }
        if !(1..=192).contains(&self.feature_size) {
            return Some(format!("feature_size: expected 1 to 192, got {}", self.feature_size));
        }
        if let Some(depth) = self.depths.iter().find(|depth| !(1..=24).contains(*depth)) {
            return Some(format!("depths: expected 1 to 24, got {depth}"));
        }
        let divides =
            |stage: usize| self.heads[stage] > 0 && (self.feature_size << stage).is_multiple_of(self.heads[stage]);
        (0..4).find(|stage| !divides(*stage)).map(|stage| {
            let channels = self.feature_size << stage;
            format!("heads: expected a divisor of {channels}, got {}", self.heads[stage])
        })
    }
}

/// Instance norm without parameters, and a leaky ReLU.
fn norm_act(x: Tensor<5>, slope: f64) -> Tensor<5> {
    let [b, c, ..] = x.dims();
    let device = x.device();
    kernel::instance_norm_leaky_relu(x, Tensor::ones([b, c], &device), Tensor::zeros([b, c], &device), slope)
}

/// Two convolutions beside a skip, which a third one projects where the channels differ.
#[derive(Module, Debug)]
pub struct ResBlock {
    conv1: AxisConv,
    conv2: AxisConv,
    conv3: Option<AxisConv>,
}

impl ResBlock {
    fn new(init: &mut Init, [from, to]: [usize; 2]) -> Self {
        let mut conv = |from: usize, side: usize| {
            let shape = ConvShape {
                bias: false,
                ..ConvShape::keeping([from, to], [side; 3])
            };
            AxisConv::new(init, shape)
        };
        Self {
            conv1: conv(from, 3),
            conv2: conv(to, 3),
            conv3: (from != to).then(|| conv(from, 1)),
        }
    }

    fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let y = norm_act(self.conv1.forward(x.clone()), LEAKY_SLOPE);
        // A leaky ReLU of slope 1 is the identity.
        let y = norm_act(self.conv2.forward(y), 1.0);
        let skip = match &self.conv3 {
            Some(conv) => norm_act(conv.forward(x), 1.0),
            None => x,
        };
        activation::leaky_relu(y + skip, LEAKY_SLOPE)
    }
}

/// One step back to a finer resolution.
#[derive(Module, Debug)]
pub struct UpBlock {
    up: AxisUp,
    block: ResBlock,
}

impl UpBlock {
    fn new(init: &mut Init, [from, to]: [usize; 2]) -> Self {
        Self {
            up: AxisUp::new(init, [from, to], [2; 3], false),
            block: ResBlock::new(init, [2 * to, to]),
        }
    }

    fn forward(&self, x: Tensor<5>, skip: Tensor<5>) -> Tensor<5> {
        self.block.forward(Tensor::cat(vec![self.up.forward(x), skip], 1))
    }
}

/// One stage of the transformer, ending at half its resolution.
#[derive(Module, Debug)]
pub struct SwinStage {
    conv: Option<ResBlock>,
    blocks: Vec<SwinBlock>,
    merge: Merge,
}

impl SwinStage {
    fn new(init: &mut Init, config: &SwinUnetrConfig, stage: usize) -> Self {
        let channels = config.feature_size << stage;
        let shape = [channels, config.heads[stage], WINDOW];
        Self {
            conv: config.stage_convolutions.then(|| ResBlock::new(init, [channels; 2])),
            blocks: (0..config.depths[stage])
                .map(|i| SwinBlock::new(init, shape, i % 2 == 1))
                .collect(),
            merge: Merge::new(init, channels),
        }
    }

    fn forward(&self, x: Tensor<5>, order: &[[usize; 3]; 8]) -> Tensor<5> {
        let x = match &self.conv {
            Some(conv) => conv.forward(x),
            None => x,
        };
        let tokens = x.permute([0, 2, 3, 4, 1]);
        let tokens = self.blocks.iter().fold(tokens, |x, block| block.forward(x));
        self.merge.forward(tokens, order).permute([0, 4, 1, 2, 3])
    }
}

/// SwinUNETR; always computed in single precision.
///
/// # Source
/// Hatamizadeh et al., arXiv 2201.01266; version 2: He et al., MICCAI 2023; built as MONAI's `SwinUNETR` builds it with
/// windows of 7, instance norm without parameters and normalised hidden states.
#[derive(Module, Debug)]
pub struct SwinUnetr {
    embed: Param<Tensor<5>>,
    embed_bias: Param<Tensor<1>>,
    stages: Vec<SwinStage>,
    encoders: Vec<ResBlock>,
    decoders: Vec<UpBlock>,
    head: AxisConv,
    #[module(skip)]
    merging: Merging,
}

impl SwinUnetr {
    /// # Shape
    /// x `[B, in, D, H, W]` (sizes divisible by 32) -> logits `[B, out, D, H, W]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        self.forward_seen(x, &mut |_, _| {})
    }

    /// Does what [`Self::forward`] does, and shows every layer's output under MONAI's name for the layer; `hidden0` to
    /// `hidden4` are the transformer's states before they are normalised.
    pub fn forward_seen(&self, x: Tensor<5>, see: &mut dyn FnMut(&str, &Tensor<5>)) -> Tensor<5> {
        let hidden = self.hidden(x.clone());
        for (i, state) in hidden.iter().enumerate() {
            see(&format!("hidden{i}"), state);
        }
        let normalised =
            |i: usize| normalise_tokens(hidden[i].clone().permute([0, 2, 3, 4, 1])).permute([0, 4, 1, 2, 3]);
        let inputs = [x, normalised(0), normalised(1), normalised(2), normalised(4)];
        let names = ["encoder1", "encoder2", "encoder3", "encoder4", "encoder10"];
        let mut encoded = Vec::with_capacity(5);
        for ((name, block), input) in names.iter().zip(&self.encoders).zip(inputs) {
            let y = block.forward(input);
            see(name, &y);
            encoded.push(y);
        }
        let mut x = encoded.pop().expect("five encoders");
        encoded.push(normalised(3));
        let names = ["decoder5", "decoder4", "decoder3", "decoder2", "decoder1"];
        for ((name, block), skip) in names.iter().zip(&self.decoders).zip(encoded.into_iter().rev()) {
            x = block.forward(x, skip);
            see(name, &x);
        }
        self.head.forward(x)
    }

    /// Returns the transformer's five states, `[B, C 2^i, D / 2^(i+1), ...]`.
    fn hidden(&self, x: Tensor<5>) -> Vec<Tensor<5>> {
        let options = ConvOptions::new([2; 3], [0; 3], [1; 3], 1);
        let order = self.merging.order();
        let mut states = vec![module::conv3d(
            x,
            self.embed.val(),
            Some(self.embed_bias.val()),
            options,
        )];
        for stage in &self.stages {
            let last = states.last().expect("starts with one").clone();
            states.push(stage.forward(last, &order));
        }
        states
    }
}
