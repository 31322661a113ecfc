//! Doubling the resolution by interpolation, and its gradient.
//!
//! Interpolation is separable: along an axis of n voxels, out\[2i\] = x\[i\] + a\[i\] (x\[i-1\] - x\[i\]) and
//! out\[2i+1\] = x\[i\] + b\[i\] (x\[i+1\] - x\[i\]), where a\[0\] and b\[n-1\] are 0 because nothing lies beyond the ends. Rows
//! are doubled along x, then mixed along y, then planes along z; the gradient goes back in the opposite order, so that the
//! axis along which vectors do not load neighbours comes where least is left. Nothing is fused: all instruction sets give
//! the same bits.
//!
//! # Source
//! PyTorch's `interpolate` with `scale_factor=2` and the modes `nearest` and `trilinear`.

use super::isa::Isa;
use super::layout::{from_zeros, with_scratch};
use super::norm::for_every_isa;
use super::parity::{interleave_row, split_row};

/// How new voxels get their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upsampling {
    /// Every voxel becomes a block of 2x2x2.
    Nearest,
    /// Linear along each axis.
    Trilinear {
        /// Whether the centres of the outermost voxels stay where they are; else the volume's faces do.
        align_corners: bool,
    },
}

/// The factors of one axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// a.
    pub before: Vec<f32>,
    /// b.
    pub after: Vec<f32>,
}

impl Axis {
    /// Computes the factors of `n` voxels.
    pub fn new(n: usize, align_corners: bool) -> Self {
        let factor = |i: usize| match (i, align_corners) {
            (0, _) => 0.0,
            (_, false) => 0.25,
            (_, true) => i as f32 / (2 * n - 1) as f32,
        };
        let before: Vec<f32> = (0..n).map(factor).collect();
        // An axis and its mirror image are interpolated alike.
        let after = before.iter().rev().copied().collect();
        Self { before, after }
    }

    /// Returns how much of voxel i the voxels 2i - 1, 2i, 2i + 1 and 2i + 2 of the output hold.
    fn shares(&self, i: usize) -> [f32; 4] {
        [
            if i == 0 { 0.0 } else { self.after[i - 1] },
            1.0 - self.before[i],
            1.0 - self.after[i],
            self.before.get(i + 1).copied().unwrap_or(0.0),
        ]
    }
}

/// Returns the places of the four voxels that [`Axis::shares`] speaks of; those that do not exist, whose shares are 0,
/// moved to the nearest that does.
fn holders(i: usize, n: usize) -> [usize; 4] {
    [(2 * i).saturating_sub(1), 2 * i, 2 * i + 1, (2 * i + 2).min(2 * n - 1)]
}

/// Doubles the resolution of channels of `size` voxels.
///
/// Threads share channels, not planes: a network has more channels than a processor has cores, and planes would be
/// computed more than once.
///
/// # Shape
/// `[channels, d, h, w]` -> `[channels, 2d, 2h, 2w]`.
pub fn forward(isa: Isa, how: Upsampling, x: &[f32], size: [usize; 3]) -> Vec<f32> {
    let voxels: usize = size.iter().product();
    let of_channel = |channel: usize| &x[channel * voxels..][..voxels];
    match how {
        Upsampling::Nearest => from_zeros(8 * x.len(), 8 * voxels, |channel, out| {
            repeat(isa, of_channel(channel), size, out);
        }),
        Upsampling::Trilinear { align_corners } => {
            let axes = size.map(|n| Axis::new(n, align_corners));
            from_zeros(8 * x.len(), 8 * voxels, |channel, out| {
                interpolate(isa, &axes, of_channel(channel), out);
            })
        }
    }
}

/// Computes the gradient with respect to an input of channels of `size` voxels.
///
/// # Shape
/// `[channels, 2d, 2h, 2w]` -> `[channels, d, h, w]`.
pub fn gradient(isa: Isa, how: Upsampling, gradient: &[f32], size: [usize; 3]) -> Vec<f32> {
    let voxels: usize = size.iter().product();
    let of_channel = |channel: usize| &gradient[channel * 8 * voxels..][..8 * voxels];
    match how {
        Upsampling::Nearest => from_zeros(gradient.len() / 8, voxels, |channel, dx| {
            sum_blocks(isa, of_channel(channel), size, dx);
        }),
        Upsampling::Trilinear { align_corners } => {
            let axes = size.map(|n| Axis::new(n, align_corners));
            from_zeros(gradient.len() / 8, voxels, |channel, dx| {
                gather(isa, &axes, of_channel(channel), dx);
            })
        }
    }
}

