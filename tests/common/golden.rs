//! Operators against tensors that another framework computed in float64 and stored rounded to float32.

#![allow(dead_code, reason = "every test file uses its own part")]

use std::collections::HashMap;

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::SafeTensors;

/// Shapes and values by name.
pub type Golden = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// Reads a file of float32 tensors.
pub fn read(bytes: &[u8]) -> Golden {
    let file = SafeTensors::deserialize(bytes).expect("the golden file is whole");
    let numbers = |data: &[u8]| {
        data.chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().expect("chunks of four")))
            .collect()
    };
    file.tensors()
        .into_iter()
        .map(|(name, t)| (name, (t.shape().to_vec(), numbers(t.data()))))
        .collect()
}

/// Makes a tensor of golden numbers.
pub fn tensor<const D: usize>(golden: &Golden, name: &str, device: &Device) -> Tensor<D> {
    let (shape, values) = &golden[name];
    Tensor::from_data(TensorData::new(values.clone(), shape.clone()), device)
}

/// Returns a tensor's numbers.
pub fn numbers<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_to_vec().expect("tensors of f32")
}

/// Takes one axis of a parameter that [`check`] handed over with five.
pub fn flat(t: Tensor<5>) -> Tensor<1> {
    t.flatten(0, 4)
}

/// Asserts that numbers differ from the golden ones by at most `tolerance` times the largest golden one.
#[track_caller]
pub fn assert_close(golden: &Golden, name: &str, got: &[f32], tolerance: f32) {
    let expected = &golden[name].1;
    assert_eq!(got.len(), expected.len(), "{name}");
    let scale = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    for (at, (g, e)) in got.iter().zip(expected).enumerate() {
        let off = (g - e).abs();
        assert!(
            off <= tolerance * scale,
            "{name}: {at} is off by {off:e}, largest {scale:e}"
        );
    }
}

/// Checks output and gradients of an operator whose inputs are all reshaped to 5 axes.
#[track_caller]
pub fn check<const N: usize>(golden: &Golden, name: &str, f: impl Fn([Tensor<5>; N]) -> Tensor<5>) {
    let device = Device::flex().autodiff();
    let inputs: [Tensor<5>; N] = std::array::from_fn(|i| {
        let (shape, values) = &golden[&format!("{name}.in{i}")];
        let mut padded = [1; 5];
        padded[..shape.len()].copy_from_slice(shape);
        Tensor::from_data(TensorData::new(values.clone(), padded), &device).require_grad()
    });
    let out = f(inputs.clone());
    let grads = (out.clone() * tensor(golden, &format!("{name}.cotangent"), &device))
        .sum()
        .backward();
    // f32 sums of some hundred products against float64.
    assert_close(golden, &format!("{name}.out"), &numbers(out), 2e-6);
    for (i, input) in inputs.iter().enumerate() {
        let gradient = numbers(input.grad(&grads).expect("every input is tracked"));
        assert_close(golden, &format!("{name}.grad{i}"), &gradient, 3e-6);
    }
}
