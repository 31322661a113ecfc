//! Gradients of a convolution with respect to its weights and bias; those of the weights directly where
//! `winograd` does not pay.
//!
//! Every lane is summed in `f32` over a strip that fits the first-level cache, then over the strips of a task; lanes,
//! tasks and samples are added in `f64`. The shape alone fixes strips, tasks and the order of additions.

use rayon::prelude::*;

use super::isa::{Isa, Lanes, MAX_LANES};
use super::layout::{BLOCK, Channels, Geometry, Padded, Vectors, from_zeros};
use super::{reduce, winograd};

/// Numbers of the gradient's block in a strip (24 KiB), which is read again for every input channel and row of taps.
const STRIP: usize = 6 * 1024;

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
    of_channels(isa, g, Channels::one(x, g.ci, g.voxels()), gradient)
}

/// Computes what [`weight`] does, from channels that may be those of two tensors.
pub fn of_channels(isa: Isa, g: &Geometry, x: Channels, gradient: &[f32]) -> Vec<f32> {
    if winograd::pays(g) {
        winograd::weight(isa, g, x, gradient)
    } else {
        direct(isa, g, &x.joined(), gradient)
    }
}

/// Computes what [`weight`] does, without filtering.
pub fn direct(isa: Isa, g: &Geometry, x: &[f32], gradient: &[f32]) -> Vec<f32> {
    let samples = x.chunks_exact(g.ci * g.voxels());
    of_padded(isa, g, samples.map(|x| Padded::new(x, g)), gradient)
}

/// Computes the gradient from samples of input that are laid out already; `g` has the voxels of the output.
pub fn of_padded<'a>(isa: Isa, g: &Geometry, samples: impl Iterator<Item = Padded<'a>>, gradient: &[f32]) -> Vec<f32> {
    let taps = g.taps();
    let mut total = vec![0.0_f64; g.blocks() * BLOCK * g.ci * taps];
    for (input, gradient) in samples.zip(gradient.chunks_exact(g.co * g.voxels())) {
        sample(isa, g, &input, gradient, &mut total);
    }
    // total is [block, ci, kz, ky, BLOCK, kx]
    from_zeros(g.co * g.ci * taps, g.ci * taps, |c, to| {
        let of_block = &total[c / BLOCK * g.ci * taps * BLOCK..][..g.ci * taps * BLOCK];
        for (to, from) in to.chunks_exact_mut(g.k).zip(of_block.chunks_exact(BLOCK * g.k)) {
            let row = &from[c % BLOCK * g.k..][..g.k];
            to.iter_mut().zip(row).for_each(|(to, &sum)| *to = sum as f32);
        }
    })
}

/// Adds what one sample contributes.
fn sample(isa: Isa, g: &Geometry, padded: &Padded, gradient: &[f32], total: &mut [f64]) {
    let [d, h, w] = g.size;
    let lanes = isa.lanes();
    let vectors = Vectors::new(h, w, padded.row, lanes);
    let gradient = spread(gradient, g, &vectors);
    let strips = strips(&vectors, d, [padded.plane, padded.row], lanes);
    let groups = TASKS.div_ceil(g.blocks()).min(strips.len());
    let per_group = strips.len().div_ceil(groups);
    let per_block = g.ci * g.taps() * BLOCK;
    let parts: Vec<Vec<f64>> = (0..g.blocks() * groups)
        .into_par_iter()
        .map(|task| {
            let (block, group) = (task / groups, task % groups);
            let mut sums = vec![0.0; per_block * lanes];
            for &strip in strips.iter().skip(group * per_group).take(per_group) {
                let work = Work {
                    input: &padded.values,
                    strides: [padded.plane, padded.row],
                    gradient: &gradient[block * BLOCK * d * vectors.plane..],
                    channel: d * vectors.plane,
                    vectors,
                    strip,
                    live: BLOCK.min(g.co - block * BLOCK),
                };
                work.all_channels(isa, g, padded, &mut sums);
            }
            sums.chunks_exact(lanes).map(across).collect()
        })
        .collect();
    let of_blocks = total
        .par_chunks_exact_mut(per_block)
        .zip(parts.par_chunks_exact(groups));
    of_blocks.for_each(|(total, parts)| {
        for part in parts {
            total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
        }
    });
}

