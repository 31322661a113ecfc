//! What is measured: operators and networks at the sizes at which they are used; `benches/peers/torch_nn.py` has the same.

use std::hint::black_box;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

use crate::cli::device::Compute;
use crate::kernel::{self, Upsampling};
use crate::learn::{Optimizer, OptimizerSettings};
use crate::nn::{Published, PublishedConfig, Unet, UnetConfig};
use crate::rng::{Purpose, Rng};

/// One thing to measure.
pub(super) struct Entry {
    /// Its name: what, size, and `forward`, `both` (forward and all gradients) or `step` (of training).
    pub(super) name: String,
    /// Billions of operations of one run, where they are counted.
    pub(super) gflop: Option<f64>,
    /// Makes the inputs and returns the run.
    pub(super) prepare: Box<dyn Fn() -> Box<dyn FnMut()>>,
}

/// An operator of tensors, the first of which is the input, the others its parameters.
type Operator = fn(&[Tensor<5>]) -> Tensor<5>;

/// Returns all entries, small ones first so that peak memory grows.
pub(super) fn all(compute: &Compute) -> Vec<Entry> {
    let mut entries = operators(compute);
    entries.extend(networks(compute));
    entries
}

fn operators(compute: &Compute) -> Vec<Entry> {
    let mut entries = convolutions(compute);
    let mut add = |name: &str, shapes: &[[usize; 5]], run: Operator| {
        entries.extend(operator(compute, (name, None), shapes, run));
    };
    let norm: Operator = |t| {
        let row = |t: &Tensor<5>| vector(t).unsqueeze::<2>();
        kernel::instance_norm_leaky_relu(t[0].clone(), row(&t[1]), row(&t[2]), 0.01)
    };
    let pool: Operator = |t| kernel::max_pool3d_k2(t[0].clone());
    let nearest: Operator = |t| kernel::upsample3d_x2(t[0].clone(), Upsampling::Nearest);
    let trilinear: Operator = |t| {
        let how = Upsampling::Trilinear { align_corners: false };
        kernel::upsample3d_x2(t[0].clone(), how)
    };
    let (fine, coarse) = ([1, 32, 48, 48, 48], [1, 32, 24, 24, 24]);
    add("norm_act_c32_48", &[fine, [32, 1, 1, 1, 1], [32, 1, 1, 1, 1]], norm);
    add("max_pool_c32_48", &[fine], pool);
    add("nearest_c32_24", &[coarse], nearest);
    add("trilinear_c32_24", &[coarse], trilinear);
    entries
}

fn convolutions(compute: &Compute) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut add = |name: String, shapes: [[usize; 5]; 3], outputs: usize, run: Operator| {
        // Every number of the weight meets every voxel of the output; of a transposed convolution, of the input.
        let products = shapes[1].iter().product::<usize>() * outputs;
        entries.extend(operator(compute, (&name, Some(gflop(products as u64))), &shapes, run));
    };
    let shapes =
        |[ci, co]: [usize; 2], k: usize, side: usize| [[1, ci, side, side, side], [co, ci, k, k, k], [co, 1, 1, 1, 1]];
    let same: Operator = |t| kernel::conv3d(t[0].clone(), t[1].clone(), vector(&t[2]), 1);
    let halving: Operator = |t| kernel::conv3d(t[0].clone(), t[1].clone(), vector(&t[2]), 2);
    let doubling: Operator = |t| kernel::conv_transpose3d_k2s2(t[0].clone(), t[1].clone(), vector(&t[2]));
    let cube = |side: usize| side.pow(3);
    for (c, side) in [(128, 12), (64, 24), (32, 48), (16, 96)] {
        let name = format!("conv3d_c{c}_{side}");
        add(name, shapes([c, c], 3, side), cube(side), same);
    }
    add("conv1_c32_48".into(), shapes([32, 32], 1, 48), cube(48), same);
    for (c, side) in [(64, 24), (32, 48)] {
        let name = format!("conv3d_s2_c{c}_{side}");
        add(name, shapes([c, 2 * c], 3, side), cube(side / 2), halving);
    }
    for (c, side) in [(128, 6), (64, 12), (32, 24)] {
        let name = format!("transposed_c{c}_{side}");
        add(name, shapes([c, c], 2, side), cube(side), doubling);
    }
    entries
}

/// Returns an operator's two entries.
fn operator(compute: &Compute, (name, gflop): (&str, Option<f64>), shapes: &[[usize; 5]], run: Operator) -> [Entry; 2] {
    let Compute { device, dtype } = compute.clone();
    let inputs = move |device: &Device, shapes: &[[usize; 5]]| -> Vec<Tensor<5>> {
        let mut tensors: Vec<_> = shapes.iter().map(|shape| normals(*shape, device)).collect();
        tensors[0] = dtype.enter(tensors[0].clone());
        tensors
    };
    let (forward_shapes, shapes) = (shapes.to_vec(), shapes.to_vec());
    let with_gradients = device.clone().autodiff();
    let forward = Entry {
        name: format!("{name}_forward"),
        gflop,
        prepare: Box::new(move || {
            let inputs = inputs(&device, &forward_shapes);
            Box::new(move || drop(black_box(run(&inputs))))
        }),
    };
    let both = Entry {
        name: format!("{name}_both"),
        gflop: gflop.map(|g| 3.0 * g),
        prepare: Box::new(move || {
            let inputs = inputs(&with_gradients, &shapes);
            let inputs: Vec<_> = inputs.into_iter().map(Tensor::require_grad).collect();
            // Of a tensor that is no scalar, `backward` takes the gradient to be 1 everywhere.
            Box::new(move || drop(black_box(run(&inputs).backward())))
        }),
    };
    [forward, both]
}

