//! The published mode against the output of the released code, its errors corrected (the golden tensors' own corrections).

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, FloatDType, Gradients, Int, Tensor, TensorData};
use freetumor::checkpoint::{Architecture, Weight, Weights, collect, fill, source_name};
use freetumor::nn::{
    OutputActivation, Published, PublishedConfig, PublishedScene, SwinUnetr, SwinUnetrConfig, published_adversarial,
    published_discrimination, published_missing, published_residual,
};

#[path = "common/formula.rs"]
mod formula;
#[path = "common/npz.rs"]
mod npz;

type Golden = std::collections::BTreeMap<String, npz::Array>;

/// Label ids of the golden tensors: 1, 3, 5 organs, one more their tumours.
const TUMOURS: [usize; 3] = [2, 4, 6];
/// The generator as the golden tensors hold its output: before the hyperbolic tangent.
const RAW: PublishedConfig = PublishedConfig {
    width: PublishedConfig::PUBLISHED_WIDTH,
    in_channels: 1,
    out_channels: 3,
    activation: OutputActivation::None,
};

/// Fills a network with the weights that follow from their names.
fn by_formula<M: Module>(net: M, architecture: &Architecture, prefix: &str) -> M {
    let weights: Weights = collect(&net)
        .into_iter()
        .map(|(name, Weight { shape, .. })| {
            let values = formula::values(&format!("{prefix}{}", source_name(architecture, &name)), &shape);
            (name, Weight { shape, values })
        })
        .collect();
    fill(net, weights).expect("every parameter has its shape")
}

/// Makes a tensor of golden numbers, with leading axes of 1 where there are fewer than five.
fn tensor(values: &[f32], shape: &[usize], device: &Device) -> Tensor<5> {
    let mut padded = vec![1; 5 - shape.len()];
    padded.extend(shape);
    Tensor::from_data(TensorData::new(values.to_vec(), padded), device)
}

fn of(golden: &Golden, name: &str, device: &Device) -> Tensor<5> {
    tensor(&golden[name].values, &golden[name].shape, device)
}

fn numbers<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_to_vec().expect("tensors of f32")
}

/// Asserts that no number differs by more than the golden tensors' own tolerance.
#[track_caller]
fn assert_within(name: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (at, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "{name}: {at}: {a} instead of {b}");
    }
}

/// Marks each organ's healthy tissue in a channel of its own.
fn healthy(labels: &npz::Array, device: &Device) -> Tensor<5> {
    let batch = if labels.shape.len() == 5 { labels.shape[0] } else { 1 };
    let shape = &labels.shape[labels.shape.len() - 3..];
    let voxels: usize = shape.iter().product();
    let marks = labels.values.chunks_exact(voxels).flat_map(|sample| {
        let organs = [1.0, 3.0, 5.0].into_iter();
        organs.flat_map(move |organ| sample.iter().map(move |label| f32::from(u8::from(*label == organ))))
    });
    tensor(&marks.collect::<Vec<_>>(), &[&[batch, 3], shape].concat(), device)
}

/// Keeps one class of label3, 1 inside.
fn mask(labels: &npz::Array, class: f32, device: &Device) -> Tensor<5> {
    let marks: Vec<f32> = labels.values.iter().map(|v| f32::from(u8::from(*v == class))).collect();
    tensor(&marks, &labels.shape, device)
}

#[test]
fn the_output_is_that_of_the_released_code() {
    let Some(golden) = npz::golden("01_unet3d.npz") else {
        return;
    };
    let device = Device::flex();
    let net = by_formula(RAW.init(&device, 1), &Architecture::Published(RAW), "netG.");
    let y = numbers(net.forward(of(&golden, "x", &device)));
    // The batch of two against the samples that the released code ran one at a time: our norm never mixes them. The golden
    // tensors' own tolerance: their float32 and float64 runs differ by 2e-5 here.
    assert_within("y_single", &y, &golden["y_single"].values, 2e-4);
    let mixed = numbers(net.forward_over_batch(of(&golden, "x", &device)));
    assert_within("y", &mixed, &golden["y"].values, 2e-4);
}

#[test]
fn every_organ_has_the_channel_of_its_own_and_the_residual_is_smooth() {
    let Some(golden) = npz::golden("02_masked_blur.npz") else {
        return;
    };
    let device = Device::flex();
    let generated = of(&golden, "g", &device).tanh();
    let residual = published_residual(generated, healthy(&golden["label7"], &device));
    assert_within("blurred", &numbers(residual), &golden["blurred"].values, 2e-6);
}

