//! Every operator of `kernel` against tensors that PyTorch computed in float64 (`golden/kernel/make.py`).

use burn::tensor::Tensor;
use freetumor::kernel::{self, Upsampling};

#[path = "common/golden.rs"]
mod golden;

use golden::{Golden, flat};

fn read() -> Golden {
    golden::read(include_bytes!("golden/kernel/golden.safetensors"))
}

/// Sums of at most 27 x 9 products (outputs, gradients of inputs) or 570 voxels (gradients of parameters), every one
/// rounded to f32: some 1e-7 of the largest number, of which twenty to thirty times is allowed.
#[track_caller]
fn check<const N: usize>(name: &str, f: impl Fn([Tensor<5>; N]) -> Tensor<5>) {
    golden::check(&read(), name, f);
}

#[test]
fn convolutions() {
    for name in ["conv3_few", "conv3_many", "conv1"] {
        check(name, |[x, w, b]| kernel::conv3d(x, w, flat(b), 1));
    }
    check("conv3_pair", |[x, y, w, b]| kernel::conv3d_of_pair(x, y, w, flat(b)));
}

#[test]
fn convolutions_that_halve() {
    for name in ["conv3_s2_even", "conv3_s2_odd", "conv1_s2"] {
        check(name, |[x, w, b]| kernel::conv3d(x, w, flat(b), 2));
    }
}

#[test]
fn transposed_convolution() {
    check("transposed", |[x, w, b]| kernel::conv_transpose3d_k2s2(x, w, flat(b)));
}

#[test]
fn norm_and_activation() {
    for (name, slope) in [("norm", 0.01), ("norm_steep", 0.2)] {
        check(name, |[x, gamma, beta]| {
            kernel::instance_norm_leaky_relu(x, gamma.reshape([2, 3]), beta.reshape([2, 3]), slope)
        });
    }
}

#[test]
fn pooling() {
    check("max_pool", |[x]| kernel::max_pool3d_k2(x));
}

#[test]
fn upsampling() {
    for (name, how) in [
        ("nearest", Upsampling::Nearest),
        ("trilinear", Upsampling::Trilinear { align_corners: false }),
        ("trilinear_corners", Upsampling::Trilinear { align_corners: true }),
    ] {
        check(name, |[x]| kernel::upsample3d_x2(x, how));
    }
}

#[test]
fn nothing_of_the_file_is_left_out() {
    let mut names: Vec<String> = read()
        .into_keys()
        .filter_map(|key| key.strip_suffix(".out").map(str::to_owned))
        .collect();
    names.sort();
    let checked = [
        "conv1",
        "conv1_s2",
        "conv3_few",
        "conv3_many",
        "conv3_pair",
        "conv3_s2_even",
        "conv3_s2_odd",
        "max_pool",
        "nearest",
        "norm",
        "norm_steep",
        "transposed",
        "trilinear",
        "trilinear_corners",
    ];
    assert_eq!(names, checked);
}
