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

    /// Tells whether, on the CPU, a sample's numbers are bit for bit the same alone and beside others. Where burn's matrix products and
    /// convolutions take part, which divide their work by its size, they need not be.
    pub fn ignores_batch_mates(&self) -> bool {
        matches!(self.body, Body::Unet(_))
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

    /// Returns the network itself.
    pub fn body(&self) -> &Body {
        &self.body
    }

    /// Changes the network itself.
    ///
    /// # Errors
    /// What `change` returns.
    pub fn try_map<E>(self, change: impl FnOnce(Body) -> Result<Body, E>) -> Result<Self, E> {
        let body = change(self.body)?;
        Ok(Self { body, ..self })
    }

    /// Returns the logits of every resolution that the network gives some at, finest first: what deep supervision compares.
    /// For networks that need no adapter; those with coarser logits take no sizes that need filling up.
    ///
    /// # Shape
    /// x `[B, 1, D, H, W]` -> `[B, classes, D, H, W]`, then those of coarser resolutions.
    ///
    /// # Panics
    /// When there is an adapter, or deep supervision and sizes that the stride does not divide.
    pub fn forward_deep(&self, x: Tensor<5>) -> Vec<Tensor<5>> {
        assert!(self.adapter.is_default(), "no adapter");
        match &self.body {
            Body::Nnunet(net) => {
                let [_, _, d, h, w] = x.dims();
                let mut sizes = [d, h, w].into_iter().zip(self.stride);
                let divides = sizes.all(|(size, stride)| size.is_multiple_of(stride));
                assert!(divides, "sizes divisible by {:?}", self.stride);
                net.forward_deep(x)
            }
            Body::Unet(_) | Body::SwinUnetr(_) | Body::MonaiUnet(_) => vec![self.forward(x)],
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::super::{Encoder, MonaiUnetConfig, NnunetConfig, NnunetStage, SwinUnetrConfig, UnetConfig};
    use super::*;
    use crate::rng::{Purpose, Rng};

    fn tensor(values: Vec<f32>, shape: [usize; 5], device: &Device) -> Tensor<5> {
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    fn networks(device: &Device) -> [Network; 2] {
        let stage = |width, stride| NnunetStage {
            width,
            kernel: [1, 3, 3],
            stride,
            blocks: 1,
        };
        let nnunet = NnunetConfig {
            encoder: Encoder::Residual,
            in_channels: 1,
            out_channels: 2,
            stages: vec![stage(3, [1; 3]), stage(4, [1, 2, 2])],
            decoder_blocks: vec![1],
        };
        let adapter = Adapter {
            intensity: Some(Standardised {
                low: 0.1,
                high: 0.9,
                mean: 0.4,
                sd: 0.2,
            }),
            axes: [2, 0, 1],
            outputs: Some(vec![Some(1), None, Some(0)]),
        };
        let swin = SwinUnetrConfig {
            feature_size: 12,
            ..SwinUnetrConfig::published(3)
        };
        let stride = nnunet.stride();
        [
            Network::new(Body::Nnunet(nnunet.init(device, 1)), stride, adapter),
            Network::new(Body::SwinUnetr(swin.init(device, 1)), [32; 3], Adapter::default()),
        ]
    }

    /// What stage 2 needs of a critic: the gradient at its input, here along one direction against a difference quotient.
    #[test]
    fn gradients_reach_the_input_through_networks_and_adapters() {
        let device = Device::flex().autodiff();
        let shape = [1, 1, 32, 32, 31];
        let count = shape.iter().product();
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        let x: Vec<f32> = rng.normals(count).iter().map(|v| 0.5 + 0.15 * v).collect();
        let direction = rng.normals(count);
        let mut weights = rng.normals(3 * count);
        // The class that the first network does not know.
        weights[count..2 * count].fill(0.0);
        for network in networks(&device) {
            let at = |by: f32| {
                let moved = x.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
                let logits = network.forward(tensor(moved, shape, &device)).into_data();
                let products = logits.iter::<f64>().zip(&weights).map(|(y, w)| y * f64::from(*w));
                products.sum::<f64>()
            };
            let input = tensor(x.clone(), shape, &device).require_grad();
            let weights = tensor(weights.clone(), [1, 3, 32, 32, 31], &device);
            let gradients = (network.forward(input.clone()) * weights).sum().backward();
            let gradient: Vec<f32> = input.grad(&gradients).unwrap().into_data().try_to_vec().unwrap();
            let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let scale = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            // A long step crosses kinks, a short one loses digits.
            let quotients = [1e-3, 3e-4, 1e-4, 3e-5].map(|by| (at(by) - at(-by)) / (2.0 * f64::from(by)));
            let off = quotients.iter().map(|q| (slope - q).abs()).fold(f64::MAX, f64::min);
            assert!(off < 0.05 * scale, "{slope} instead of {quotients:?}, scale {scale}");
        }
    }

    /// What lets the device thread make batches of lesions (promise P1).
    #[test]
    fn a_sample_ignores_its_batch_mates() {
        let device = Device::flex();
        let shape = [3, 1, 32, 32, 32];
        let values = Rng::keyed(2, 0, 0, Purpose::Test).normals(shape.iter().product());
        let x = tensor(values, shape, &device);
        let unet = UnetConfig {
            in_channels: 1,
            out_channels: 3,
            widths: vec![5, 9, 16],
            condition: 0,
        };
        let monai = MonaiUnetConfig {
            in_channels: 1,
            out_channels: 3,
            widths: vec![4, 6, 8],
            strides: vec![2, 2],
            residual_units: 2,
        };
        let [nnunet, swin] = networks(&device);
        let all = [
            unet.init(&device, 1).into(),
            Network::new(Body::MonaiUnet(monai.init(&device, 1)), [4; 3], Adapter::default()),
            nnunet,
            swin,
        ];
        for network in all {
            let together = network.forward(x.clone());
            let is_alike = (0..3).all(|sample| {
                let alone = network.forward(x.clone().narrow(0, sample, 1)).into_data();
                together.clone().narrow(0, sample, 1).into_data() == alone
            });
            assert!(is_alike || !network.ignores_batch_mates(), "{:?}", network.body);
        }
    }

    #[test]
    fn adapters_that_do_not_fit_are_refused_by_key() {
        let adapter = Adapter::default();
        assert_eq!(adapter.refusal(3, 3), None);
        assert!(adapter.refusal(3, 7).unwrap().starts_with("outputs: expected 7"));
        let refused = |change: fn(&mut Adapter)| {
            let mut adapter = Adapter::default();
            change(&mut adapter);
            adapter.refusal(3, 3).unwrap()
        };
        assert!(refused(|a| a.axes = [0, 0, 1]).starts_with("axes"));
        assert!(refused(|a| a.outputs = Some(vec![Some(0), Some(3), None])).starts_with("outputs"));
        let intensity = |sd| Standardised {
            low: 0.0,
            high: 1.0,
            mean: 0.5,
            sd,
        };
        for sd in [0.0, f64::NAN] {
            let adapter = Adapter {
                intensity: Some(intensity(sd)),
                ..Adapter::default()
            };
            assert!(adapter.refusal(3, 3).unwrap().starts_with("intensity"));
        }
    }
}
