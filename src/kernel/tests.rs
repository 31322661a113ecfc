//! Every kernel against a naive loop in `f64`, against itself on other instruction sets, threads and batches.

use burn::tensor::{Device, Tensor, TensorData};

use super::isa::Isa;
use super::layout::Geometry;
use super::{convolution, weight_gradient};
use crate::rng::{Purpose, Rng};

/// Draws standard normal numbers.
pub fn normals(count: usize, seed: u64) -> Vec<f32> {
    Rng::keyed(seed, 0, 0, Purpose::Weights).normals(count)
}

/// Returns the instruction sets that can be tested here.
pub fn sets() -> Vec<Isa> {
    let all = [Isa::Avx512, Isa::Avx2, Isa::Portable];
    all.into_iter().filter(|isa| isa.is_available()).collect()
}

/// Asserts that two results differ by at most `tolerance` relative to the largest expected number.
#[track_caller]
pub fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(1e-30_f64, |m, v| m.max(v.abs()));
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(g) - e).abs() / scale;
        assert!(
            error <= tolerance,
            "element {i}: got {g}, expected {e}, relative error {error:e}"
        );
    }
}

/// Runs a function in pools of 1, 2 and 3 threads and asserts that the results are the same bits.
#[track_caller]
pub fn same_for_threads(f: impl Fn() -> Vec<f32> + Send + Sync) {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&f).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

/// Calls `visit(output, weight, input)` with the flat indices of every product of a convolution of one sample.
fn products(g: &Geometry, mut visit: impl FnMut(usize, usize, usize)) {
    let [d, h, w] = g.size;
    let (k, p) = (g.k, g.k / 2);
    let inside = |at: usize, tap: usize, size: usize| (at + tap).checked_sub(p).filter(|&v| v < size);
    for (co, ci) in (0..g.co).flat_map(|co| (0..g.ci).map(move |ci| (co, ci))) {
        for at in 0..d * h * w {
            let [z, y, x] = [at / (h * w), at / w % h, at % w];
            for tap in 0..k * k * k {
                let [kz, ky, kx] = [tap / (k * k), tap / k % k, tap % k];
                if let (Some(iz), Some(iy), Some(ix)) = (inside(z, kz, d), inside(y, ky, h), inside(x, kx, w)) {
                    visit(
                        co * d * h * w + at,
                        (co * g.ci + ci) * k * k * k + tap,
                        ((ci * d + iz) * h + iy) * w + ix,
                    );
                }
            }
        }
    }
}

/// Shapes that leave remainders everywhere: channels off the block, rows off the lanes, planes under a vector.
fn shapes() -> Vec<Geometry> {
    let shape = |ci, co, k, size| Geometry { ci, co, k, size };
    vec![
        shape(1, 1, 3, [1, 1, 1]),
        shape(1, 16, 3, [4, 5, 6]),
        shape(3, 5, 3, [3, 7, 17]),
        shape(9, 8, 3, [5, 4, 16]),
        shape(17, 11, 3, [2, 3, 33]),
        shape(4, 9, 3, [6, 8, 8]),
        shape(2, 24, 3, [20, 9, 40]),
        shape(7, 3, 1, [3, 5, 7]),
        shape(16, 2, 1, [4, 4, 32]),
    ]
}

#[test]
fn convolution_equals_the_loop() {
    for g in shapes() {
        let (x, gradient) = (normals(2 * g.ci * g.voxels(), 1), normals(2 * g.co * g.voxels(), 2));
        let (weight, bias) = (normals(g.co * g.ci * g.taps(), 3), normals(g.co, 4));
        let mut out: Vec<f64> = (0..gradient.len())
            .map(|i| f64::from(bias[i / g.voxels() % g.co]))
            .collect();
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
        for n in 0..2 {
            let (in_base, out_base) = (n * g.ci * g.voxels(), n * g.co * g.voxels());
            products(&g, |o, w, i| {
                let [xv, wv, gv] = [x[in_base + i], weight[w], gradient[out_base + o]].map(f64::from);
                out[out_base + o] += xv * wv;
                dx[in_base + i] += gv * wv;
                dw[w] += gv * xv;
            });
        }
        for isa in sets() {
            // f32 rounding of at most 27 x 24 products of order 1.
            assert_close(&convolution::forward(isa, &g, &x, &weight, &bias), &out, 2e-6);
            assert_close(&convolution::input_gradient(isa, &g, &gradient, &weight), &dx, 2e-6);
            assert_close(&weight_gradient::weight(isa, &g, &x, &gradient), &dw, 2e-6);
        }
        let db: Vec<f64> = (0..g.co)
            .map(|c| {
                let of_channel = |i: &usize| i / g.voxels() % g.co == c;
                (0..gradient.len())
                    .filter(of_channel)
                    .map(|i| f64::from(gradient[i]))
                    .sum()
            })
            .collect();
        assert_close(&weight_gradient::bias(&gradient, g.co, g.voxels()), &db, 1e-6);
    }
}