#[test]
fn the_equation_is_the_published_one() {
    let Some(golden) = npz::golden("03_synthesis.npz") else {
        return;
    };
    let device = Device::flex();
    for case in ["liver", "pancreas", "kidney", "overlap", "multi"] {
        let of = |part: &str| of(&golden, &format!("{case}_{part}"), &device);
        let generated = of("g").reshape([1, 3, 16, 20, 12]).tanh();
        let residual = published_residual(generated, healthy(&golden[&format!("{case}_label7")], &device));
        let expected = |part: &str| &golden[&format!("{case}_{part}")].values;
        assert_within(case, &numbers(residual.clone()), expected("residual"), 2e-6);
        let scene = PublishedScene {
            soft: of("mask_blur"),
            texture: of("texture"),
            host: mask(&golden[&format!("{case}_label3_in")], 1.0, &device),
        };
        let painted = of("image") + scene.change(residual);
        assert_within(case, &numbers(painted), expected("fake_image"), 3e-6);
    }
}

#[test]
fn losses_and_their_gradients_are_the_published_ones() {
    let Some(golden) = npz::golden("04a_losses_pure.npz") else {
        return;
    };
    let device = Device::flex().autodiff();
    let value = |name: &str| golden[name].values[0];
    let check = |name: &str, loss: &Tensor<1>| assert_within(name, &numbers(loss.clone()), &[value(name)], 1e-6);
    let logits = || {
        let [d, s] = ["d_logits", "s_logits"].map(|name| of(&golden, name, &device).require_grad());
        (d, s)
    };
    for (suffix, lesion, real) in [("", 3.0, 2.0), ("_nofake", 9.0, 2.0), ("_noreal", 3.0, 9.0)] {
        let [lesion, real] = [lesion, real].map(|class| mask(&golden["fake_label3"], class, &device));
        let (d, s) = logits();
        check(
            &format!("loss_adv{suffix}"),
            &published_adversarial(d.clone(), lesion.clone()),
        );
        check(
            &format!("loss_seg{suffix}"),
            &published_missing(s, &TUMOURS, lesion.clone()),
        );
        check(&format!("loss_dis{suffix}"), &published_discrimination(d, lesion, real));
    }
    let [lesion, real] = [3.0, 2.0].map(|class| mask(&golden["fake_label3"], class, &device));
    let gradient = |logits: &Tensor<5>, grads: &Gradients, name: &str| {
        let got = numbers(logits.grad(grads).expect("the logits are differentiated"));
        assert_within(name, &got, &golden[name].values, 1e-8);
    };
    let (d, s) = logits();
    let missing = published_missing(s.clone(), &TUMOURS, lesion.clone());
    let loss = missing + published_adversarial(d.clone(), lesion.clone()) * 0.1;
    check("loss_gen", &loss);
    let grads = loss.backward();
    gradient(&s, &grads, "grad_gen_s_logits");
    gradient(&d, &grads, "grad_gen_d_logits");
    let (d, _) = logits();
    let grads = published_discrimination(d.clone(), lesion, real).backward();
    gradient(&d, &grads, "grad_dis_d_logits");
}

/// Blurs a mask as the released code does: radius 4 sigma, the border mirrored.
fn blurred(mask: &[f32], side: usize, sigma: f64) -> Vec<f32> {
    let radius = (4.0 * sigma + 0.5) as i64;
    let weights: Vec<f64> = (-radius..=radius)
        .map(|i| (-0.5 * (i as f64 / sigma).powi(2)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut values: Vec<f64> = mask.iter().map(|v| f64::from(*v)).collect();
    for stride in [side * side, side, 1] {
        let old = values.clone();
        for (at, value) in values.iter_mut().enumerate() {
            let i = (at / stride % side) as i64;
            let n = side as i64;
            let mirrored = |j: i64| {
                if j < 0 {
                    -j - 1
                } else if j >= n {
                    2 * n - 1 - j
                } else {
                    j
                }
            };
            let terms = (-radius..=radius).zip(&weights);
            let sum = terms.map(|(k, w)| w * old[(at as i64 + (mirrored(i + k) - i) * stride as i64) as usize]);
            *value = sum.sum::<f64>() / total;
        }
    }
    values.into_iter().map(|v| v as f32).collect()
}

/// Takes the gradients of some parameters, named as in the released code.
struct Take<'a> {
    grads: &'a Gradients,
    architecture: Architecture,
    prefix: &'static str,
    path: Vec<String>,
    found: Golden,
}

impl ModuleVisitor for Take<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad(self.grads).expect("every parameter is trained");
        let name = format!(
            "{}{}",
            self.prefix,
            source_name(&self.architecture, &self.path.join("."))
        );
        let shape = gradient.dims().to_vec();
        let values = numbers(gradient);
        self.found.insert(name, npz::Array { shape, values });
    }
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
}

