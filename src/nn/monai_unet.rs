//! MONAI's `UNet`: residual units of convolution, instance norm and PReLU, and overlapping transposed convolutions.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::blocks::Init;
use super::planned::{AxisConv, ConvShape};
use crate::kernel::{self, ComputeDtype};

/// The slope of PReLU below zero before training.
const INITIAL_SLOPE: f32 = 0.25;
/// Side of every kernel.
const SIDE: usize = 3;

/// The shape of a MONAI `UNet` with kernels of side 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MonaiUnetConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output (logits).
    pub out_channels: usize,
    /// Channels at each resolution, finest first.
    pub widths: Vec<usize>,
    /// How much coarser each resolution is than the one before: the first than the input, one fewer than widths.
    pub strides: Vec<usize>,
    /// Convolutions of a residual unit; 0 for plain convolutions.
    pub residual_units: usize,
}

impl MonaiUnetConfig {
    /// Makes a network whose weights follow from `seed` alone.
    ///
    /// # Panics
    /// When there are not at least two widths and one stride fewer.
    pub fn init(&self, device: &Device, seed: u64) -> MonaiUnet {
        let init = &mut Init::new(device, seed);
        let levels = self.strides.len();
        assert_eq!(self.widths.len(), levels + 1, "one stride per step down");
        let down =
            (0..levels).map(|i| DownUnit::new(init, self.residual_units, self.down_channels(i), self.strides[i]));
        let down = down.collect();
        let bottom = DownUnit::new(
            init,
            self.residual_units,
            [self.widths[levels - 1], self.widths[levels]],
            1,
        );
        let up = (0..levels).map(|i| UpUnit::new(init, self, i)).collect();
        MonaiUnet {
            down,
            bottom,
            up,
            dtype: ComputeDtype::default(),
        }
    }

    fn down_channels(&self, level: usize) -> [usize; 2] {
        let from = if level == 0 {
            self.in_channels
        } else {
            self.widths[level - 1]
        };
        [from, self.widths[level]]
    }

    /// Returns the channels of a step up: what comes from below beside the skip, and what the next finer one gets.
    fn up_channels(&self, level: usize) -> [usize; 2] {
        let below = if level + 1 == self.strides.len() {
            self.widths[level + 1]
        } else {
            self.widths[level]
        };
        let to = if level == 0 {
            self.out_channels
        } else {
            self.widths[level - 1]
        };
        [below + self.widths[level], to]
    }

    /// Returns the factor that input sizes must be divisible by.
    pub fn stride(&self) -> usize {
        self.strides.iter().product()
    }

    /// Returns the number of parameters.
    pub fn parameters(&self) -> u64 {
        let conv = |[from, to]: [usize; 2], side: usize| from * to * side * side * side + to;
        let levels = self.strides.len();
        let down = |[from, to]: [usize; 2], stride: usize| {
            let units = self.residual_units.max(1);
            let repeated = conv([to, to], SIDE) + 1;
            let residual = match (self.residual_units, stride) {
                (0, _) => 0,
                (_, 1) if from == to => 0,
                (_, 1) => conv([from, to], 1),
                _ => conv([from, to], SIDE),
            };
            conv([from, to], SIDE) + 1 + (units - 1) * repeated + residual
        };
        let mut sum = down([self.widths[levels - 1], self.widths[levels]], 1);
        for level in 0..levels {
            sum += down(self.down_channels(level), self.strides[level]);
            let [from, to] = self.up_channels(level);
            let (is_top, is_plain) = (level == 0, self.residual_units == 0);
            sum += conv([from, to], SIDE) + usize::from(!(is_top && is_plain));
            sum += if is_plain {
                0
            } else {
                conv([to, to], SIDE) + usize::from(!is_top)
            };
        }
        sum as u64
    }

    /// Tells what is wrong with the shape, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let levels = self.widths.len();
        if !(2..=8).contains(&levels) || self.strides.len() + 1 != levels {
            let strides = &self.strides;
            return Some(format!(
                "widths: expected 2 to 8 and one stride fewer, got {levels} and {strides:?}"
            ));
        }
        if let Some(width) = self.widths.iter().find(|width| !(1..=1024).contains(*width)) {
            return Some(format!("widths: expected 1 to 1024 channels, got {width}"));
        }
        if let Some(stride) = self.strides.iter().find(|stride| !(1..=2).contains(*stride)) {
            return Some(format!("strides: expected 1 or 2, got {stride}"));
        }
        let counts = [
            ("in_channels", self.in_channels, 1),
            ("out_channels", self.out_channels, 1),
        ];
        let counts = counts.into_iter().chain([("residual_units", self.residual_units, 0)]);
        counts
            .into_iter()
            .find(|(_, n, least)| !(*least..=128).contains(n))
            .map(|(name, n, least)| format!("{name}: expected {least} to 128, got {n}"))
    }
}

