//! Ten training steps of a small U-Net against PyTorch (`golden/training/make.py`): losses, gradients, weights.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use freetumor::checkpoint::{Weight, Weights, collect, fill};
use freetumor::learn::{Optimizer, OptimizerSettings, Rule};
use freetumor::nn::{DiceOver, LossForm, Targets, Unet, UnetConfig, deep_supervision_loss, marginal_loss};
use freetumor::volume::ClassSet;

#[path = "common/golden.rs"]
mod golden;

use golden::{Golden, assert_close, tensor};

const STEPS: usize = 10;

fn under(golden: &Golden, prefix: &str) -> Weights {
    let found = golden.iter().filter_map(|(name, (shape, values))| {
        let (shape, values) = (shape.clone(), values.clone());
        Some((name.strip_prefix(prefix)?.to_string(), Weight { shape, values }))
    });
    found.collect()
}

fn start(golden: &Golden, device: &Device) -> Unet {
    let config = UnetConfig {
        in_channels: 1,
        out_channels: 3,
        widths: vec![4, 8],
        condition: 0,
    };
    fill(config.init(device, 1), under(golden, "start/")).expect("the golden weights are this network's")
}

fn loss(golden: &Golden, net: &Unet, step: usize, device: &Device) -> Tensor<1> {
    let images = tensor::<6>(golden, "images", device);
    let image = images.narrow(0, step, 1).squeeze_dim::<5>(0);
    let sets = &golden["sets"].1;
    let voxels = sets.len() / STEPS;
    let sets = sets[step * voxels..(step + 1) * voxels]
        .iter()
        .map(|bits| ClassSet(*bits as _));
    marginal_loss(
        net.forward(image, None),
        &Targets::new(sets.collect()),
        LossForm::default(),
    )
}

/// Takes the gradient of every parameter by its name.
struct Take<'a>(&'a Gradients, Vec<String>, Vec<(String, Vec<f32>)>);

impl ModuleVisitor for Take<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad(self.0).expect("every parameter is trained");
        self.2.push((self.1.join("."), golden::numbers(gradient)));
    }
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.1.push(name.into());
    }
    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.1.pop();
    }
}

#[test]
fn the_first_gradients_are_pytorch_s() {
    let golden = golden::read(include_bytes!("golden/training/golden.safetensors"));
    let device = Device::flex().autodiff();
    let net = start(&golden, &device);
    let gradients = loss(&golden, &net, 0, &device).backward();
    let mut take = Take(&gradients, Vec::new(), Vec::new());
    net.visit(&mut take);
    assert_eq!(take.2.len(), under(&golden, "gradient/").len());
    for (name, gradient) in &take.2 {
        let name = format!("gradient/{name}");
        // A bias in front of a norm has no effect: its gradient is rounding noise on both sides.
        if golden[&name].1.iter().all(|v| v.abs() < 1e-9) {
            assert!(gradient.iter().all(|v| v.abs() < 1e-6), "{name}");
            continue;
        }
        // Sums over 3456 voxels in single precision, relative to the largest.
        assert_close(&golden, &name, gradient, 3e-5);
    }
}

