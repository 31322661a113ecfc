//! Gradients of a convolution with respect to its weights and bias.
//!
//! Lanes are summed in `f32` over a run of planes that fits the second-level cache; runs, groups of runs and samples
//! are then added in `f64`, in an order that the shape alone fixes.

use rayon::prelude::*;

use super::isa::{Isa, Lanes, MAX_LANES};
use super::layout::{BLOCK, Geometry, Padded, Vectors};
use super::reduce;

/// Numbers of the gradient's block that stay in the second-level cache (256 KiB) while all input channels pass.
const RUN: usize = 64 * 1024;

/// Tasks aimed at: enough for any desktop, and constant, so that the order of additions is too.
const TASKS: usize = 16;

/// Computes the gradient of the bias: the sum over samples and voxels.
///
/// # Shape
/// gradient `[n, co, voxels]` -> `[co]`.
pub fn bias(gradient: &[f32], co: usize, voxels: usize) -> Vec<f32> {
    let sum = |c: usize| -> f32 {
        let samples = gradient.chunks_exact(co * voxels);
        samples.map(|s| reduce::sum(&s[c * voxels..][..voxels])).sum::<f64>() as f32
    };
    (0..co).into_par_iter().map(sum).collect()
}

/// Computes the gradient of the weights.
///
/// # Shape
/// x `[n, ci, d, h, w]`, gradient `[n, co, d, h, w]` -> `[co, ci, k, k, k]`.
pub fn weight(isa: Isa, g: &Geometry, x: &[f32], gradient: &[f32]) -> Vec<f32> {
    let taps = g.taps();
    let mut total = vec![0.0_f64; g.blocks() * BLOCK * g.ci * taps];
    let samples = x.chunks_exact(g.ci * g.voxels());
    for (x, gradient) in samples.zip(gradient.chunks_exact(g.co * g.voxels())) {
        sample(isa, g, x, gradient, &mut total);
    }
    // total is [block, ci, kz, ky, BLOCK, kx]
    let mut out = Vec::with_capacity(g.co * g.ci * taps);
    for c in 0..g.co {
        for i in 0..g.ci {
            for plane_row in 0..g.k * g.k {
                let at = (((c / BLOCK) * g.ci + i) * g.k * g.k + plane_row) * BLOCK * g.k + (c % BLOCK) * g.k;
                out.extend(total[at..at + g.k].iter().map(|&v| v as f32));
            }
        }
    }
    out
}

/// Adds what one sample contributes.
fn sample(isa: Isa, g: &Geometry, x: &[f32], gradient: &[f32], total: &mut [f64]) {
    let [d, h, w] = g.size;
    let padded = Padded::new(x, g.ci, g.size, g.k, 2 * MAX_LANES);
    let vectors = Vectors::new(h, w, padded.row, isa.lanes());
    let gradient = spread(gradient, g, &vectors);
    let run = (RUN / (BLOCK * vectors.plane)).clamp(1, d);
    let runs = d.div_ceil(run);
    let groups = TASKS.div_ceil(g.blocks()).min(runs);
    let planes_per_group = runs.div_ceil(groups) * run;
    let per_block = g.ci * g.taps() * BLOCK;
    let parts: Vec<Vec<f64>> = (0..g.blocks() * groups)
        .into_par_iter()
        .map(|task| {
            let (block, group) = (task / groups, task % groups);
            let mut sums = vec![0.0; per_block];
            let end = ((group + 1) * planes_per_group).min(d);
            for z in (group * planes_per_group..end).step_by(run) {
                let work = Run {
                    input: &padded.values[z * padded.plane..],
                    strides: [padded.plane, padded.row],
                    gradient: &gradient[(block * BLOCK * d + z) * vectors.plane..],
                    channel: d * vectors.plane,
                    planes: run.min(end - z),
                    vectors,
                };
                work.all_channels(isa, g, padded.channel, &mut sums);
            }
            sums
        })
        .collect();
    for (task, part) in parts.iter().enumerate() {
        let total = &mut total[task / groups * per_block..][..per_block];
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
    }
}

/// Copies a gradient `[co, d, h, w]` to `[blocks * BLOCK, d, vectors.plane]`, zero where there is no voxel.
fn spread(gradient: &[f32], g: &Geometry, vectors: &Vectors) -> Vec<f32> {
    let [d, h, w] = g.size;
    let mut out = vec![0.0; g.blocks() * BLOCK * d * vectors.plane];
    out.par_chunks_mut(d * vectors.plane)
        .zip(gradient.par_chunks(d * h * w))
        .for_each(|(to, from)| {
            for (to, from) in to.chunks_exact_mut(vectors.plane).zip(from.chunks_exact(h * w)) {
                for (y, from) in from.chunks_exact(w).enumerate() {
                    to[y * vectors.pitch..][..w].copy_from_slice(from);
                }
            }
        });
    out
}

