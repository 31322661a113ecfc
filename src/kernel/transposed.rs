//! Transposed convolution of kernel and stride 2: output blocks of 2x2x2 do not overlap, so it is a convolution of
//! side 1 to eight channels per output channel, which are then interleaved.

use super::isa::Isa;
use super::layout::{BLOCK, Geometry, Padded, Shared, from_zeros};
use super::{convolution, weight_gradient};

/// Doubles the resolution of a batch.
///
/// # Shape
/// x `[n, ci, d, h, w]`, weight `[ci, co, 2, 2, 2]`, bias `[co]` -> `[n, co, 2d, 2h, 2w]`; `g` has ci, co and the
/// voxels of x.
pub fn forward(isa: Isa, g: &Geometry, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    // One output channel is one block: its eight taps are the eight output channels of the convolution.
    let mut packed = vec![0.0; weight.len()];
    for (i, of_input) in weight.chunks_exact(g.co * BLOCK).enumerate() {
        for (c, taps) in of_input.chunks_exact(BLOCK).enumerate() {
            packed[(c * g.ci + i) * BLOCK..][..BLOCK].copy_from_slice(taps);
        }
    }
    let biases: Vec<f32> = bias.iter().flat_map(|&b| [b; BLOCK]).collect();
    let [d, h, w] = g.size;
    let flat = as_pointwise(g);
    let (size_in, size_out) = (g.ci * g.voxels(), g.co * g.voxels() * BLOCK);
    let mut out = from_zeros(x.len() / size_in * size_out, g.voxels() * BLOCK, |_, _| ());
    for (x, out) in x.chunks_exact(size_in).zip(out.chunks_exact_mut(size_out)) {
        let out = Shared::new(out);
        convolution::planes(isa, &flat, &Padded::new(x, &flat), [&packed, &biases], |c, z, sums| {
            // SAFETY: channel c and plane z of the input own two planes of the output; no other task has both.
            let to = unsafe { out.slice((c * d + z) * 8 * h * w, 8 * h * w) };
            for tap in 0..4 {
                let (rows, from) = (&mut to[(tap / 2) * 4 * h * w..][..4 * h * w], 2 * tap);
                for (y, row) in rows.chunks_exact_mut(2 * w).skip(tap % 2).step_by(2).enumerate() {
                    let [even, odd] = [sums.row(from, y, w), sums.row(from + 1, y, w)];
                    for (pair, (&even, &odd)) in row.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
                        pair.copy_from_slice(&[even, odd]);
                    }
                }
            }
        });
    }
    out
}

/// Computes the gradients with respect to x and the weight.
///
/// # Shape
/// gradient `[n, co, 2d, 2h, 2w]`; `g` has ci, co and the voxels of x.
pub fn gradients(isa: Isa, g: &Geometry, x: &[f32], gradient: &[f32], weight: &[f32]) -> [Vec<f32>; 2] {
    let split = split(gradient, g.size);
    let back = as_pointwise(g).transposed();
    // The weight [ci, co * 8] is already that of a convolution from the split channels back to x's.
    let dx = convolution::forward(isa, &back, &split, weight, &[]);
    let dw = weight_gradient::weight(isa, &back, &split, x);
    [dx, dw]
}

/// Returns the geometry of the convolution of side 1.
fn as_pointwise(g: &Geometry) -> Geometry {
    Geometry {
        co: g.co * BLOCK,
        k: 1,
        ..*g
    }
}

/// Reorders `[m, 2d, 2h, 2w]` to `[m, 2 x 2 x 2, d, h, w]`.
fn split(gradient: &[f32], size: [usize; 3]) -> Vec<f32> {
    let [d, h, w] = size;
    from_zeros(gradient.len(), d * h * w, |i, out| {
        let (c, [dz, dy, dx]) = (i / BLOCK, [i >> 2 & 1, i >> 1 & 1, i & 1]);
        let of_channel = &gradient[c * BLOCK * d * h * w..][..BLOCK * d * h * w];
        for (at, out) in out.chunks_exact_mut(w).enumerate() {
            let (z, y) = (2 * (at / h) + dz, 2 * (at % h) + dy);
            let row = &of_channel[(z * 2 * h + y) * 2 * w..][..2 * w];
            for (out, pair) in out.iter_mut().zip(row.chunks_exact(2)) {
                *out = pair[dx];
            }
        }
    })
}
