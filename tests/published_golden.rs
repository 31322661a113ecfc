//! The published generator against the output of the released code.

use burn::tensor::{Device, Tensor, TensorData};
use freetumor::checkpoint::{Architecture, Weight, Weights, collect, fill, source_name};
use freetumor::nn::{OutputActivation, PublishedConfig};

#[path = "common/formula.rs"]
mod formula;
#[path = "common/npz.rs"]
mod npz;

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
    let architecture = Architecture::Published(config);
    let weights: Weights = collect(&net)
        .into_iter()
        .map(|(name, Weight { shape, .. })| {
            let values = formula::values(&format!("netG.{}", source_name(&architecture, &name)), &shape);
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