#[test]
fn ten_steps_have_pytorch_s_losses_and_end_at_its_weights() {
    let golden = golden::read(include_bytes!("golden/training/golden.safetensors"));
    let device = Device::flex().autodiff();
    let (adam, sgd) = (OptimizerSettings::default(), Rule::Sgd);
    let sgd = OptimizerSettings {
        rule: sgd,
        weight_decay: 3e-5,
        ..adam.clone()
    };
    for (rule, settings, rate) in [("adam", adam, 3e-3), ("sgd", sgd, 1e-2)] {
        let mut net = start(&golden, &device);
        let mut optimizer = Optimizer::new(settings);
        for step in 0..STEPS {
            let loss = loss(&golden, &net, step, &device);
            let value = loss.clone().into_scalar::<f32>();
            let (moved, norm) = optimizer.step(net, &loss.backward(), rate);
            net = moved;
            for (kind, got) in [("losses", value), ("norms", norm as f32)] {
                let want = golden[&format!("{rule}/{kind}")].1[step];
                // Single against double precision: at most 3e-7 with AVX2, and room for other instruction sets.
                assert!(
                    (got - want).abs() <= 1e-5 * want,
                    "{rule} step {step} {kind}: {got}, PyTorch {want}"
                );
            }
        }
        for (name, weight) in collect(&net) {
            // Adam moves the biases in front of norms by the sign of rounding noise; they have no effect.
            let is_idle = name.ends_with("first.bias") || name.ends_with("second.bias");
            if !is_idle {
                assert_close(&golden, &format!("{rule}/end/{name}"), &weight.values, 1e-4);
            }
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_monai_and_nnu_net() {
    let golden = golden::read(include_bytes!("golden/training/losses.safetensors"));
    let device = Device::flex().autodiff();
    let labels = golden["labels"].1.iter().map(|label| ClassSet::of(*label as u8));
    let targets = Targets::new(labels.collect());
    let (batch, sample) = (DiceOver::Batch, DiceOver::Sample);
    // nnU-Net's Dice is minus the overlap, where ours and MONAI's is 1 minus it.
    let forms = [
        ("monai_background_batch", batch, true, 0.0),
        ("monai_background_sample", sample, true, 0.0),
        ("monai_foreground_batch", batch, false, 0.0),
        ("monai_foreground_sample", sample, false, 0.0),
        ("nnunet_batch", batch, false, -1.0),
        ("nnunet_sample", sample, false, -1.0),
    ];
    for (name, dice, background, shift) in forms {
        let form = LossForm {
            balance: 0.0,
            dice,
            background,
            absent: true,
        };
        let logits = tensor::<5>(&golden, "logits", &device).require_grad();
        let loss = marginal_loss(logits.clone(), &targets, form);
        let gradient = logits.grad(&loss.backward()).expect("the logits are differentiated");
        let value = loss.into_scalar::<f32>() + shift;
        let want = golden[&format!("{name}/loss")].1[0];
        // Single against double precision over 672 voxels.
        assert!(
            (value - want).abs() < 2e-6 * want.abs().max(1.0),
            "{name}: {value}, expected {want}"
        );
        assert_close(&golden, &format!("{name}/gradient"), &golden::numbers(gradient), 2e-5);
    }
}

#[test]
fn deep_supervision_is_nnu_net_s() {
    let golden = golden::read(include_bytes!("golden/training/deep.safetensors"));
    let device = Device::flex().autodiff();
    let labels = golden["labels"].1.iter().map(|label| ClassSet::of(*label as u8));
    let targets = Targets::new(labels.collect());
    let form = LossForm {
        balance: 0.0,
        dice: DiceOver::Batch,
        background: false,
        absent: true,
    };
    let logits: Vec<Tensor<5>> = (0..4)
        .map(|i| tensor::<5>(&golden, &format!("logits/{i}"), &device).require_grad())
        .collect();
    let loss = deep_supervision_loss(logits.clone(), &targets, form);
    let gradients = loss.backward();
    // nnU-Net's Dice is minus the overlap, where ours is 1 minus it; the weights' sum is 1.
    let value = loss.into_scalar::<f32>() - 1.0;
    let want = golden["loss"].1[0];
    // Single against double precision over 4480 voxels.
    assert!((value - want).abs() < 2e-6, "{value}, expected {want}");
    for (i, logits) in logits.iter().enumerate().take(3) {
        let gradient = logits.grad(&gradients).expect("three resolutions count");
        assert_close(&golden, &format!("gradient/{i}"), &golden::numbers(gradient), 2e-5);
    }
    assert!(
        logits[3].grad(&gradients).is_none(),
        "the coarsest resolution does not count"
    );
}
