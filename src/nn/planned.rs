//! Blocks of imported networks: convolutions with a kernel and a stride per axis, instance norm, leaky ReLU.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::blocks::{Init, LEAKY_SLOPE};
use crate::kernel;

/// What a convolution is made from.
#[derive(Clone, Copy, Debug)]
pub struct ConvShape {
    /// Channels in and out.
    pub channels: [usize; 2],
    /// The kernel's sides (z, y, x), odd.
    pub kernel: [usize; 3],
    /// The stride (z, y, x).
    pub stride: [usize; 3],
    /// Whether it has a bias.
    pub bias: bool,
}

impl ConvShape {
    /// Describes a convolution that keeps the resolution and has a bias.
    pub fn keeping(channels: [usize; 2], kernel: [usize; 3]) -> Self {
        Self {
            channels,
            kernel,
            stride: [1; 3],
            bias: true,
        }
    }
}

/// A convolution.
#[derive(Module, Debug)]
pub struct AxisConv {
    weight: Param<Tensor<5>>,
    bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    stride: [usize; 3],
}

impl AxisConv {
    /// Makes a convolution.
    pub fn new(init: &mut Init, shape: ConvShape) -> Self {
        let [ci, co] = shape.channels;
        let [kd, kh, kw] = shape.kernel;
        Self {
            weight: init.he([co, ci, kd, kh, kw], ci * kd * kh * kw, 1.0),
            bias: shape.bias.then(|| init.constant(co, 0.0)),
            stride: shape.stride,
        }
    }

    /// # Shape
    /// `[B, Ci, D, H, W]` -> `[B, Co, D/stride, H/stride, W/stride]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let bias = self.bias.as_ref().map(Param::val);
        kernel::conv3d_per_axis(x, self.weight.val(), bias, self.stride)
    }
}

/// Enlarges by a transposed convolution whose stride is its kernel.
#[derive(Module, Debug)]
pub struct AxisUp {
    weight: Param<Tensor<5>>,
    bias: Option<Param<Tensor<1>>>,
}

impl AxisUp {
    /// Makes the block from channels in and out and a factor per axis.
    pub fn new(init: &mut Init, [ci, co]: [usize; 2], [fd, fh, fw]: [usize; 3], bias: bool) -> Self {
        Self {
            weight: init.he([ci, co, fd, fh, fw], ci, 1.0),
            bias: bias.then(|| init.constant(co, 0.0)),
        }
    }

    /// # Shape
    /// `[B, Ci, D, H, W]` -> `[B, Co, D fd, H fh, W fw]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        kernel::conv_transpose3d_blocks(x, self.weight.val(), self.bias.as_ref().map(Param::val))
    }
}

/// A convolution and its instance norm, which scales and shifts.
#[derive(Module, Debug)]
pub struct ConvNorm {
    conv: AxisConv,
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
}

impl ConvNorm {
    /// Makes the block.
    pub fn new(init: &mut Init, shape: ConvShape) -> Self {
        Self {
            conv: AxisConv::new(init, shape),
            gamma: init.constant(shape.channels[1], 1.0),
            beta: init.constant(shape.channels[1], 0.0),
        }
    }

    /// Convolves, normalises, and applies a leaky ReLU.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        self.with_slope(x, LEAKY_SLOPE)
    }

    /// Convolves and normalises.
    pub fn linear(&self, x: Tensor<5>) -> Tensor<5> {
        // A leaky ReLU of slope 1 is the identity.
        self.with_slope(x, 1.0)
    }

    fn with_slope(&self, x: Tensor<5>, slope: f64) -> Tensor<5> {
        let x = self.conv.forward(x);
        let [b, c, ..] = x.dims();
        let rows = |vector: &Param<Tensor<1>>| vector.val().unsqueeze::<2>().expand([b, c]);
        kernel::instance_norm_leaky_relu(x, rows(&self.gamma), rows(&self.beta), slope)
    }
}
