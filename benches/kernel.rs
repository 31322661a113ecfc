//! Operators and a training step of small networks, for work on the kernels; `freetumor bench nn` measures at full size.

use std::hint::black_box;

use burn::tensor::{Device, Tensor, TensorData};
use criterion::{Criterion, criterion_group, criterion_main};
use freetumor::kernel;
use freetumor::nn::UnetConfig;
use freetumor::rng::{Purpose, Rng};

fn normals<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let values = Rng::keyed(1, 0, 0, Purpose::Test).normals(shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn operators(c: &mut Criterion) {
    for (channels, side) in [(16, 48), (32, 24), (64, 12)] {
        let device = Device::flex().autodiff();
        let x = normals([2, channels, side, side, side], &device).require_grad();
        let weight = normals([channels, channels, 3, 3, 3], &device).require_grad();
        let bias = normals([channels], &device).require_grad();
        let rows = normals([2, channels], &device).require_grad();
        let conv = |x: &Tensor<5>| kernel::conv3d(x.clone(), weight.clone(), bias.clone(), 1);
        let norm = |x: &Tensor<5>| kernel::instance_norm_leaky_relu(x.clone(), rows.clone(), rows.clone(), 0.01);
        let name = format!("c{channels} 2x{side}^3");
        c.bench_function(&format!("conv3d {name} forward"), |b| b.iter(|| black_box(conv(&x))));
        c.bench_function(&format!("conv3d {name} both ways"), |b| {
            b.iter(|| black_box(conv(&x).sum().backward()))
        });
        c.bench_function(&format!("norm {name} forward"), |b| b.iter(|| black_box(norm(&x))));
        c.bench_function(&format!("norm {name} both ways"), |b| {
            b.iter(|| black_box(norm(&x).sum().backward()))
        });
    }
}

fn network(c: &mut Criterion) {
    let config = UnetConfig {
        in_channels: 1,
        out_channels: 3,
        widths: vec![16, 32, 64],
        condition: 0,
    };
    let run = |device: &Device| {
        config
            .init(device, 1)
            .forward(normals([2, 1, 48, 48, 48], device), None)
    };
    let (plain, tracked) = (Device::flex(), Device::flex().autodiff());
    c.bench_function("unet 2x48^3 inference", |b| {
        b.iter(|| black_box(run(&plain).into_data()))
    });
    c.bench_function("unet 2x48^3 both ways", |b| {
        b.iter(|| black_box(run(&tracked).powi_scalar(2).mean().backward()))
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = operators, network
}
criterion_main!(benches);