/// Repeats every voxel of one channel along each axis.
fn repeat(isa: Isa, x: &[f32], [_, h, w]: [usize; 3], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(h * w).zip(out.chunks_exact_mut(8 * h * w)) {
        let (plane, copy) = out.split_at_mut(4 * h * w);
        for (x, rows) in x.chunks_exact(w).zip(plane.chunks_exact_mut(4 * w)) {
            let (row, copy) = rows.split_at_mut(2 * w);
            interleave_row(isa, x, x, row);
            copy.copy_from_slice(row);
        }
        copy.copy_from_slice(plane);
    }
}

/// Sums the blocks of 2x2x2 of one channel's gradient.
fn sum_blocks(isa: Isa, gradient: &[f32], [_, h, w]: [usize; 3], dx: &mut [f32]) {
    for (planes, dx) in gradient.chunks_exact(8 * h * w).zip(dx.chunks_exact_mut(h * w)) {
        for (y, dx) in dx.chunks_exact_mut(w).enumerate() {
            let row = |z: usize, dy: usize| &planes[(z * 2 * h + 2 * y + dy) * 2 * w..][..2 * w];
            sum_pairs(isa, [row(0, 0), row(0, 1), row(1, 0), row(1, 1)], dx);
        }
    }
}

/// Interpolates one channel.
fn interpolate(isa: Isa, axes: &[Axis; 3], x: &[f32], out: &mut [f32]) {
    let [d, h, w] = axes.each_ref().map(|axis| axis.before.len());
    let plane = 4 * h * w;
    // The planes before, at and after the one that is written, doubled along y and x.
    with_scratch(3 * plane + 2 * (h + 1) * w, |scratch| {
        let (planes, rows) = scratch.split_at_mut(3 * plane);
        for ahead in 0..=d {
            if ahead < d {
                let to = &mut planes[ahead % 3 * plane..][..plane];
                double_plane(isa, axes, &x[ahead * h * w..][..h * w], rows, to);
            }
            let Some(z) = ahead.checked_sub(1) else { continue };
            let from = [z.saturating_sub(1), z, ahead.min(d - 1)].map(|z| &planes[z % 3 * plane..][..plane]);
            let to = out[2 * z * plane..][..2 * plane].split_at_mut(plane);
            mix(isa, from, [axes[0].before[z], axes[0].after[z]], to);
        }
    });
}

/// Doubles one plane along x into `rows`, followed by room for one row, and from there along y.
fn double_plane(isa: Isa, [_, along_y, along_x]: &[Axis; 3], x: &[f32], rows: &mut [f32], out: &mut [f32]) {
    let (h, w) = (along_y.before.len(), along_x.before.len());
    let (rows, parts) = rows.split_at_mut(2 * h * w);
    let (even, odd) = parts.split_at_mut(w);
    for (x, row) in x.chunks_exact(w).zip(rows.chunks_exact_mut(2 * w)) {
        mix_neighbours(isa, x, along_x, even, odd);
        interleave_row(isa, even, odd, row);
    }
    for (y, out) in out.chunks_exact_mut(4 * w).enumerate() {
        let from = [y.saturating_sub(1), y, (y + 1).min(h - 1)].map(|y| &rows[2 * y * w..][..2 * w]);
        mix(
            isa,
            from,
            [along_y.before[y], along_y.after[y]],
            out.split_at_mut(2 * w),
        );
    }
}

/// Gathers the gradient of one channel.
fn gather(isa: Isa, axes: &[Axis; 3], gradient: &[f32], dx: &mut [f32]) {
    let [d, h, w] = axes.each_ref().map(|axis| axis.before.len());
    let size = 4 * h * w;
    with_scratch(size + 4 * w, |scratch| {
        let (plane, rows) = scratch.split_at_mut(size);
        let (row, parts) = rows.split_at_mut(2 * w);
        let (even, odd) = parts.split_at_mut(w);
        for (z, dx) in dx.chunks_exact_mut(h * w).enumerate() {
            let planes = holders(z, d).map(|z| &gradient[z * size..][..size]);
            blend(isa, planes, axes[0].shares(z), plane);
            for (y, dx) in dx.chunks_exact_mut(w).enumerate() {
                let rows = holders(y, h).map(|y| &plane[2 * y * w..][..2 * w]);
                blend(isa, rows, axes[1].shares(y), row);
                split_row(isa, row, even, odd);
                gather_row(isa, even, odd, &axes[2], dx);
            }
        }
    });
}

