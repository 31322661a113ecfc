//! Operators and a small U-Net against tensors that another framework computed in float64 (`golden/nn/make.py`).

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Gradients, Tensor, TensorData, activation};
use freetumor::kernel;
use freetumor::nn::{Condition, ContrastOver, GeneratorConfig, Unet, UnetConfig};
use freetumor::rng::{Purpose, Rng};

#[path = "common/golden.rs"]
mod golden;

use golden::{Golden, assert_close, flat, numbers, tensor};

fn golden() -> Golden {
    golden::read(include_bytes!("golden/nn/golden.safetensors"))
}

#[track_caller]
fn check<const N: usize>(name: &str, f: impl Fn([Tensor<5>; N]) -> Tensor<5>) {
    golden::check(&golden(), name, f);
}

#[test]
fn convolutions() {
    check("conv3", |[x, w, b]| kernel::conv3d(x, w, flat(b), 1));
    check("conv1", |[x, w, b]| kernel::conv3d(x, w, flat(b), 1));
    check("conv3s2", |[x, w, b]| kernel::conv3d(x, w, flat(b), 2));
    check("transpose", |[x, w, b]| kernel::conv_transpose3d_k2s2(x, w, flat(b)));
}

#[test]
fn norm_and_pool() {
    check("norm", |[x, g, b]| {
        kernel::instance_norm_leaky_relu(x, g.reshape([2, 3]), b.reshape([2, 3]), 0.01)
    });
    check("pool", |[x]| kernel::max_pool3d_k2(x));
}

/// Replaces parameters by the golden ones, in the order of the module's fields.
struct Fill<'a>(&'a Golden, usize);

impl ModuleMapper for Fill<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = format!("unet.param{:02}", self.1);
        self.1 += 1;
        param.map(|old| {
            let new = tensor::<D>(self.0, &name, &old.device());
            assert_eq!(old.dims(), new.dims(), "{name}");
            new.require_grad()
        })
    }
}

/// Takes the gradients of all parameters, in the same order.
struct Take<'a>(&'a Gradients, Vec<Vec<f32>>);

impl ModuleVisitor for Take<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1
            .push(numbers(param.val().grad(self.0).expect("every parameter is trained")));
    }
}

#[test]
fn unet_logits_loss_and_gradients() {
    let golden = golden();
    let device = Device::flex().autodiff();
    let config = UnetConfig {
        in_channels: 2,
        out_channels: 3,
        widths: vec![4, 6],
        condition: 2,
    };
    let fill = &mut Fill(&golden, 0);
    let net = config.init(&device, 1).map(fill);
    assert!(
        !golden.contains_key(&format!("unet.param{:02}", fill.1)),
        "all parameters are used"
    );
    let condition = tensor::<2>(&golden, "unet.condition", &device);
    let logits = net.forward(tensor(&golden, "unet.x", &device), Some(&condition));
    // Six convolutions deep, relative to the largest logit.
    assert_close(&golden, "unet.logits", &numbers(logits.clone()), 1e-5);
    let loss = cross_entropy(logits, tensor(&golden, "unet.one_hot", &device));
    assert_close(&golden, "unet.loss", &numbers(loss.clone()), 1e-6);
    let grads = loss.backward();
    let mut take = Take(&grads, Vec::new());
    net.visit(&mut take);
    for (i, gradient) in take.1.iter().enumerate() {
        let name = format!("unet.grad{i:02}");
        // A bias in front of a norm has no effect: its gradient is rounding noise on both sides.
        if golden[&name].1.iter().all(|v| v.abs() < 1e-9) {
            assert!(gradient.iter().all(|v| v.abs() < 1e-6), "{name}");
            continue;
        }
        assert_close(&golden, &name, gradient, 3e-5);
    }
}

fn cross_entropy(logits: Tensor<5>, one_hot: Tensor<5>) -> Tensor<1> {
    -(activation::log_softmax(logits, 1) * one_hot).sum_dim(1).mean()
}