/// Hosts, masks and texture of a whole step, and the generator that paints.
struct Step {
    generator: Published,
    image: Tensor<5>,
    healthy: Tensor<5>,
    scene: PublishedScene,
    lesion: Tensor<5>,
    real: Tensor<5>,
}

impl Step {
    fn new(golden: &Golden, device: &Device, dtype: FloatDType) -> Self {
        let labels = &golden["label7"];
        let mask_of = |keep: &dyn Fn(f32, f32) -> bool| -> Vec<f32> {
            let voxels = labels.values.iter().zip(&golden["geo"].values);
            voxels
                .map(|(label, geo)| f32::from(u8::from(keep(*label, *geo))))
                .collect()
        };
        let lesion = mask_of(&|label, geo| label >= 1.0 && geo > 0.0);
        let side = labels.shape[4];
        let samples = lesion.chunks_exact(side.pow(3)).zip(&golden["sigma"].values);
        let soft: Vec<f32> = samples
            .flat_map(|(lesion, sigma)| blurred(lesion, side, f64::from(*sigma)))
            .collect();
        let host = mask_of(&|label, _| label % 2.0 == 1.0);
        let [lesion, real] = [3.0, 2.0].map(|class| mask(&golden["fake_label3"], class, device).cast(dtype));
        Self {
            generator: by_formula(RAW.init(device, 1), &Architecture::Published(RAW), "netG."),
            image: of(golden, "image", device).cast(dtype),
            healthy: healthy(labels, device).cast(dtype),
            scene: PublishedScene {
                soft: tensor(&soft, &labels.shape, device).cast(dtype),
                texture: of(golden, "texture", device).cast(dtype),
                host: tensor(&host, &labels.shape, device).cast(dtype),
            },
            lesion,
            real,
        }
    }

    /// Normalises as the released code does: a batch of one is the same either way.
    fn painted(&self) -> Tensor<5> {
        let generated = self.generator.forward_over_batch(self.image.clone()).tanh();
        self.image.clone() + self.scene.change(published_residual(generated, self.healthy.clone()))
    }

    /// Compares the gradients of some of the generator's parameters.
    #[track_caller]
    fn compare(&self, grads: &Gradients, golden: &Golden, names: [&str; 2], most: [f64; 2]) {
        assert_eq!(compare((&self.generator, "netG."), grads, golden, names, most), 3);
    }
}

