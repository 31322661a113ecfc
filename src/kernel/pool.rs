//! Maximum over blocks of 2x2x2, remembering which voxel it was.

use rayon::prelude::*;

use super::isa::Isa;
use super::layout::from_zeros;
use super::norm::for_every_isa;

for_every_isa! {
    /// Takes the maximum over the 2x2 columns of four rows, (z, y) = (0, 0), (0, 1), (1, 0), (1, 1).
    fn row(rows: [&[f32]; 4], out: &mut [f32], chosen: &mut [u8]) {
        for (x, (out, chosen)) in out.iter_mut().zip(chosen).enumerate() {
            let (mut best, mut which) = (f32::NEG_INFINITY, 0_u8);
            for (pair, row) in rows.iter().enumerate() {
                for side in 0..2 {
                    let value = row[2 * x + side];
                    // The first of equals wins, and NaN is passed on, as in PyTorch.
                    let better = value > best || value.is_nan();
                    best = if better { value } else { best };
                    which = if better { (2 * pair + side) as u8 } else { which };
                }
            }
            *out = best;
            *chosen = which;
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