/// Sums the lanes of one register: halves of it first, so that the additions fit registers, too.
fn across(lanes: &[f32]) -> f64 {
    match lanes {
        [a, b, c, d] => (f64::from(*a) + f64::from(*c)) + (f64::from(*b) + f64::from(*d)),
        _ => {
            let mut sums: [f64; MAX_LANES / 2] = [0.0; MAX_LANES / 2];
            for half in lanes.chunks(MAX_LANES / 2) {
                sums.iter_mut().zip(half).for_each(|(sum, v)| *sum += f64::from(*v));
            }
            let quarters: [f64; 4] = std::array::from_fn(|i| sums[i] + sums[i + 4]);
            (quarters[0] + quarters[2]) + (quarters[1] + quarters[3])
        }
    }
}

/// A part of the voxels: whole planes, or some rows of one plane, or some vectors of one plane that is a single row.
#[derive(Clone, Copy)]
struct Strip {
    /// Where it starts in a channel of the padded input, and in one of the spread gradient.
    starts: [usize; 2],
    /// Planes, rows per plane, vectors per row.
    counts: [usize; 3],
}

/// Cuts a channel of `d` planes into strips, in order.
fn strips(vectors: &Vectors, d: usize, [plane, row]: [usize; 2], lanes: usize) -> Vec<Strip> {
    let room = STRIP / BLOCK;
    let mut out = Vec::new();
    let planes = (room / vectors.plane).max(1);
    let (rows, columns) = match vectors.rows {
        1 => (1, (room / lanes).clamp(1, vectors.per_row)),
        rows => ((room / vectors.pitch).clamp(1, rows), vectors.per_row),
    };
    for z in (0..d).step_by(planes) {
        for y in (0..vectors.rows).step_by(rows) {
            for v in (0..vectors.per_row).step_by(columns) {
                out.push(Strip {
                    starts: [
                        z * plane + y * row + v * lanes,
                        z * vectors.plane + y * vectors.pitch + v * lanes,
                    ],
                    counts: [
                        planes.min(d - z),
                        rows.min(vectors.rows - y),
                        columns.min(vectors.per_row - v),
                    ],
                });
            }
        }
    }
    out
}

/// Copies a gradient `[co, d, h, w]` to `[blocks * BLOCK, d, vectors.plane]`, zero where there is no voxel.
fn spread(gradient: &[f32], g: &Geometry, vectors: &Vectors) -> Vec<f32> {
    let [d, h, w] = g.size;
    let channel = d * vectors.plane;
    from_zeros(g.blocks() * BLOCK * channel, channel, |c, to| {
        // The last block's channels may outnumber the gradient's.
        let of_channel = gradient.chunks_exact(d * h * w).nth(c).unwrap_or_default();
        for (to, from) in to.chunks_exact_mut(vectors.plane).zip(of_channel.chunks_exact(h * w)) {
            for (y, from) in from.chunks_exact(w).enumerate() {
                to[y * vectors.pitch..][..w].copy_from_slice(from);
            }
        }
    })
}

/// One strip of one block of output channels.
struct Work<'a> {
    /// The padded input.
    input: &'a [f32],
    /// Numbers from plane to plane and row to row of the input.
    strides: [usize; 2],
    /// The spread gradient from the block's first channel on.
    gradient: &'a [f32],
    /// Numbers from channel to channel of the gradient.
    channel: usize,
    /// How planes are cut.
    vectors: Vectors,
    /// The strip.
    strip: Strip,
    /// Output channels that the block really has.
    live: usize,
}