#[test]
fn fused_instruction_sets_convolve_to_the_same_bits() {
    if !(Isa::Avx512.is_available() && Isa::Avx2.is_available()) {
        return;
    }
    for g in shapes() {
        let (x, weight) = (normals(g.ci * g.voxels(), 1), normals(g.co * g.ci * g.taps(), 2));
        let run = |isa| convolution::forward(isa, &g, &x, &weight, &[]);
        assert_eq!(run(Isa::Avx512), run(Isa::Avx2));
    }
}

#[test]
fn convolution_ignores_threads_and_batch_mates() {
    let g = Geometry {
        ci: 5,
        co: 12,
        k: 3,
        size: [24, 20, 24],
    };
    let (x, gradient) = (normals(2 * g.ci * g.voxels(), 1), normals(2 * g.co * g.voxels(), 2));
    let (weight, bias) = (normals(g.co * g.ci * g.taps(), 3), normals(g.co, 4));
    for isa in sets() {
        same_for_threads(|| convolution::forward(isa, &g, &x, &weight, &bias));
        same_for_threads(|| convolution::input_gradient(isa, &g, &gradient, &weight));
        same_for_threads(|| weight_gradient::weight(isa, &g, &x, &gradient));
        same_for_threads(|| weight_gradient::bias(&gradient, g.co, g.voxels()));
        let both = convolution::forward(isa, &g, &x, &weight, &bias);
        let second = convolution::forward(isa, &g, &x[x.len() / 2..], &weight, &bias);
        assert_eq!(&both[both.len() / 2..], second);
    }
}

/// Asserts that an operator and its composition of burn's own agree, outputs and all gradients.
#[track_caller]
fn same_as_burn<const N: usize>(
    shapes: [&[usize]; N],
    ours: impl Fn(&[Tensor<5>; N]) -> Tensor<5>,
    burns: impl Fn(&[Tensor<5>; N]) -> Tensor<5>,
) {
    let device = Device::flex().autodiff();
    let run = |f: &dyn Fn(&[Tensor<5>; N]) -> Tensor<5>| {
        let inputs: [Tensor<5>; N] = std::array::from_fn(|i| {
            let mut shape = [1; 5];
            shape[..shapes[i].len()].copy_from_slice(shapes[i]);
            let values = normals(shape.iter().product(), i as u64);
            Tensor::from_data(TensorData::new(values, shape), &device).require_grad()
        });
        let out = f(&inputs);
        let weights = normals(out.dims().iter().product(), 99);
        let weights = Tensor::<5>::from_data(TensorData::new(weights, out.dims()), &device);
        let grads = (out.clone() * weights).sum().backward();
        let mut all = vec![out.inner()];
        all.extend(inputs.iter().map(|i| i.grad(&grads).expect("every input is tracked")));
        all.into_iter()
            .map(|t| t.into_data().try_to_vec::<f32>().unwrap())
            .collect::<Vec<_>>()
    };
    for (got, expected) in run(&ours).iter().zip(run(&burns)) {
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        // Both sides round in f32, in different orders.
        assert_close(got, &expected, 1e-5);
    }
}

#[test]
fn convolution_equals_burns() {
    for (k, stride) in [(3, 1), (1, 1), (3, 2)] {
        let bias = |t: &Tensor<5>| t.clone().reshape([6]);
        same_as_burn(
            [&[2, 3, 6, 4, 10], &[6, 3, k, k, k], &[6]],
            |[x, w, b]| super::conv3d(x.clone(), w.clone(), bias(b), stride),
            |[x, w, b]| super::composed::conv3d(x.clone(), w.clone(), bias(b), stride),
        );
    }
}

#[test]
fn frozen_weights_and_views_are_taken() {
    let device = Device::flex();
    let x = Tensor::<5>::from_data(TensorData::new(normals(2 * 2 * 4 * 4 * 4, 1), [2, 4, 4, 4, 2]), &device);
    let w = Tensor::<5>::from_data(TensorData::new(normals(8 * 2 * 27, 2), [8, 2, 3, 3, 3]), &device);
    let b = Tensor::<1>::zeros([8], &device);
    // A view that is neither contiguous nor at the start of its buffer.
    let view = x.clone().permute([0, 4, 1, 2, 3]).slice([1..2, 0..2]);
    let copy = Tensor::<5>::from_data(view.to_data(), &device);
    let out = super::conv3d(copy, w.clone(), b.clone(), 1);
    assert_eq!(super::conv3d(view, w, b, 1).into_data(), out.into_data());
}