/// Some consecutive planes of one block of output channels.
struct Run<'a> {
    /// The padded input from the first plane on.
    input: &'a [f32],
    /// Numbers from plane to plane and row to row of the input.
    strides: [usize; 2],
    /// The spread gradient from the block's first channel and the first plane on.
    gradient: &'a [f32],
    /// Numbers from channel to channel of the gradient.
    channel: usize,
    /// How many planes.
    planes: usize,
    /// How planes are cut.
    vectors: Vectors,
}

impl Run<'_> {
    /// Adds to `sums`, `[ci, kz, ky, BLOCK, kx]`.
    fn all_channels(&self, isa: Isa, g: &Geometry, channel: usize, sums: &mut [f64]) {
        let rows = (0..g.ci).flat_map(|c| (0..g.k).flat_map(move |kz| (0..g.k).map(move |ky| [c, kz, ky])));
        for (sums, [c, kz, ky]) in sums.chunks_exact_mut(BLOCK * g.k).zip(rows) {
            let offset = c * channel + kz * self.strides[0] + ky * self.strides[1];
            self.check(isa, offset, g.k);
            // SAFETY: the instruction set was detected when `isa` was chosen; `check` bounds every access.
            unsafe {
                match (isa, g.k) {
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx512, 3) => self.row_avx512::<3>(offset, sums),
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx512, _) => self.row_avx512::<1>(offset, sums),
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx2, 3) => self.row_avx2::<3>(offset, sums),
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx2, _) => self.row_avx2::<1>(offset, sums),
                    (_, 3) => self.row::<[f32; 4], 3, 1>(offset, sums),
                    _ => self.row::<[f32; 4], 1, 1>(offset, sums),
                }
            }
        }
    }

    /// Asserts that no vector leaves the buffers.
    fn check(&self, isa: Isa, offset: usize, k: usize) {
        let v = &self.vectors;
        let row = v.per_row * isa.lanes();
        let input = offset + (self.planes - 1) * self.strides[0] + (v.rows - 1) * self.strides[1] + row + k - 1;
        assert!(input <= self.input.len(), "vectors stay within the padded input");
        let gradient = (BLOCK - 1) * self.channel + (self.planes - 1) * v.plane + (v.rows - 1) * v.pitch + row;
        assert!(
            gradient <= self.gradient.len(),
            "vectors stay within the spread gradient"
        );
    }

    /// # Safety
    /// As [`Self::row`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn row_avx512<const K: usize>(&self, offset: usize, sums: &mut [f64]) {
        // SAFETY: promised by the caller.
        unsafe { self.row::<std::arch::x86_64::__m512, K, 8>(offset, sums) }
    }

    /// # Safety
    /// As [`Self::row`], and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn row_avx2<const K: usize>(&self, offset: usize, sums: &mut [f64]) {
        // SAFETY: promised by the caller.
        unsafe { self.row::<std::arch::x86_64::__m256, K, 4>(offset, sums) }
    }

    /// Adds one row of taps, for `N` output channels (as many as registers allow) at a time.
    ///
    /// # Safety
    /// [`Self::check`] passed and the processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn row<L: Lanes, const K: usize, const N: usize>(&self, offset: usize, sums: &mut [f64]) {
        let v = self.vectors;
        for (part, sums) in sums.chunks_exact_mut(N * K).enumerate() {
            // SAFETY: `check` bounds every offset below; `t` holds MAX_LANES numbers.
            unsafe {
                let mut acc = [[L::splat(0.0); K]; N];
                for z in 0..self.planes {
                    for y in 0..v.rows {
                        let x = self
                            .input
                            .as_ptr()
                            .add(offset + z * self.strides[0] + y * self.strides[1]);
                        let at = part * N * self.channel + z * v.plane + y * v.pitch;
                        let gradient = self.gradient.as_ptr().add(at);
                        for i in 0..v.per_row {
                            let x: [L; K] = std::array::from_fn(|kx| L::load(x.add(i * L::COUNT + kx)));
                            for (n, acc) in acc.iter_mut().enumerate() {
                                let g = L::load(gradient.add(n * self.channel + i * L::COUNT));
                                for kx in 0..K {
                                    acc[kx] = acc[kx].add_product(x[kx], g);
                                }
                            }
                        }
                    }
                }
                for (sum, acc) in sums.iter_mut().zip(acc.iter().flatten()) {
                    let mut t = [0.0_f32; MAX_LANES];
                    acc.store(t.as_mut_ptr());
                    *sum += t[..L::COUNT].iter().map(|&v| f64::from(v)).sum::<f64>();
                }
            }
        }
    }
}