impl Work<'_> {
    /// Adds to `sums`, `[ci, kz, ky, BLOCK, kx, lanes]`.
    fn all_channels(&self, isa: Isa, g: &Geometry, padded: &Padded, sums: &mut [f32]) {
        let rows = (0..g.ci).flat_map(|c| {
            padded
                .taps
                .chunks_exact(g.k)
                .map(move |taps| (c * padded.channel, taps))
        });
        for (sums, (channel, taps)) in sums.chunks_exact_mut(BLOCK * g.k * isa.lanes()).zip(rows) {
            let offset = self.strip.starts[0] + channel;
            self.check(isa, offset, taps);
            // SAFETY: the instruction set was detected when `isa` was chosen; `check` bounds every read and the chunk
            // holds BLOCK x k registers.
            unsafe {
                match (isa, g.k) {
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx512, 3) => self.row_avx512::<3>(offset, taps, sums),
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx512, _) => self.row_avx512::<1>(offset, taps, sums),
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx2, 3) => self.row_avx2::<3>(offset, taps, sums),
                    #[cfg(target_arch = "x86_64")]
                    (Isa::Avx2, _) => self.row_avx2::<1>(offset, taps, sums),
                    (_, 3) => self.row::<[f32; 4], 3, 1>(offset, taps, sums),
                    _ => self.row::<[f32; 4], 1, 1>(offset, taps, sums),
                }
            }
        }
    }

    /// Asserts that no vector leaves the buffers.
    fn check(&self, isa: Isa, offset: usize, taps: &[usize]) {
        let (v, [planes, rows, columns]) = (&self.vectors, self.strip.counts);
        let row = columns * isa.lanes();
        let furthest = taps.iter().max().map_or(0, |&shift| shift);
        let input = offset + (planes - 1) * self.strides[0] + (rows - 1) * self.strides[1] + row + furthest;
        assert!(input <= self.input.len(), "vectors stay within the padded input");
        let last = self.strip.starts[1] + (planes - 1) * v.plane + (rows - 1) * v.pitch + row;
        assert!(
            (BLOCK - 1) * self.channel + last <= self.gradient.len(),
            "vectors stay within the spread gradient"
        );
    }

    /// # Safety
    /// As [`Self::row`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn row_avx512<const K: usize>(&self, offset: usize, taps: &[usize], sums: &mut [f32]) {
        // SAFETY: promised by the caller.
        unsafe {
            match self.live {
                // Half a tile: a network of 12 channels would waste a quarter of the work otherwise.
                ..=4 => self.row::<std::arch::x86_64::__m512, K, 4>(offset, taps, sums),
                _ => self.row::<std::arch::x86_64::__m512, K, 8>(offset, taps, sums),
            }
        }
    }

    /// # Safety
    /// As [`Self::row`], and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn row_avx2<const K: usize>(&self, offset: usize, taps: &[usize], sums: &mut [f32]) {
        // SAFETY: promised by the caller.
        unsafe { self.row::<std::arch::x86_64::__m256, K, 4>(offset, taps, sums) }
    }

    /// Adds one row of taps, for `N` output channels (as many as registers allow) at a time.
    ///
    /// # Safety
    /// [`Self::check`] passed, `sums` holds BLOCK x K registers, and the processor has the instructions of `L`.
    #[expect(
        clippy::needless_range_loop,
        reason = "iterators take the sums' address, which keeps them out of registers: half the speed"
    )]
    #[inline(always)]
    unsafe fn row<L: Lanes, const K: usize, const N: usize>(&self, offset: usize, taps: &[usize], sums: &mut [f32]) {
        let (v, [planes, rows, columns]) = (self.vectors, self.strip.counts);
        let live = self.live.div_ceil(N);
        let taps: [usize; K] = std::array::from_fn(|kx| taps[kx]);
        for (part, sums) in sums.chunks_exact_mut(N * K * L::COUNT).take(live).enumerate() {
            // SAFETY: `check` bounds every read, and the chunk holds N x K registers.
            unsafe {
                let mut acc = [[L::splat(0.0); K]; N];
                for z in 0..planes {
                    for y in 0..rows {
                        let x = self
                            .input
                            .as_ptr()
                            .add(offset + z * self.strides[0] + y * self.strides[1]);
                        let at = part * N * self.channel + self.strip.starts[1] + z * v.plane + y * v.pitch;
                        let gradient = self.gradient.as_ptr().add(at);
                        for i in 0..columns {
                            let x: [L; K] = std::array::from_fn(|kx| L::load(x.add(i * L::COUNT + taps[kx])));
                            for n in 0..N {
                                let g = L::load(gradient.add(n * self.channel + i * L::COUNT));
                                for kx in 0..K {
                                    acc[n][kx] = acc[n][kx].add_product(x[kx], g);
                                }
                            }
                        }
                    }
                }
                let one = L::splat(1.0);
                for n in 0..N {
                    for kx in 0..K {
                        let sum = sums.as_mut_ptr().add((n * K + kx) * L::COUNT);
                        L::load(sum).add_product(acc[n][kx], one).store(sum);
                    }
                }
            }
        }
    }
}
