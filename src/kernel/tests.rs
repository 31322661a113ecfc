//! Every kernel against a naive loop in `f64`, against itself on other instruction sets, threads and batches.

use burn::tensor::ops::ConvTransposeOptions;
use burn::tensor::{Device, Tensor, TensorData, module};

use super::isa::Isa;
use super::layout::Geometry;
use super::{DiceOver, LossForm, convolution, norm, weight_gradient};
use crate::rng::{Purpose, Rng};
use crate::volume::ClassSet;

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
        // More than one unit of tiles along z and y.
        shape(40, 4, 3, [9, 31, 29]),
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
            // f32 rounding of at most 27 x 24 products of order 1, and of the sums of up to 16 numbers that filtering
            // multiplies in their place.
            assert_close(&convolution::forward(isa, &g, &x, &weight, &bias), &out, 2e-6);
            assert_close(&convolution::input_gradient(isa, &g, &gradient, &weight), &dx, 2e-6);
            assert_close(&weight_gradient::weight(isa, &g, &x, &gradient), &dw, 2e-6);
            // The direct kernels, too, where filtering would take their place.
            assert_close(&convolution::direct(isa, &g, &x, &weight, &bias), &out, 2e-6);
            assert_close(&weight_gradient::direct(isa, &g, &x, &gradient), &dw, 2e-6);
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

/// A first convolution's few products are summed in double precision and rounded once, on every instruction set.
#[test]
fn a_first_convolution_is_rounded_once() {
    for g in shapes().into_iter().filter(|g| g.k == 3 && g.ci <= 3) {
        let [x, weight, bias] = [g.ci * g.voxels(), g.co * g.ci * 27, g.co].map(|count| normals(count, count as u64));
        let mut sums: Vec<f64> = bias.iter().flat_map(|b| vec![f64::from(*b); g.voxels()]).collect();
        products(&g, |o, w, i| sums[o] += f64::from(x[i]) * f64::from(weight[w]));
        let rounded: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        for isa in sets() {
            let got = convolution::forward(isa, &g, &x, &weight, &bias);
            assert_eq!(got, rounded, "{isa:?}, {g:?}");
        }
    }
}