/// Compares the gradients of those of a network's parameters that the golden tensors have: relative L2 distance and 1 - cosine. Returns
/// how many they are.
#[track_caller]
fn compare(
    (net, network): (&Published, &'static str),
    grads: &Gradients,
    golden: &Golden,
    [prefix, suffix]: [&str; 2],
    [most, apart]: [f64; 2],
) -> usize {
    let mut take = Take {
        grads,
        architecture: Architecture::Published(RAW),
        prefix: network,
        path: Vec::new(),
        found: Golden::new(),
    };
    net.visit(&mut take);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let compared = take.found.iter().filter_map(|(name, got)| {
        let expected = &golden.get(&format!("{prefix}{name}{suffix}"))?.values;
        let difference: Vec<f32> = got.values.iter().zip(expected).map(|(a, b)| a - b).collect();
        let norm = dot(expected, expected).sqrt();
        let gap = dot(&difference, &difference).sqrt() / norm;
        let cosine = dot(&got.values, expected) / (norm * dot(&got.values, &got.values).sqrt());
        assert!(gap <= most && 1.0 - cosine <= apart, "{name}: {gap:e}, cosine {cosine}");
        Some(())
    });
    compared.count()
}

fn discriminator(device: &Device) -> Published {
    by_formula(RAW.init(device, 1), &Architecture::Published(RAW), "netD.")
}

fn critic(device: &Device) -> SwinUnetr {
    let config = SwinUnetrConfig {
        feature_size: 12,
        ..SwinUnetrConfig::published(7)
    };
    by_formula(config.init(device, 1), &Architecture::SwinUnetr(config), "netSeg.").no_grad()
}

/// Keeps every fifth voxel along each axis.
fn every_fifth(x: Tensor<5>) -> Tensor<5> {
    let device = x.device();
    (2..5).fold(x, |x, axis| {
        let at: Vec<i32> = (0..x.dims()[axis] as i32).step_by(5).collect();
        x.select(axis, Tensor::<1, Int>::from_data(at.as_slice(), &device))
    })
}

/// Generator and discriminator on a batch of two, liver and pancreas; every step learns from its own loss alone.
#[test]
fn the_steps_of_both_rivals_on_a_batch_are_the_published_ones() {
    let Some(golden) = npz::golden("04b_losses_gan32.npz") else {
        return;
    };
    let device = Device::flex().autodiff();
    // In single precision to the golden tensors' tolerance for flipped gates, in double precision to six digits.
    for (dtype, suffix, [gap, apart]) in [
        (FloatDType::F32, "", [3e-2, 1e-3]),
        (FloatDType::F64, "_f64", [1e-6, 1e-12]),
    ] {
        let step = Step::new(&golden, &device, dtype);
        let expected = |name: &str| &golden[&format!("{name}{suffix}")].values;
        let single = |x: Tensor<5>| numbers(x.cast(FloatDType::F32));
        let fake = step.painted();
        assert_within("fake_image", &single(fake.clone()), &golden["fake_image"].values, 1e-4);

        let judged = discriminator(&device).no_grad().forward_over_batch(fake.clone());
        assert_within(
            "d_logits",
            &single(every_fifth(judged.clone())),
            &golden["d_logits_s5"].values,
            5e-4,
        );
        let adversarial = published_adversarial(judged, step.lesion.clone());
        assert_within(
            "loss_adv",
            &numbers(adversarial.clone().cast(FloatDType::F32)),
            expected("loss_adv"),
            2e-5,
        );
        step.compare(&adversarial.backward(), &golden, ["grad_adv__", suffix], [gap, apart]);

        let rival = discriminator(&device);
        let loss = published_discrimination(
            rival.forward_over_batch(fake.detach()),
            step.lesion.clone(),
            step.real.clone(),
        );
        assert_within(
            "loss_dis",
            &numbers(loss.clone().cast(FloatDType::F32)),
            expected("loss_dis"),
            2e-5,
        );
        let compared = compare(
            (&rival, "netD."),
            &loss.backward(),
            &golden,
            ["grad_dis__", suffix],
            [gap, apart],
        );
        assert_eq!(compared, 2);
    }
}

/// Generator, critic and discriminator together on a cube of 64 voxels, in the published sizes.
#[test]
fn a_step_of_the_generator_is_the_published_one() {
    let Some(golden) = npz::golden("04c_losses_full64.npz") else {
        return;
    };
    let device = Device::flex().autodiff();
    let step = Step::new(&golden, &device, FloatDType::F32);
    let critic = critic(&device);
    let fake = step.painted();
    assert_within("fake_image", &numbers(fake.clone()), &golden["fake_image"].values, 1e-4);
    let missing = published_missing(critic.forward(fake.clone()), &TUMOURS, step.lesion.clone());
    let judged = discriminator(&device).no_grad().forward(fake);
    let adversarial = published_adversarial(judged.clone(), step.lesion.clone());
    let loss = missing.clone() + adversarial.clone() * 0.1;
    let losses = [
        ("loss_seg", missing),
        ("loss_adv", adversarial),
        ("loss_gen", loss.clone()),
        (
            "loss_dis",
            published_discrimination(judged, step.lesion.clone(), step.real.clone()),
        ),
    ];
    for (name, got) in losses {
        assert_within(name, &numbers(got), &golden[name].values, 2e-5);
    }
    // In single precision rounding flips a few gates, and the gradient jumps: the golden tensors allow a cosine of 1 - 1e-3 and a
    // distance of 3e-2. See the gradients in double precision for what is computed.
    step.compare(&loss.backward(), &golden, ["grad_gen__", ""], [3e-2, 1e-3]);
}

/// Turns parameters into double precision; those of layers that follow their input may stay.
struct Doubled;

impl ModuleMapper for Doubled {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|values| values.cast(FloatDType::F64))
    }
}

/// Without rounding no gate flips, and the gradient through generator, equation, critic and discriminator is the published one to six
/// digits.
#[test]
fn gradients_in_double_precision_are_the_published_ones() {
    let Some(golden) = npz::golden("04c_losses_full64.npz") else {
        return;
    };
    let device = Device::flex().autodiff();
    let step = Step::new(&golden, &device, FloatDType::F64);
    let critic = critic(&device).map(&mut Doubled);
    let fake = step.painted();
    let missing = published_missing(critic.forward(fake.clone()), &TUMOURS, step.lesion.clone());
    let adversarial = published_adversarial(discriminator(&device).no_grad().forward(fake), step.lesion.clone());
    let loss = missing.clone() + adversarial.clone() * 0.1;
    for (name, loss) in [("adv", adversarial), ("seg", missing), ("gen", loss.clone())] {
        let value = numbers(loss.cast(FloatDType::F32));
        assert_within(name, &value, &golden[&format!("loss_{name}_f64")].values, 1e-6);
    }
    step.compare(&loss.backward(), &golden, ["grad_gen__", "_f64"], [1e-6, 1e-12]);
}
