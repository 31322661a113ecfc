//! Convolution, norm, activation: the blocks that U-Nets repeat.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};

use crate::kernel;
use crate::rng::{Purpose, Rng};

/// Slope of leaky ReLU below zero, as in nnU-Net.
pub const LEAKY_SLOPE: f64 = 0.01;

/// Draws initial weights from our own counter-based generator, because burn's is global to the process.
pub struct Init<'a> {
    /// Where the weights live.
    pub device: &'a Device,
    /// The seed of the network.
    pub seed: u64,
    /// Counts the tensors drawn so far.
    pub tensors: u64,
}

impl<'a> Init<'a> {
    /// Starts the initial weights of a network.
    pub fn new(device: &'a Device, seed: u64) -> Self {
        Self {
            device,
            seed,
            tensors: 0,
        }
    }

    /// Draws He-normal weights for leaky ReLU (He et al., arXiv 1502.01852, equation 15).
    pub fn he<const D: usize>(&mut self, shape: [usize; D], fan_in: usize, gain: f64) -> Param<Tensor<D>> {
        let scale = gain * libm::sqrt(2.0 / ((1.0 + LEAKY_SLOPE * LEAKY_SLOPE) * fan_in as f64));
        let mut rng = Rng::keyed(self.seed, self.tensors, 0, Purpose::Weights);
        self.tensors += 1;
        let values: Vec<f32> = rng
            .normals(shape.iter().product())
            .into_iter()
            .map(|v| v * scale as f32)
            .collect();
        Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), self.device))
    }

    /// Fills a vector with one value.
    pub fn constant(&mut self, length: usize, value: f32) -> Param<Tensor<1>> {
        Param::from_tensor(Tensor::from_data(
            TensorData::new(vec![value; length], [length]),
            self.device,
        ))
    }
}

/// A convolution with bias.
#[derive(Module, Debug)]
pub struct Conv {
    weight: Param<Tensor<5>>,
    bias: Param<Tensor<1>>,
    stride: usize,
}

impl Conv {
    /// Makes a convolution with a cubic kernel of side `k`.
    pub fn new(init: &mut Init, channels: [usize; 2], k: usize, stride: usize, gain: f64) -> Self {
        let [ci, co] = channels;
        Self {
            weight: init.he([co, ci, k, k, k], ci * k * k * k, gain),
            bias: init.constant(co, 0.0),
            stride,
        }
    }

    /// # Shape
    /// `[B, Ci, D, H, W]` -> `[B, Co, D/stride, H/stride, W/stride]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        kernel::conv3d(x, self.weight.val(), self.bias.val(), self.stride)
    }

    /// Convolves the channels of two tensors side by side, stride 1 whatever the block's.
    ///
    /// # Shape
    /// `[B, C1, D, H, W]`, `[B, C2, D, H, W]`, C1 + C2 = Ci -> `[B, Co, D, H, W]`.
    pub fn forward_pair(&self, first: Tensor<5>, second: Tensor<5>) -> Tensor<5> {
        kernel::conv3d_of_pair(first, second, self.weight.val(), self.bias.val())
    }
}

/// Instance norm and leaky ReLU, with FiLM where the network is conditioned.
///
/// # Source
/// Perez et al., FiLM, arXiv 1709.07871: the condition scales and shifts after the norm.
#[derive(Module, Debug)]
pub struct NormAct {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
    film: Option<Param<Tensor<2>>>,
}

impl NormAct {
    /// Makes the norm of `channels`, conditioned on vectors of length `condition` unless that is 0.
    pub fn new(init: &mut Init, channels: usize, condition: usize) -> Self {
        // A tenth of He's scale: at the start the condition nudges, it does not drown the image.
        let film = (condition > 0).then(|| init.he([condition, 2 * channels], condition, 0.1));
        Self {
            gamma: init.constant(channels, 1.0),
            beta: init.constant(channels, 0.0),
            film,
        }
    }

    /// # Shape
    /// x `[B, C, D, H, W]`, condition `[B, K]` -> like x.
    pub fn forward(&self, x: Tensor<5>, condition: Option<&Tensor<2>>) -> Tensor<5> {
        let [b, c, ..] = x.dims();
        let mut gamma: Tensor<2> = self.gamma.val().unsqueeze::<2>().expand([b, c]);
        let mut beta: Tensor<2> = self.beta.val().unsqueeze::<2>().expand([b, c]);
        if let (Some(film), Some(condition)) = (&self.film, condition) {
            // Not a matrix product: that may add in another order for one sample than for several, and a patch must not
            // depend on its batch mates.
            let products = condition.clone().unsqueeze_dim::<3>(2) * film.val().unsqueeze::<3>();
            let both: Tensor<2> = products.sum_dim(1).squeeze_dim(1);
            gamma = gamma + both.clone().slice([0..b, 0..c]);
            beta = beta + both.slice([0..b, c..2 * c]);
        }
        kernel::instance_norm_leaky_relu(x, gamma, beta, LEAKY_SLOPE)
    }
}

/// Twice convolution, norm, activation.
#[derive(Module, Debug)]
pub struct DoubleConv {
    first: Conv,
    first_norm: NormAct,
    second: Conv,
    second_norm: NormAct,
}

impl DoubleConv {
    /// Makes the block.
    pub fn new(init: &mut Init, channels: [usize; 2], condition: usize) -> Self {
        let [ci, co] = channels;
        Self {
            first: Conv::new(init, [ci, co], 3, 1, 1.0),
            first_norm: NormAct::new(init, co, condition),
            second: Conv::new(init, [co, co], 3, 1, 1.0),
            second_norm: NormAct::new(init, co, condition),
        }
    }

    /// # Shape
    /// `[B, Ci, D, H, W]` -> `[B, Co, D, H, W]`.
    pub fn forward(&self, x: Tensor<5>, condition: Option<&Tensor<2>>) -> Tensor<5> {
        self.after_first(self.first.forward(x), condition)
    }

    /// Takes its channels from two tensors, those of `first` first.
    pub fn forward_pair(&self, first: Tensor<5>, second: Tensor<5>, condition: Option<&Tensor<2>>) -> Tensor<5> {
        self.after_first(self.first.forward_pair(first, second), condition)
    }

    fn after_first(&self, x: Tensor<5>, condition: Option<&Tensor<2>>) -> Tensor<5> {
        let x = self.first_norm.forward(x, condition);
        self.second_norm.forward(self.second.forward(x), condition)
    }
}

/// Doubles the resolution by a transposed convolution.
#[derive(Module, Debug)]
pub struct UpConv {
    weight: Param<Tensor<5>>,
    bias: Param<Tensor<1>>,
}

impl UpConv {
    /// Makes the block.
    pub fn new(init: &mut Init, channels: [usize; 2]) -> Self {
        let [ci, co] = channels;
        Self {
            weight: init.he([ci, co, 2, 2, 2], ci, 1.0),
            bias: init.constant(co, 0.0),
        }
    }

    /// # Shape
    /// `[B, Ci, D, H, W]` -> `[B, Co, 2D, 2H, 2W]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        kernel::conv_transpose3d_k2s2(x, self.weight.val(), self.bias.val())
    }
}
