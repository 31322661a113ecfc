//! The published generator against the output of the released code.

use burn::tensor::{Device, Tensor, TensorData};
use freetumor::checkpoint::{Weight, Weights, collect, fill};
use freetumor::nn::{OutputActivation, PublishedConfig};

#[path = "common/npz.rs"]
mod npz;

/// Translates a parameter's name to the released one.
fn released(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let pair = |block: &str, which: &str, rest: &[&str]| {
        let op = usize::from(which == "second");
        let leaf = match rest {
            ["conv", leaf] => format!("conv1.{leaf}"),
            ["gamma"] => "bn1.weight".to_string(),
            ["beta"] => "bn1.bias".to_string(),
            other => panic!("no released parameter for {other:?} of {name}"),
        };
        format!("netG.{block}.ops.{op}.{leaf}")
    };
    let level = |index: &str| index.parse::<usize>().expect("a level");
    match parts.as_slice() {
        ["down", i, which, rest @ ..] => pair(&format!("down_tr{}", 64 << level(i)), which, rest),
        ["up", i, "up", leaf] => format!("netG.up_tr{}.up_conv.{leaf}", 256 >> level(i)),
        ["up", i, "conv", which, rest @ ..] => pair(&format!("up_tr{}", 256 >> level(i)), which, rest),
        ["head", leaf] => format!("netG.out_tr.final_conv.{leaf}"),
        other => panic!("no released parameter for {other:?}"),
    }
}

/// Makes a tensor's values from its released name: section 0 of the golden tensors' description.
fn formula(name: &str, shape: &[usize]) -> Vec<f32> {
    let offset = u64::from(crc32fast::hash(name.as_bytes()));
    let fan_in: usize = shape[1..].iter().product();
    (0..shape.iter().product::<usize>() as u64)
        .map(|j| {
            let a = (j * 2_654_435_761 + offset) % (1 << 32);
            let t = 2.0 * (a as f64 / 4_294_967_296.0) - 1.0;
            let value = match shape.len() {
                1 if name.ends_with(".weight") => 1.0 + 0.1 * t,
                1 => 0.1 * t,
                _ => t * (3.0 / fan_in as f64).sqrt(),
            };
            value as f32
        })
        .collect()
}

#[test]
fn the_output_is_that_of_the_released_code() {
    let Some(golden) = npz::golden("01_unet3d.npz") else {
        return;
    };
    let device = Device::flex();
    let config = PublishedConfig {
        in_channels: 1,
        out_channels: 3,
        activation: OutputActivation::None,
    };
    let net = config.init(&device, 1);
    let weights: Weights = collect(&net)
        .into_iter()
        .map(|(name, Weight { shape, .. })| {
            let values = formula(&released(&name), &shape);
            (name, Weight { shape, values })
        })
        .collect();
    let net = fill(net, weights).expect("every parameter has its shape");
    let x = &golden["x"];
    let x: Tensor<5> = Tensor::from_data(TensorData::new(x.values.clone(), x.shape.clone()), &device);
    let y: Vec<f32> = net.forward(x).into_data().try_to_vec().expect("tensors of f32");
    // The batch of two against the samples that the released code ran one at a time: our norm never mixes them.
    let expected = &golden["y_single"].values;
    assert_eq!(y.len(), expected.len());
    for (at, (a, b)) in y.iter().zip(expected).enumerate() {
        // The golden tensors' own tolerance: their float32 and float64 runs differ by 2e-5 here.
        assert!((a - b).abs() <= 2e-4, "{at}: {a} instead of {b}");
    }
}