/// Finds a bright ball in noise: the smallest task of the critic's kind.
fn toy(device: &Device, seed: u64) -> (Tensor<5>, Tensor<5>) {
    let side = 16;
    let mut x = Rng::keyed(seed, 0, 0, Purpose::Test).normals(2 * side * side * side);
    let mut one_hot = vec![0.0_f32; 2 * x.len()];
    let centre = [6.0 + (seed % 4) as f64, 8.0, 7.0];
    let voxels = side * side * side;
    for (at, value) in x.iter_mut().enumerate() {
        let [n, v] = [at / voxels, at % voxels];
        let zyx = [v / (side * side), v / side % side, v % side];
        let distance: f64 = zyx.iter().zip(centre).map(|(&a, c)| (a as f64 - c).powi(2)).sum();
        let inside = distance < 20.0 + 10.0 * n as f64;
        *value += 2.0 * f32::from(u8::from(inside));
        one_hot[(2 * n + usize::from(inside)) * voxels + v] = 1.0;
    }
    let make = |values: Vec<f32>, c| Tensor::from_data(TensorData::new(values, [2, c, side, side, side]), device);
    (make(x, 1), make(one_hot, 2))
}

fn train(steps: u64) -> (Vec<f32>, Unet) {
    let device = Device::flex().autodiff();
    let config = UnetConfig {
        in_channels: 1,
        out_channels: 2,
        widths: vec![8, 16],
        condition: 0,
    };
    let mut net = config.init(&device, 3);
    let mut adam = AdamConfig::new().init();
    let mut losses = Vec::new();
    for step in 0..steps {
        let (x, one_hot) = toy(&device, step);
        let loss = cross_entropy(net.forward(x, None), one_hot);
        losses.push(loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &net);
        net = adam.step(3e-3, net, grads);
    }
    (losses, net)
}

#[test]
fn thirty_adam_steps_learn_a_ball() {
    let (losses, _) = train(30);
    let mean = |l: &[f32]| l.iter().sum::<f32>() / l.len() as f32;
    let (first, last) = (mean(&losses[..3]), mean(&losses[27..]));
    assert!(last < 0.5 * first, "from {first} to {last}");
}

#[test]
fn training_ignores_threads() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (losses, net) = train(4);
            let (x, _) = toy(&Device::flex().autodiff(), 9);
            (losses, numbers(net.forward(x, None)))
        })
    };
    assert_eq!(run(1), run(2));
}

#[test]
fn generator_ignores_batch_mates_and_threads() {
    let device = Device::flex();
    let config = GeneratorConfig {
        widths: vec![8, 16],
        organs: 3,
        spread_hu: 40.0,
        contrast_over: ContrastOver::Lesion,
    };
    let net = config.init(&device, 5);
    let (batch, side) = (3, 12);
    let voxels = side * side * side;
    let draw = |purpose| Rng::keyed(1, 0, 0, purpose).normals(batch * voxels);
    let (image, noise) = (draw(Purpose::Test), draw(Purpose::Noise));
    let mask: Vec<f32> = draw(Purpose::Shape).iter().map(|v| v.clamp(0.0, 1.0)).collect();
    let conditions: Vec<f32> = (0..batch)
        .flat_map(|organ| {
            let condition = Condition {
                organ,
                diameter_mm: 15.0 + 7.0 * organ as f64,
                contrast_hu: -30.0 * organ as f64,
            };
            condition.vector(3)
        })
        .collect();
    let run = |samples: std::ops::Range<usize>| {
        let n = samples.len();
        let part = |v: &[f32]| {
            let values = v[samples.start * voxels..samples.end * voxels].to_vec();
            Tensor::<5>::from_data(TensorData::new(values, [n, 1, side, side, side]), &device)
        };
        let k = conditions.len() / batch;
        let condition = conditions[samples.start * k..samples.end * k].to_vec();
        let condition = Tensor::<2>::from_data(TensorData::new(condition, [n, k]), &device);
        let contrast: Vec<f32> = samples.clone().map(|s| 25.0 * s as f32 - 30.0).collect();
        let contrast = Tensor::<1>::from_data(TensorData::new(contrast, [n]), &device);
        numbers(net.forward(part(&image), part(&mask), part(&noise), contrast, &condition))
    };
    let all = run(0..batch);
    for sample in 0..batch {
        assert_eq!(run(sample..sample + 1), all[sample * voxels..(sample + 1) * voxels]);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(pool.install(|| run(0..batch)), all);
}