for_every_isa! {
    /// Interpolates between the second of three rows and its neighbours: towards the first by the first factor, towards
    /// the third by the second.
    fn mix(from: [&[f32]; 3], factors: [f32; 2], to: (&mut [f32], &mut [f32])) {
        let [before, here, after] = from;
        let to = to.0.iter_mut().zip(to.1);
        for ((&before, (&here, &after)), (even, odd)) in before.iter().zip(here.iter().zip(after)).zip(to) {
            *even = here + factors[0] * (before - here);
            *odd = here + factors[1] * (after - here);
        }
    }
}

for_every_isa! {
    /// Interpolates along a row: its even and its odd voxels.
    fn mix_neighbours(x: &[f32], axis: &Axis, even: &mut [f32], odd: &mut [f32]) {
        let last = x.len() - 1;
        (even[0], odd[last]) = (x[0], x[last]);
        for (pair, (even, &factor)) in x.windows(2).zip(even[1..].iter_mut().zip(&axis.before[1..])) {
            *even = pair[1] + factor * (pair[0] - pair[1]);
        }
        for (pair, (odd, &factor)) in x.windows(2).zip(odd.iter_mut().zip(&axis.after)) {
            *odd = pair[0] + factor * (pair[1] - pair[0]);
        }
    }
}

for_every_isa! {
    /// Writes the weighted sum of four rows.
    fn blend(from: [&[f32]; 4], weights: [f32; 4], to: &mut [f32]) {
        let [a, b, c, d] = from.map(|row| &row[..to.len()]);
        for (i, to) in to.iter_mut().enumerate() {
            *to = (weights[0] * a[i] + weights[1] * b[i]) + (weights[2] * c[i] + weights[3] * d[i]);
        }
    }
}

for_every_isa! {
    /// Gathers the gradient of a row from that of its even and odd voxels.
    fn gather_row(even: &[f32], odd: &[f32], axis: &Axis, dx: &mut [f32]) {
        let own = even.iter().zip(odd).zip(axis.before.iter().zip(&axis.after));
        for (dx, ((&even, &odd), (&before, &after))) in dx.iter_mut().zip(own) {
            *dx = (1.0 - before) * even + (1.0 - after) * odd;
        }
        for (dx, (&even, &before)) in dx.iter_mut().zip(even[1..].iter().zip(&axis.before[1..])) {
            *dx += before * even;
        }
        for (dx, (&odd, &after)) in dx[1..].iter_mut().zip(odd.iter().zip(&axis.after)) {
            *dx += after * odd;
        }
    }
}

