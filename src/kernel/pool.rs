//! Maximum over blocks of 2x2x2, remembering which voxel it was.

use rayon::prelude::*;

use super::isa::Isa;
use super::layout::from_zeros;
use super::norm::for_every_isa;

/// Columns that are compared together.
const LANES: usize = 64;

for_every_isa! {
    /// Takes the maximum over the 2x2 columns of four rows, (z, y) = (0, 0), (0, 1), (1, 0), (1, 1). The first of equals wins, and NaN is passed
    /// on, as in PyTorch.
    fn row(rows: [&[f32]; 4], out: &mut [f32], chosen: &mut [u8]) {
        for (part, (out, chosen)) in out.chunks_mut(LANES / 2).zip(chosen.chunks_mut(LANES / 2)).enumerate() {
            let rows = rows.map(|row| &row[part * LANES..][..2 * out.len()]);
            let (mut best, mut which) = ([f32::NEG_INFINITY; LANES], [0_u32; LANES]);
            // Column by column first, which are contiguous.
            for (pair, row) in rows.iter().enumerate() {
                for ((&value, best), which) in row.iter().zip(&mut best).zip(&mut which) {
                    let better = value > *best || value.is_nan();
                    *best = if better { value } else { *best };
                    *which = if better { 2 * pair as u32 } else { *which };
                }
            }
            let columns = best.chunks_exact(2).zip(which.chunks_exact(2));
            for ((out, chosen), (best, which)) in out.iter_mut().zip(chosen).zip(columns) {
                let (left, right, at_left, at_right) = (best[0], best[1], which[0], which[1] + 1);
                let is_right = if left.is_nan() {
                    right.is_nan() && at_right > at_left
                } else {
                    right > left || right.is_nan() || (right == left && at_right < at_left)
                };
                *out = if is_right { right } else { left };
                *chosen = if is_right { at_right } else { at_left } as u8;
            }
        }
    }
}

/// Halves channels of voxels `[d, h, w]`: returns the maxima and the chosen voxel of each block, (z, y, x) as bits.
pub fn forward(isa: Isa, x: &[f32], size: [usize; 3]) -> (Vec<f32>, Vec<u8>) {
    let [d, h, w] = size;
    let mut out = vec![0.0; x.len() / 8];
    let mut chosen = vec![0; x.len() / 8];
    let plane = h * w / 4;
    // Channels follow each other and d is even, so pairs of planes can be taken across the whole batch.
    debug_assert!(d % 2 == 0);
    out.par_chunks_exact_mut(plane)
        .zip(chosen.par_chunks_exact_mut(plane))
        .zip(x.par_chunks_exact(2 * h * w))
        .for_each(|((out, chosen), x)| {
            let rows = out.chunks_exact_mut(w / 2).zip(chosen.chunks_exact_mut(w / 2));
            for (y, (out, chosen)) in rows.enumerate() {
                let at = |z: usize, dy: usize| &x[z * h * w + (2 * y + dy) * w..][..w];
                row(isa, [at(0, 0), at(0, 1), at(1, 0), at(1, 1)], out, chosen);
            }
        });
    (out, chosen)
}