/// Instance norm without parameters, and a ReLU whose slope below zero was learnt.
fn norm_act(x: Tensor<5>, slope: &Param<Tensor<1>>) -> Tensor<5> {
    let [b, c, ..] = x.dims();
    let device = x.device();
    // A leaky ReLU of slope 1 is the identity.
    let x = kernel::instance_norm_leaky_relu(x, Tensor::ones([b, c], &device), Tensor::zeros([b, c], &device), 1.0);
    let slope = kernel::follow(slope.val(), &x).reshape([1, 1, 1, 1, 1]);
    x.clone().clamp_min(0.0) + x.clamp_max(0.0) * slope
}

/// A convolution; norm and activation behind it unless its output is the network's.
#[derive(Module, Debug)]
pub struct ConvUnit {
    conv: AxisConv,
    slope: Option<Param<Tensor<1>>>,
}

impl ConvUnit {
    fn new(init: &mut Init, channels: [usize; 2], stride: usize, is_last: bool) -> Self {
        let shape = ConvShape {
            stride: [stride; 3],
            ..ConvShape::keeping(channels, [SIDE; 3])
        };
        Self {
            conv: AxisConv::new(init, shape),
            slope: (!is_last).then(|| init.constant(1, INITIAL_SLOPE)),
        }
    }

    fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let x = self.conv.forward(x);
        match &self.slope {
            Some(slope) => norm_act(x, slope),
            None => x,
        }
    }
}

/// One resolution on the way down: convolutions, beside a projected skip where the network is residual.
#[derive(Module, Debug)]
pub struct DownUnit {
    units: Vec<ConvUnit>,
    residual: Option<AxisConv>,
    #[module(skip)]
    is_residual: bool,
}

impl DownUnit {
    fn new(init: &mut Init, residual_units: usize, channels: [usize; 2], stride: usize) -> Self {
        let [from, to] = channels;
        let units = (0..residual_units.max(1)).map(|i| match i {
            0 => ConvUnit::new(init, channels, stride, false),
            _ => ConvUnit::new(init, [to, to], 1, false),
        });
        let units = units.collect();
        let is_residual = residual_units > 0;
        let side = if stride == 1 { 1 } else { SIDE };
        let shape = ConvShape {
            stride: [stride; 3],
            ..ConvShape::keeping(channels, [side; 3])
        };
        let residual = (is_residual && (stride != 1 || from != to)).then(|| AxisConv::new(init, shape));
        Self {
            units,
            residual,
            is_residual,
        }
    }

    fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let y = self.units.iter().fold(x.clone(), |x, unit| unit.forward(x));
        match (&self.residual, self.is_residual) {
            (Some(project), _) => y + project.forward(x),
            (None, true) => y + x,
            (None, false) => y,
        }
    }
}

/// One step back to a finer resolution.
#[derive(Module, Debug)]
pub struct UpUnit {
    weight: Param<Tensor<5>>,
    bias: Param<Tensor<1>>,
    slope: Option<Param<Tensor<1>>>,
    unit: Option<ConvUnit>,
    #[module(skip)]
    stride: usize,
}

impl UpUnit {
    fn new(init: &mut Init, config: &MonaiUnetConfig, level: usize) -> Self {
        let [from, to] = config.up_channels(level);
        let (is_top, is_plain) = (level == 0, config.residual_units == 0);
        Self {
            weight: init.he([from, to, SIDE, SIDE, SIDE], from * SIDE, 1.0),
            bias: init.constant(to, 0.0),
            slope: (!(is_top && is_plain)).then(|| init.constant(1, INITIAL_SLOPE)),
            unit: (!is_plain).then(|| ConvUnit::new(init, [to, to], 1, is_top)),
            stride: config.strides[level],
        }
    }

    fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let mut x = kernel::conv_transpose3d_k3(x, self.weight.val(), self.bias.val(), self.stride);
        if let Some(slope) = &self.slope {
            x = norm_act(x, slope);
        }
        match &self.unit {
            Some(unit) => x.clone() + unit.forward(x),
            None => x,
        }
    }
}

/// MONAI's `UNet`.
///
/// # Source
/// Kerfoot et al., doi 10.1007/978-3-030-12029-0_40; built as MONAI builds it with its default norm and activation.
#[derive(Module, Debug)]
pub struct MonaiUnet {
    down: Vec<DownUnit>,
    bottom: DownUnit,
    up: Vec<UpUnit>,
    #[module(skip)]
    dtype: ComputeDtype,
}

impl MonaiUnet {
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
        let mut x = self.dtype.enter(x);
        let mut skips = Vec::with_capacity(self.down.len());
        for unit in &self.down {
            x = unit.forward(x);
            skips.push(x.clone());
        }
        x = self.bottom.forward(x);
        for (unit, skip) in self.up.iter().zip(skips).rev() {
            x = unit.forward(Tensor::cat(vec![skip, x], 1));
        }
        self.dtype.leave(x)
    }
}
