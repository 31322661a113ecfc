//! Any network that segments, trained here or imported, behind one way to ask it.

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::swin_blocks::padded_end;
use super::{MonaiUnet, Nnunet, SwinUnetr, Unet};
use crate::kernel::ComputeDtype;

/// The logit of a class that an imported network does not know: no chance, and no gradient.
const ABSENT: f32 = -1e4;

/// Gives every voxel a logit per class of the plan.
pub trait VoxelClassifier {
    /// # Shape
    /// x `[B, 1, D, H, W]`, intensities of the plan's window in [0, 1] -> `[B, classes, D, H, W]`.
    fn logits(&self, x: Tensor<5>) -> Tensor<5>;
}

impl VoxelClassifier for Unet {
    fn logits(&self, x: Tensor<5>) -> Tensor<5> {
        self.forward(x, None)
    }
}

impl VoxelClassifier for Network {
    fn logits(&self, x: Tensor<5>) -> Tensor<5> {
        self.forward(x)
    }
}

/// How an imported network wants intensities: clipped, then (x - mean) / sd. All in units of the plan's window, where 0 is
/// its lower and 1 its upper bound.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standardised {
    /// Below it, intensities are it.
    pub low: f64,
    /// Above it, intensities are it.
    pub high: f64,
    /// What becomes 0.
    pub mean: f64,
    /// What becomes 1 from the mean on.
    pub sd: f64,
}

/// What stands between the plan and an imported network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Adapter {
    /// How the network wants intensities; as the plan's window gives them where absent.
    pub intensity: Option<Standardised>,
    /// The plan's axis (0 z, 1 y, 2 x) that each of the network's axes is.
    pub axes: [usize; 3],
    /// The network's output of each class of the plan, none where it does not know the class; all in order where absent.
    pub outputs: Option<Vec<Option<usize>>>,
}

impl Default for Adapter {
    fn default() -> Self {
        Self {
            intensity: None,
            axes: [0, 1, 2],
            outputs: None,
        }
    }
}

impl Adapter {
    /// Tells whether it changes nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Tells what is wrong with it for a network of so many outputs and a plan of so many classes, naming the key.
    pub fn refusal(&self, outputs: usize, classes: usize) -> Option<String> {
        if let Some(Standardised { low, high, mean, sd }) = self.intensity
            && !(low < high && mean.is_finite() && sd > 0.0 && sd.is_finite())
        {
            return Some(format!(
                "intensity: expected low < high and sd > 0, got {:?}",
                self.intensity
            ));
        }
        let mut axes = self.axes;
        axes.sort_unstable();
        if axes != [0, 1, 2] {
            return Some(format!("axes: expected 0, 1 and 2 in some order, got {:?}", self.axes));
        }
        match &self.outputs {
            None if outputs != classes => Some(format!(
                "outputs: expected {classes} of the label map, the network has {outputs}"
            )),
            Some(of) if of.len() != classes || of.iter().flatten().any(|at| *at >= outputs) => Some(format!(
                "outputs: expected {classes} of the network's {outputs}, got {of:?}"
            )),
            _ => None,
        }
    }

    fn enter(&self, x: Tensor<5>) -> Tensor<5> {
        let x = match self.intensity {
            Some(Standardised { low, high, mean, sd }) => (x.clamp(low, high) - mean) / sd,
            None => x,
        };
        let [z, y, w] = self.axes;
        x.permute([0, 1, 2 + z as isize, 2 + y as isize, 2 + w as isize])
    }

    fn leave(&self, logits: Tensor<5>) -> Tensor<5> {
        let place = |axis: usize| 2 + self.axes.iter().position(|of| *of == axis).unwrap_or(axis) as isize;
        let logits = logits.permute([0, 1, place(0), place(1), place(2)]);
        let Some(outputs) = &self.outputs else {
            return logits;
        };
        let mut absent = logits.dims();
        absent[1] = 1;
        let of = |output: &Option<usize>| match output {
            Some(at) => logits.clone().narrow(1, *at, 1),
            None => Tensor::full(absent, ABSENT, &logits.device()),
        };
        Tensor::cat(outputs.iter().map(of).collect(), 1)
    }
}

/// The networks that segment.
#[derive(Module, Debug)]
pub enum Body {
    /// A plain 3D U-Net.
    Unet(Unet),
    /// SwinUNETR.
    SwinUnetr(SwinUnetr),
    /// nnU-Net's plain or residual-encoder U-Net.
    Nnunet(Nnunet),
    /// MONAI's U-Net.
    MonaiUnet(MonaiUnet),
}

/// A network that segments, with what stands between it and the plan.
#[derive(Module, Debug)]
pub struct Network {
    body: Body,
    #[module(skip)]
    stride: [usize; 3],
    #[module(skip)]
    adapter: Adapter,
}

impl Network {
    /// Joins a network, the factor that sizes must be divisible by (per axis of the network), and its adapter.
    pub fn new(body: Body, stride: [usize; 3], adapter: Adapter) -> Self {
        Self { body, stride, adapter }
    }

    /// Computes in another type, where the network can; the weights stay what they are.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        let body = match self.body {
            Body::Unet(net) => Body::Unet(net.with_compute_dtype(dtype)),
            Body::Nnunet(net) => Body::Nnunet(net.with_compute_dtype(dtype)),
            Body::MonaiUnet(net) => Body::MonaiUnet(net.with_compute_dtype(dtype)),
            Body::SwinUnetr(net) => Body::SwinUnetr(net),
        };
        Self { body, ..self }
    }

    /// Returns what it computes in.
    pub fn compute_dtype(&self) -> ComputeDtype {
        match &self.body {
            Body::Unet(net) => net.compute_dtype(),
            Body::Nnunet(net) => net.compute_dtype(),
            Body::MonaiUnet(net) => net.compute_dtype(),
            Body::SwinUnetr(_) => ComputeDtype::F32,
        }
    }

    /// Returns the logits of the plan's classes. Sizes that the network cannot halve often enough are filled up with air at
    /// their far ends.
    ///
    /// # Shape
    /// x `[B, 1, D, H, W]`, intensities of the plan's window in [0, 1] -> `[B, classes, D, H, W]`.
    pub fn forward(&self, x: Tensor<5>) -> Tensor<5> {
        let [b, _, d, h, w] = x.dims();
        let mut padded = x;
        for (of_network, axis) in self.adapter.axes.into_iter().enumerate() {
            let size = [d, h, w][axis];
            let missing = size.next_multiple_of(self.stride[of_network]) - size;
            padded = padded_end(padded, axis + 2, missing);
        }
        let x = self.adapter.enter(padded);
        let logits = match &self.body {
            Body::Unet(net) => net.forward(x, None),
            Body::SwinUnetr(net) => net.forward(x),
            Body::Nnunet(net) => net.forward(x),
            Body::MonaiUnet(net) => net.forward(x),
        };
        let logits = self.adapter.leave(logits);
        let classes = logits.dims()[1];
        logits.slice([0..b, 0..classes, 0..d, 0..h, 0..w])
    }
}

impl From<Unet> for Network {
    /// Takes a network trained here, which needs no adapter.
    fn from(net: Unet) -> Self {
        let stride = [net.stride(); 3];
        Self::new(Body::Unet(net), stride, Adapter::default())
    }
}