/// Computes the gradient with respect to x, whose voxels are `[d, h, w]`.
pub fn gradient(gradient: &[f32], chosen: &[u8], size: [usize; 3]) -> Vec<f32> {
    let [_, h, w] = size;
    let plane = h * w / 4;
    from_zeros(gradient.len() * 8, 2 * h * w, |pair, dx| {
        let own = pair * plane..(pair + 1) * plane;
        for (at, (&gradient, &chosen)) in gradient[own.clone()].iter().zip(&chosen[own]).enumerate() {
            let [z, dy, side] = [chosen >> 2, chosen >> 1 & 1, chosen & 1].map(usize::from);
            let (y, x) = (2 * (at / (w / 2)) + dy, 2 * (at % (w / 2)) + side);
            dx[(z * h + y) * w + x] = gradient;
        }
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::kernel::tests::{normals, same_as_burn, same_for_threads, sets};
    use crate::kernel::{composed, max_pool3d_k2};
    use crate::rng::{Purpose, Rng};

    const SIZES: [[usize; 3]; 4] = [[2, 2, 2], [4, 6, 8], [2, 4, 34], [6, 2, 70]];

    #[test]
    fn equals_the_loop() {
        for size @ [d, h, w] in SIZES {
            let (x, given) = (normals(3 * d * h * w, 1), normals(3 * d * h * w / 8, 2));
            let (mut out, mut dx) = (vec![f32::NEG_INFINITY; given.len()], vec![0.0; x.len()]);
            let block = |i: usize| {
                let [z, y, x] = [i / (h * w), i / w % h, i % w].map(|v| v / 2);
                // Channels follow each other and d is even: z counts through all of them.
                (z * (h / 2) + y) * (w / 2) + x
            };
            for (i, &value) in x.iter().enumerate() {
                out[block(i)] = out[block(i)].max(value);
            }
            for (i, &value) in x.iter().enumerate() {
                // No two of these numbers are equal.
                dx[i] = if value == out[block(i)] { given[block(i)] } else { 0.0 };
            }
            for isa in sets() {
                let (maxima, chosen) = forward(isa, &x, size);
                assert_eq!(maxima, out);
                assert_eq!(gradient(&given, &chosen, size), dx);
            }
        }
    }

    #[test]
    fn the_gradient_is_a_slope() {
        let size = [4, 6, 10];
        let (x, given) = (normals(2 * 240, 1), normals(2 * 30, 2));
        let dx = gradient(&given, &forward(Isa::best(), &x, size).1, size);
        let loss = |step: f32| -> f64 {
            let moved: Vec<f32> = x.iter().zip(&dx).map(|(x, d)| x + step * d).collect();
            let (out, _) = forward(Isa::best(), &moved, size);
            out.iter().zip(&given).map(|(o, g)| f64::from(*o) * f64::from(*g)).sum()
        };
        let square: f64 = dx.iter().map(|d| f64::from(*d).powi(2)).sum();
        // Too small a step for another voxel to become the largest: what is left is rounding, 1e-7 of a loss of order 10
        // over a difference of order 0.1.
        let slope = (loss(1e-3) - loss(-1e-3)) / (2e-3 * square);
        assert!((slope - 1.0).abs() < 1e-3, "{slope}");
    }

    #[test]
    fn ignores_threads() {
        let size = [8, 12, 34];
        let x = normals(5 * 8 * 12 * 34, 1);
        for isa in sets() {
            same_for_threads(|| forward(isa, &x, size).0);
            same_for_threads(|| gradient(&x[..x.len() / 8], &forward(isa, &x, size).1, size));
        }
    }

    #[test]
    fn equals_burns() {
        for size in [[2, 2, 2], [4, 6, 8], [2, 4, 34]] {
            let [d, h, w] = size;
            same_as_burn(
                [&[2, 3, d, h, w]],
                |[x]| max_pool3d_k2(x.clone()),
                |[x]| composed::max_pool3d_k2(x.clone()),
            );
        }
    }

    #[test]
    fn takes_the_first_of_equals_and_passes_nan_on() {
        let run = |x: [f32; 8]| {
            let (out, chosen) = forward(Isa::best(), &x, [2, 2, 2]);
            (out[0], chosen[0])
        };
        assert_eq!(run([0.0; 8]), (0.0, 0));
        assert_eq!(run([1.0, 3.0, 2.0, 3.0, 0.0, 0.0, 3.0, 0.0]), (3.0, 1));
        let (value, at) = run([1.0, 2.0, f32::NAN, 9.0, 0.0, 0.0, 0.0, 0.0]);
        assert!(value.is_nan());
        assert_eq!(at, 2);
    }

    #[test]
    fn equals_one_after_the_other_for_any_numbers() {
        let kinds = [-1.0, -0.0, 0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let mut rng = Rng::keyed(5, 0, 0, Purpose::Test);
        let size @ [d, h, w] = [20, 4, 150];
        for kinds in [&kinds[..], &kinds[..4], &kinds[1..3], &kinds[5..]] {
            let x: Vec<f32> = (0..d * h * w).map(|_| kinds[rng.below(kinds.len())]).collect();
            for isa in sets() {
                let (out, chosen) = forward(isa, &x, size);
                for (at, (out, chosen)) in out.iter().zip(&chosen).enumerate() {
                    let [z, y, column] = [at / (h * w / 4), at / (w / 2) % (h / 2), at % (w / 2)].map(|v| 2 * v);
                    let (mut best, mut which) = (f32::NEG_INFINITY, 0);
                    for corner in 0..8 {
                        let [dz, dy, dx] = [corner >> 2, corner >> 1 & 1, corner & 1];
                        let value = x[((z + dz) * h + y + dy) * w + column + dx];
                        if value > best || value.is_nan() {
                            (best, which) = (value, corner);
                        }
                    }
                    assert_eq!((out.to_bits(), usize::from(*chosen)), (best.to_bits(), which), "{at}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "even sizes")]
    fn refuses_odd_sizes() {
        max_pool3d_k2(Tensor::<5>::zeros([1, 1, 2, 3, 2], &Device::flex()));
    }
}