for_every_isa! {
    /// Sums the 2x2 columns of four rows.
    fn sum_pairs(rows: [&[f32]; 4], to: &mut [f32]) {
        let [a, b, c, d] = rows.map(|row| &row[..2 * to.len()]);
        for (i, to) in to.iter_mut().enumerate() {
            let of_side = |i: usize| (a[i] + b[i]) + (c[i] + d[i]);
            *to = of_side(2 * i) + of_side(2 * i + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{assert_close, normals, same_as_burn, same_for_threads, sets};
    use crate::kernel::{composed, upsample3d_x2};

    const ALL: [Upsampling; 3] = [
        Upsampling::Nearest,
        Upsampling::Trilinear { align_corners: false },
        Upsampling::Trilinear { align_corners: true },
    ];

    /// Single voxels, odd sizes, rows off the lanes.
    const SIZES: [[usize; 3]; 6] = [[1, 1, 1], [1, 2, 3], [3, 1, 5], [2, 7, 16], [5, 4, 33], [4, 6, 8]];

    /// Returns which voxels of an axis voxel `o` of its double is made of, by how much: PyTorch's definition, a position
    /// between two voxels.
    fn sources(how: Upsampling, o: usize, n: usize) -> [(usize, f64); 2] {
        let position = match how {
            Upsampling::Nearest => (o / 2) as f64,
            Upsampling::Trilinear { align_corners: true } => (o * (n - 1)) as f64 / (2 * n - 1) as f64,
            Upsampling::Trilinear { align_corners: false } => ((o as f64 + 0.5) / 2.0 - 0.5).max(0.0),
        };
        let (first, part) = (position.floor() as usize, position.fract());
        [(first, 1.0 - part), ((first + 1).min(n - 1), part)]
    }

    /// Calls `visit(output, input, factor)` with the flat indices of every product of one channel.
    fn products(how: Upsampling, [d, h, w]: [usize; 3], mut visit: impl FnMut(usize, usize, f64)) {
        for o in 0..8 * d * h * w {
            let [z, y, x] = [o / (4 * h * w), o / (2 * w) % (2 * h), o % (2 * w)];
            for (z, of_z) in sources(how, z, d) {
                for (y, of_y) in sources(how, y, h) {
                    for (x, of_x) in sources(how, x, w) {
                        visit(o, (z * h + y) * w + x, of_z * of_y * of_x);
                    }
                }
            }
        }
    }

    #[test]
    fn equals_the_loop() {
        for (how, size) in ALL.into_iter().flat_map(|how| SIZES.map(|size| (how, size))) {
            let voxels: usize = size.iter().product();
            let (x, given) = (normals(3 * voxels, 1), normals(3 * 8 * voxels, 2));
            let (mut out, mut dx) = (vec![0.0; given.len()], vec![0.0; x.len()]);
            for channel in 0..3 {
                products(how, size, |o, i, factor| {
                    let [o, i] = [channel * 8 * voxels + o, channel * voxels + i];
                    out[o] += factor * f64::from(x[i]);
                    dx[i] += factor * f64::from(given[o]);
                });
            }
            for isa in sets() {
                // f32 rounding of three interpolations in a row, or of sums of up to 64 numbers of order 1.
                assert_close(&forward(isa, how, &x, size), &out, 5e-7);
                assert_close(&gradient(isa, how, &given, size), &dx, 5e-7);
            }
        }
    }

    #[test]
    fn equals_burns() {
        for (how, [d, h, w]) in ALL.into_iter().flat_map(|how| SIZES.map(|size| (how, size))) {
            same_as_burn(
                [&[2, 3, d, h, w]],
                |[x]| upsample3d_x2(x.clone(), how),
                |[x]| composed::upsample3d_x2(x.clone(), how),
            );
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (how, size) in ALL.into_iter().flat_map(|how| SIZES.map(|size| (how, size))) {
            let voxels: usize = size.iter().product();
            let (x, given) = (normals(voxels, 1), normals(8 * voxels, 2));
            let run = |isa| (forward(isa, how, &x, size), gradient(isa, how, &given, size));
            assert!(sets().into_iter().all(|isa| run(isa) == run(Isa::Portable)));
        }
    }

    #[test]
    fn ignores_threads() {
        let size = [9, 12, 20];
        let voxels: usize = size.iter().product();
        let (x, given) = (normals(5 * voxels, 1), normals(5 * 8 * voxels, 2));
        for (isa, how) in sets().into_iter().flat_map(|isa| ALL.map(|how| (isa, how))) {
            same_for_threads(|| forward(isa, how, &x, size));
            same_for_threads(|| gradient(isa, how, &given, size));
        }
    }

    #[test]
    fn the_gradient_is_a_slope() {
        let (size, voxels) = ([3, 4, 5], 60);
        let (x, given) = (normals(voxels, 1), normals(8 * voxels, 2));
        for how in ALL {
            let dx = gradient(Isa::best(), how, &given, size);
            let loss = |step: f32| -> f64 {
                let moved: Vec<f32> = x.iter().zip(&dx).map(|(x, d)| x + step * d).collect();
                let out = forward(Isa::best(), how, &moved, size);
                out.iter().zip(&given).map(|(o, g)| f64::from(*o) * f64::from(*g)).sum()
            };
            let square: f64 = dx.iter().map(|d| f64::from(*d).powi(2)).sum();
            // The operator is linear: the quotient's only error is rounding.
            let slope = (loss(0.5) - loss(-0.5)) / square;
            assert!((slope - 1.0).abs() < 1e-5, "{how:?}: {slope}");
        }
    }

    #[test]
    fn a_constant_stays_what_it_is() {
        for how in ALL {
            let out = forward(Isa::best(), how, &[0.1; 2 * 3 * 5], [2, 3, 5]);
            assert!(out.iter().all(|v| *v == 0.1), "{how:?}");
        }
    }
}