#[test]
fn fused_instruction_sets_convolve_to_the_same_bits() {
    if !(Isa::Avx512.is_available() && Isa::Avx2.is_available()) {
        return;
    }
    for g in shapes() {
        let (x, weight) = (normals(g.ci * g.voxels(), 1), normals(g.co * g.ci * g.taps(), 2));
        for convolve in [convolution::forward, convolution::direct] {
            let run = |isa| convolve(isa, &g, &x, &weight, &[]);
            assert_eq!(run(Isa::Avx512), run(Isa::Avx2));
        }
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
pub fn same_as_burn<const N: usize>(
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
    for (k, stride) in [(3, 1), (1, 1), (3, 3)] {
        let bias = |t: &Tensor<5>| t.clone().reshape([6]);
        same_as_burn(
            [&[2, 3, 6, 4, 10], &[6, 3, k, k, k], &[6]],
            |[x, w, b]| super::conv3d(x.clone(), w.clone(), bias(b), stride),
            |[x, w, b]| super::composed::conv3d(x.clone(), w.clone(), bias(b), stride),
        );
    }
}

#[test]
fn a_pair_convolves_as_its_concatenation() {
    // Filtered and direct, with remainders of channels and rows; the second part alone stays under the direct limit.
    for (parts, k) in [([5, 3], 3), ([1, 2], 3), ([4, 9], 1)] {
        let [first, second] = parts;
        let bias = |t: &Tensor<5>| t.clone().reshape([6]);
        same_as_burn(
            [
                &[2, first, 6, 4, 10],
                &[2, second, 6, 4, 10],
                &[6, first + second, k, k, k],
                &[6],
            ],
            |[x, y, w, b]| super::conv3d_of_pair(x.clone(), y.clone(), w.clone(), bias(b)),
            |[x, y, w, b]| super::composed::conv3d(Tensor::cat(vec![x.clone(), y.clone()], 1), w.clone(), bias(b), 1),
        );
    }
}

#[test]
fn a_norm_in_place_changes_only_its_own() {
    let device = Device::flex();
    let x = Tensor::<5>::from_data(TensorData::new(normals(2 * 64, 1), [1, 2, 4, 4, 4]), &device);
    let rows = Tensor::<2>::ones([1, 2], &device);
    let norm = |x: Tensor<5>| super::instance_norm_leaky_relu(x, rows.clone(), rows.clone(), 0.1);
    let before = x.to_data();
    let shared = norm(x.clone());
    assert_eq!(x.to_data(), before, "x is still needed and was changed");
    assert_eq!(norm(x).into_data(), shared.into_data());
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

#[test]
fn transposed_convolution_equals_burns() {
    for size in [[2, 3, 5], [4, 4, 4], [3, 2, 17]] {
        let [d, h, w] = size;
        let options = || ConvTransposeOptions::new([2; 3], [0; 3], [0; 3], [1; 3], 1);
        let bias = |t: &Tensor<5>| t.clone().reshape([5]);
        let shapes: [&[usize]; 3] = [&[2, 3, d, h, w], &[3, 5, 2, 2, 2], &[5]];
        let ours = |[x, w, b]: &[Tensor<5>; 3]| super::conv_transpose3d_k2s2(x.clone(), w.clone(), bias(b));
        same_as_burn(shapes, ours, |[x, w, b]| {
            module::conv_transpose3d(x.clone(), w.clone(), Some(bias(b)), options())
        });
        same_as_burn(shapes, ours, |[x, w, b]| {
            super::composed::conv_transpose3d_blocks(x.clone(), w.clone(), bias(b))
        });
    }
}

#[test]
fn norm_equals_burns() {
    for size in [[2, 3, 5], [4, 4, 4], [1, 2, 3], [5, 9, 17]] {
        let [d, h, w] = size;
        let rows = |t: &Tensor<5>| t.clone().reshape([2, 3]);
        same_as_burn(
            [&[2, 3, d, h, w], &[2, 3], &[2, 3]],
            |[x, g, b]| super::instance_norm_leaky_relu(x.clone(), rows(g), rows(b), 0.01),
            |[x, g, b]| super::composed::instance_norm_leaky_relu(x.clone(), rows(g), rows(b), 0.01),
        );
    }
}

#[test]
fn norm_survives_a_large_mean_and_a_constant_channel() {
    let device = Device::flex();
    let voxels = 4 * 4 * 4;
    // Intensities around 1000 with deviation 1: one pass in f32 over squares would lose half of the digits.
    let noise = normals(voxels, 1);
    let mut x: Vec<f32> = noise.iter().map(|v| 1000.0 + v).collect();
    x.extend(vec![7.0; voxels]);
    let exact: Vec<f64> = {
        let x: Vec<f64> = x[..voxels].iter().map(|&v| f64::from(v)).collect();
        let mean = x.iter().sum::<f64>() / voxels as f64;
        let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / voxels as f64;
        x.iter().map(|v| (v - mean) / (variance + 1e-5).sqrt()).collect()
    };
    let x = Tensor::<5>::from_data(TensorData::new(x, [1, 2, 4, 4, 4]), &device);
    let (one, zero) = (Tensor::<2>::ones([1, 2], &device), Tensor::<2>::zeros([1, 2], &device));
    // Slope 1 leaves the norm alone.
    let out = super::instance_norm_leaky_relu(x, one, zero, 1.0);
    let out = out.into_data().try_to_vec::<f32>().unwrap();
    // The mean is rounded to f32, 3e-5 at 1000.
    assert_close(&out[..voxels], &exact, 3e-5);
    assert!(out[voxels..].iter().all(|&v| v == 0.0));
}

#[test]
fn every_instruction_set_norms_and_pools_to_the_same_bits() {
    let (x, gradient) = (normals(2 * 3 * 4 * 6 * 10, 1), normals(2 * 3 * 4 * 6 * 10, 2));
    let (gamma, beta) = (normals(6, 3), normals(6, 4));
    let run = |isa| {
        let statistics = norm::statistics(isa, &x, 240);
        let parameters = norm::Parameters {
            statistics: &statistics,
            gamma: &gamma,
            beta: &beta,
            slope: 0.01,
        };
        let out = norm::forward(isa, &x, parameters, 240);
        (
            norm::gradients(isa, &x, &gradient, parameters, 240),
            super::pool::forward(isa, &out, [4, 6, 10]),
            out,
        )
    };
    for isa in sets() {
        assert_eq!(run(isa), run(Isa::Portable));
    }
}

/// Output and all gradients of every operator in a row, as one vector.
fn chain(x: &[f32]) -> Vec<Vec<f32>> {
    let device = Device::flex().autodiff();
    let batch = x.len() / (3 * 16 * 16 * 16);
    let parameter = |seed, shape: [usize; 5]| {
        Tensor::<5>::from_data(TensorData::new(normals(shape.iter().product(), seed), shape), &device).require_grad()
    };
    let x = Tensor::<5>::from_data(TensorData::new(x.to_vec(), [batch, 3, 16, 16, 16]), &device).require_grad();
    let (w, up) = (parameter(1, [10, 3, 3, 3, 3]), parameter(2, [10, 4, 2, 2, 2]));
    let bias = |c: usize| Tensor::<1>::ones([c], &device).require_grad();
    let (b, up_b) = (bias(10), bias(4));
    let rows = || Tensor::<2>::ones([batch, 10], &device).require_grad();
    let (gamma, beta) = (rows(), rows());
    let y = super::conv3d(x.clone(), w.clone(), b.clone(), 1);
    let y = super::instance_norm_leaky_relu(y, gamma.clone(), beta.clone(), 0.01);
    let y = super::conv_transpose3d_k2s2(super::max_pool3d_k2(y), up.clone(), up_b.clone());
    let grads = (y.clone() * y.clone() * y.clone()).sum().backward();
    let take = |t: TensorData| t.try_to_vec::<f32>().unwrap();
    vec![
        take(y.inner().into_data()),
        take(x.grad(&grads).unwrap().into_data()),
        take(gamma.grad(&grads).unwrap().into_data()),
        take(beta.grad(&grads).unwrap().into_data()),
        take(w.grad(&grads).unwrap().into_data()),
        take(b.grad(&grads).unwrap().into_data()),
        take(up.grad(&grads).unwrap().into_data()),
        take(up_b.grad(&grads).unwrap().into_data()),
    ]
}

#[test]
fn a_chain_ignores_threads() {
    let x = normals(2 * 3 * 16 * 16 * 16, 7);
    same_for_threads(|| chain(&x).concat());
}

#[test]
fn a_chain_ignores_batch_mates() {
    let x = normals(3 * 3 * 16 * 16 * 16, 7);
    let all = chain(&x);
    for (n, alone) in x.chunks_exact(x.len() / 3).enumerate() {
        // The output and the gradients that have a row per sample.
        for (all, alone) in all.iter().zip(chain(alone)).take(4) {
            assert_eq!(&all[n * alone.len()..][..alone.len()], alone);
        }
    }
}

#[test]
fn gradients_are_slopes() {
    // Central differences of the loss along each gradient: a step of 1e-2 leaves about two digits in f32.
    let device = Device::flex();
    let shapes = [[2, 3, 4, 4, 4], [2, 3, 1, 1, 1], [2, 3, 1, 1, 1]];
    let values: Vec<Vec<f32>> = (1..)
        .zip(shapes)
        .map(|(seed, s)| normals(s.iter().product(), seed))
        .collect();
    let weights = TensorData::new(normals(2 * 3 * 64, 4), shapes[0]);
    let loss = |values: [Tensor<5>; 3]| {
        let [x, gamma, beta] = values;
        let weights = Tensor::<5>::from_data(weights.clone(), &x.device());
        (super::instance_norm_leaky_relu(x, gamma.reshape([2, 3]), beta.reshape([2, 3]), 0.2) * weights).sum()
    };
    let make = |device: &Device, i: usize, v: Vec<f32>| Tensor::<5>::from_data(TensorData::new(v, shapes[i]), device);
    let ad = device.clone().autodiff();
    let tracked: [Tensor<5>; 3] = std::array::from_fn(|i| make(&ad, i, values[i].clone()).require_grad());
    let grads = loss(tracked.clone()).backward();
    for (i, tracked) in tracked.iter().enumerate() {
        let gradient = tracked.grad(&grads).unwrap().into_data().try_to_vec::<f32>().unwrap();
        let norm = gradient.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let at = |step: f64| {
            let moved = std::array::from_fn(|j| {
                let scale = if i == j { (step / norm) as f32 } else { 0.0 };
                let along = gradient.iter().cycle();
                make(
                    &device,
                    j,
                    values[j].iter().zip(along).map(|(v, g)| v + scale * g).collect(),
                )
            });
            f64::from(loss(moved).into_scalar::<f32>())
        };
        let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
        assert!(
            (slope / norm - 1.0).abs() < 2e-2,
            "input {i}: slope {slope}, gradient {norm}"
        );
    }
}

/// Draws logits `[2, 4, 6, 20, 40]` (more voxels than one block of sums) and sets of one, two and all classes.
fn marginal_sample() -> (Vec<f32>, Vec<ClassSet>) {
    let voxels = 2 * 6 * 20 * 40;
    let mut logits = normals(4 * voxels, 11);
    logits.iter_mut().for_each(|z| *z *= 4.0);
    // Far apart, as confident networks are: no probability may become NaN.
    logits[..8].fill(-300.0);
    let kinds = [0b0001, 0b0010, 0b1111, 0b0101, 0b0100];
    let sets = (0..voxels).map(|i| ClassSet(kinds[i * 7 / 3 % 5])).collect();
    (logits, sets)
}

/// All forms that differ in what is summed or counted.
fn loss_forms() -> impl Iterator<Item = LossForm> {
    (0..16).map(|bits| LossForm {
        balance: [0.5, 0.0][bits & 1],
        dice: [DiceOver::Batch, DiceOver::Sample][bits >> 1 & 1],
        background: bits & 4 == 0,
        absent: bits & 8 != 0,
    })
}

#[test]
fn the_marginal_loss_equals_its_composition_in_every_form() {
    let (logits, sets) = marginal_sample();
    let device = Device::flex().autodiff();
    for form in loss_forms() {
        let [ours, composed] = [true, false].map(|ours| {
            let x = Tensor::<5>::from_data(TensorData::new(logits.clone(), [2, 4, 6, 20, 40]), &device).require_grad();
            let loss = match ours {
                true => super::marginal_loss(x.clone(), sets.clone().into(), form),
                false => super::composed::marginal_loss(x.clone(), &sets, &form),
            };
            // Twice the loss: the gradient must follow what comes after it.
            let gradients = (loss.clone() * 2.0).backward();
            let gradient = x.grad(&gradients).unwrap().into_data().try_to_vec::<f32>().unwrap();
            (f64::from(loss.into_scalar::<f32>()), gradient)
        });
        // The composition sums in f32 over 9600 voxels.
        let off = (ours.0 - composed.0).abs();
        assert!(off < 1e-5 * composed.0.abs(), "{form:?}: {} {}", ours.0, composed.0);
        let expected: Vec<f64> = composed.1.iter().map(|v| f64::from(*v)).collect();
        assert_close(&ours.1, &expected, 1e-4);
    }
}

#[test]
fn the_marginal_loss_does_not_depend_on_threads() {
    let (logits, sets) = marginal_sample();
    same_for_threads(|| {
        let (loss, mut gradient) =
            super::loss::marginal(Isa::chosen(), &logits, (&sets, &LossForm::default()), [4, 6 * 20 * 40]);
        gradient.push(loss);
        gradient
    });
}

#[test]
fn every_instruction_set_gives_the_marginal_loss_the_same_bits() {
    let (logits, sets) = marginal_sample();
    let run = |isa| super::loss::marginal(isa, &logits, (&sets, &LossForm::default()), [4, 6 * 20 * 40]);
    let portable = run(Isa::Portable);
    assert!(self::sets().into_iter().all(|isa| run(isa) == portable));
}