fn networks(compute: &Compute) -> Vec<Entry> {
    let dtype = compute.dtype;
    let unet = |out_channels: usize, widths: &[usize]| UnetConfig {
        in_channels: 1,
        out_channels,
        widths: widths.to_vec(),
        condition: 0,
    };
    // The critic of `configs/demo.toml`, and the widths of MONAI's `BasicUNet`.
    let nets = [
        ("demo_unet", 64, unet(7, &[12, 24, 48, 64])),
        ("basicunet", 96, unet(2, &[32, 32, 64, 128, 256])),
    ];
    let mut entries: Vec<Entry> = nets
        .into_iter()
        .flat_map(|(name, side, config)| {
            let network = Network {
                name: format!("{name}_{side}"),
                side,
                out_channels: config.out_channels,
                gflop: gflop(multiply_adds(&config, side)),
            };
            let init = move |device: &Device| config.init(device, 1).with_compute_dtype(dtype);
            network.entries(&compute.device, init, |net: &Unet, x| net.forward(x, None))
        })
        .collect();
    let generator = PublishedConfig::generator(PublishedConfig::PUBLISHED_WIDTH, 3);
    let side = 96;
    let network = Network {
        name: format!("generator_{side}"),
        side,
        out_channels: generator.out_channels,
        gflop: gflop(generator.multiply_adds(side)),
    };
    let init = move |device: &Device| generator.init(device, 1).with_compute_dtype(dtype);
    entries.extend(network.entries(&compute.device, init, |net: &Published, x| net.forward(x)));
    entries
}

/// A network on one cube.
struct Network {
    name: String,
    side: usize,
    out_channels: usize,
    gflop: f64,
}

impl Network {
    /// Returns the entries of inference and of a training step.
    fn entries<M: Module + 'static>(
        self,
        device: &Device,
        init: impl Fn(&Device) -> M + Clone + 'static,
        run: fn(&M, Tensor<5>) -> Tensor<5>,
    ) -> [Entry; 2] {
        let cube = move |channels| [1, channels, self.side, self.side, self.side];
        let (init_forward, plain, with_gradients) = (init.clone(), device.clone(), device.clone().autodiff());
        let forward = Entry {
            name: format!("{}_forward", self.name),
            gflop: Some(self.gflop),
            prepare: Box::new(move || {
                let (net, x) = (init_forward(&plain), normals(cube(1), &plain));
                Box::new(move || drop(black_box(run(&net, x.clone()))))
            }),
        };
        let out_channels = self.out_channels;
        let step = Entry {
            name: format!("{}_step", self.name),
            gflop: Some(3.0 * self.gflop),
            prepare: Box::new(move || {
                let device = &with_gradients;
                let (x, target) = (normals(cube(1), device), normals(cube(out_channels), device));
                let mut net = init(device);
                let mut optimizer = Optimizer::new(OptimizerSettings::default());
                Box::new(move || {
                    let loss = (run(&net, x.clone()) - target.clone()).powi_scalar(2).mean();
                    net = optimizer.step(net.clone(), &loss.backward(), 1e-4).0;
                })
            }),
        };
        [forward, step]
    }
}

/// Returns how many multiply-adds one forward pass of a U-Net takes.
fn multiply_adds(config: &UnetConfig, side: usize) -> u64 {
    let widths = &config.widths;
    let voxels = |level: usize| (side >> level).pow(3);
    let double = |from: usize, to: usize| 27 * (from * to + to * to);
    let mut sum = double(config.in_channels, widths[0]) * voxels(0);
    for level in 1..widths.len() {
        let (coarse, fine) = (widths[level], widths[level - 1]);
        sum += double(fine, coarse) * voxels(level);
        // Every voxel of a doubled grid comes from one voxel and one of the eight kernel positions.
        sum += (coarse * fine + double(2 * fine, fine)) * voxels(level - 1);
    }
    (sum + widths[0] * config.out_channels * voxels(0)) as u64
}

fn gflop(multiply_adds: u64) -> f64 {
    2e-9 * multiply_adds as f64
}

fn vector(t: &Tensor<5>) -> Tensor<1> {
    t.clone().flatten(0, 4)
}

fn normals(shape: [usize; 5], device: &Device) -> Tensor<5> {
    let values = Rng::keyed(1, 0, 0, Purpose::Weights).normals(shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_basic_unet_has_monais_size() {
        let config = UnetConfig {
            in_channels: 1,
            out_channels: 2,
            widths: vec![32, 32, 64, 128, 256],
            condition: 0,
        };
        // `sum(p.numel() for p in BasicUNet(3, 1, 2).parameters())`, MONAI 1.3.
        assert_eq!(config.init(&Device::flex(), 1).num_params(), 5_749_410);
        // What hooks in PyTorch count, layer by layer: `torch_nn.py --count`.
        assert_eq!(multiply_adds(&config, 32), 4_672_192_512);
    }

    #[test]
    fn every_operator_runs() {
        for entry in operators(&Compute::cpu())
            .into_iter()
            .filter(|entry| entry.name.contains("128") || entry.gflop.is_none())
        {
            (entry.prepare)()();
        }
    }
}
