//! 3D convolution of stride 1 on the CPU. Where it pays, `winograd` does it; else directly: no im2col, a register tile of
//! 8 output channels by 3 vectors of voxels.
//!
//! Every output is one chain of additions: bias, then input channels in order, taps in order within each. The chain does
//! not depend on threads, batch mates, or how the plane is cut into vectors.

use rayon::prelude::*;

use super::isa::{Isa, Lanes, MAX_LANES};
use super::layout::{BLOCK, Channels, Geometry, Padded, Shared, Vectors, from_zeros, pack, transpose};
use super::winograd;

/// Input channels whose weights and rows stay in the first-level cache while a plane is worked on.
const CHANNELS_AT_A_TIME: usize = 8;

/// Vectors of voxels in a register tile: 8 x 3 sums, 3 inputs and a weight fill the 32 registers of AVX-512.
const TILE: usize = 3;

/// Convolves a batch.
///
/// # Shape
/// x `[n, ci, d, h, w]`, weight `[co, ci, k, k, k]`, bias `[co]` or empty -> `[n, co, d, h, w]`.
pub fn forward(isa: Isa, g: &Geometry, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    of_channels(isa, g, Channels::one(x, g.ci, g.voxels()), weight, bias)
}

/// Convolves as [`forward`] does, from channels that may be those of two tensors.
pub fn of_channels(isa: Isa, g: &Geometry, x: Channels, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    if winograd::pays(g) {
        winograd::forward(isa, g, x, weight, bias)
    } else {
        direct(isa, g, &x.joined(), weight, bias)
    }
}

/// Convolves as [`forward`] does, without filtering.
pub fn direct(isa: Isa, g: &Geometry, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let packed = pack(weight, g);
    let mut biases = bias.to_vec();
    biases.resize(g.blocks() * BLOCK, 0.0);
    let (size_in, size_out) = (g.ci * g.voxels(), g.co * g.voxels());
    let mut out = from_zeros(x.len() / size_in * size_out, g.voxels(), |_, _| ());
    for (x, out) in x.chunks_exact(size_in).zip(out.chunks_exact_mut(size_out)) {
        sample(isa, g, x, [&packed, &biases], out);
    }
    out
}

/// Computes the gradient with respect to the input from that of the output: a convolution with the transposed weights.
///
/// # Shape
/// gradient `[n, co, d, h, w]`, weight `[co, ci, k, k, k]` -> `[n, ci, d, h, w]`.
pub fn input_gradient(isa: Isa, g: &Geometry, gradient: &[f32], weight: &[f32]) -> Vec<f32> {
    forward(isa, &g.transposed(), gradient, &transpose(weight, g), &[])
}

/// Convolves one sample with packed weights and padded biases.
fn sample(isa: Isa, g: &Geometry, x: &[f32], parameters: [&[f32]; 2], out: &mut [f32]) {
    let [d, h, w] = g.size;
    let out = Shared::new(out);
    planes(isa, g, x, parameters, |block, z, sums| {
        for c in 0..BLOCK.min(g.co - block * BLOCK) {
            // SAFETY: (block, c, z) names one plane of the output, and no other task has the same block and z.
            let to = unsafe { out.slice(((block * BLOCK + c) * d + z) * h * w, h * w) };
            for (y, to) in to.chunks_exact_mut(w).enumerate() {
                to.copy_from_slice(sums.row(c, y, w));
            }
        }
    });
}

/// One plane of one block of output channels.
#[derive(Clone, Copy)]
pub struct Sums<'a> {
    values: &'a [f32],
    vectors: Vectors,
}

impl<'a> Sums<'a> {
    /// Returns the first `w` voxels of row y of a channel of the block.
    pub fn row(&self, channel: usize, y: usize, w: usize) -> &'a [f32] {
        &self.values[channel * self.vectors.plane + y * self.vectors.pitch..][..w]
    }
}

/// Convolves one sample with packed weights and padded biases, and calls `finish(block, z, sums)` for every plane of
/// every block, on any thread.
pub fn planes(
    isa: Isa,
    g: &Geometry,
    x: &[f32],
    [packed, biases]: [&[f32]; 2],
    finish: impl Fn(usize, usize, Sums) + Sync,
) {
    let [d, h, w] = g.size;
    let padded = Padded::new(x, g.ci, g.size, g.k, 2 * MAX_LANES);
    let vectors = Vectors::new(h, w, padded.row, isa.lanes());
    let starts = starts(&vectors, padded.row, isa.lanes());
    let blocks = g.blocks();
    (0..d * blocks).into_par_iter().for_each_init(
        || vec![0.0; BLOCK * vectors.plane],
        |sums, task| {
            let (z, block) = (task / blocks, task % blocks);
            let live = BLOCK.min(g.co - block * BLOCK);
            for (sums, &bias) in sums
                .chunks_exact_mut(vectors.plane)
                .zip(&biases[block * BLOCK..][..live])
            {
                sums.fill(bias);
            }
            for first in (0..g.ci).step_by(CHANNELS_AT_A_TIME) {
                let at = (block * g.ci + first) * g.taps() * BLOCK;
                let plane = Plane {
                    input: &padded.values[first * padded.channel + z * padded.plane..],
                    strides: [padded.channel, padded.plane, padded.row],
                    channels: CHANNELS_AT_A_TIME.min(g.ci - first),
                    k: g.k,
                    weights: &packed[at..],
                    starts: &starts,
                    live,
                };
                plane.add(isa, sums, vectors.plane);
            }
            finish(block, z, Sums { values: sums, vectors });
        },
    );
}

/// Lists where each vector of a plane starts, in the padded input and in the sums.
fn starts(vectors: &Vectors, padded_row: usize, lanes: usize) -> Vec<[usize; 2]> {
    let rows = 0..vectors.rows;
    rows.flat_map(|y| (0..vectors.per_row).map(move |v| [y * padded_row + v * lanes, y * vectors.pitch + v * lanes]))
        .collect()
}

/// What some input channels add to one plane of one block of output channels.
struct Plane<'a> {
    /// The padded input from the first channel and the plane of the first tap on.
    input: &'a [f32],
    /// Numbers from channel to channel, plane to plane, row to row of the input.
    strides: [usize; 3],
    /// How many input channels.
    channels: usize,
    /// Side of the kernel.
    k: usize,
    /// Weights `[channels, taps, BLOCK]`.
    weights: &'a [f32],
    /// Starts of the vectors in input and sums.
    starts: &'a [[usize; 2]],
    /// Output channels that the block really has.
    live: usize,
}

impl Plane<'_> {
    /// Adds to `sums`, `[BLOCK, plane]`.
    fn add(&self, isa: Isa, sums: &mut [f32], plane: usize) {
        let lanes = isa.lanes();
        let [channel, z, row] = self.strides;
        let last = self.starts.last().map_or([0, 0], |&s| s);
        let reach = (self.channels - 1) * channel + (self.k - 1) * (z + row + 1) + last[0] + lanes;
        assert!(reach <= self.input.len(), "vectors stay within the padded input");
        assert!(
            (BLOCK - 1) * plane + last[1] + lanes <= sums.len(),
            "vectors stay within the sums"
        );
        assert!(self.channels * self.k * self.k * self.k * BLOCK <= self.weights.len());
        // SAFETY: the instruction set was detected when `isa` was chosen, and the three assertions bound every access:
        // starts ascend, so the last one reaches furthest.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => self.add_avx512(sums.as_mut_ptr(), plane),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.add_avx2(sums.as_mut_ptr(), plane),
                _ => self.add_kernel::<[f32; 4], 2>(sums.as_mut_ptr(), plane),
            }
        }
    }

    /// # Safety
    /// As [`Self::add_tiles`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn add_avx512(&self, sums: *mut f32, plane: usize) {
        // SAFETY: promised by the caller.
        unsafe {
            match self.live {
                // Half a tile: a network of 12 channels would waste a quarter of the work otherwise.
                ..=4 => self.add_kernel::<std::arch::x86_64::__m512, 4>(sums, plane),
                _ => self.add_kernel::<std::arch::x86_64::__m512, 8>(sums, plane),
            }
        }
    }

    /// # Safety
    /// As [`Self::add_tiles`], and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_avx2(&self, sums: *mut f32, plane: usize) {
        // SAFETY: promised by the caller.
        unsafe { self.add_kernel::<std::arch::x86_64::__m256, 4>(sums, plane) }
    }

    /// Fixes the side of the kernel, so that the compiler unrolls its rows.
    ///
    /// # Safety
    /// As [`Self::add_tiles`].
    #[inline(always)]
    unsafe fn add_kernel<L: Lanes, const N: usize>(&self, sums: *mut f32, plane: usize) {
        // SAFETY: promised by the caller; Geometry allows these two sides.
        unsafe {
            match self.k {
                3 => self.add_tiles::<L, 3, N>(sums, plane),
                _ => self.add_tiles::<L, 1, N>(sums, plane),
            }
        }
    }

    /// Goes through the plane, `N` output channels (as many as registers allow) at a time.
    ///
    /// # Safety
    /// The bounds asserted by [`Self::add`] hold and the processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn add_tiles<L: Lanes, const K: usize, const N: usize>(&self, sums: *mut f32, plane: usize) {
        for starts in self.starts.chunks(TILE) {
            for first in (0..self.live).step_by(N) {
                // SAFETY: promised by the caller; N divides BLOCK, so that `first + N <= BLOCK`.
                unsafe {
                    let sums = sums.add(first * plane);
                    match *starts {
                        [a, b, c] => self.tile::<L, K, 3, N>([a, b, c], first, sums, plane),
                        [a, b] => self.tile::<L, K, 2, N>([a, b], first, sums, plane),
                        [a] => self.tile::<L, K, 1, N>([a], first, sums, plane),
                        _ => {}
                    }
                }
            }
        }
    }

    /// Adds to `V` vectors of `N` output channels.
    ///
    /// # Safety
    /// As [`Self::add_tiles`].
    #[expect(
        clippy::needless_range_loop,
        reason = "iterators take the sums' address, which keeps them out of registers: half the speed"
    )]
    #[inline(always)]
    unsafe fn tile<L: Lanes, const K: usize, const V: usize, const N: usize>(
        &self,
        starts: [[usize; 2]; V],
        first: usize,
        sums: *mut f32,
        plane: usize,
    ) {
        let [channel, z, row] = self.strides;
        // SAFETY: the assertions of `add` bound all offsets below.
        unsafe {
            let mut acc: [[L; V]; N] =
                std::array::from_fn(|n| std::array::from_fn(|v| L::load(sums.add(n * plane + starts[v][1]))));
            let inputs: [*const f32; V] = std::array::from_fn(|v| self.input.as_ptr().add(starts[v][0]));
            let mut weight = self.weights.as_ptr().add(first);
            for c in 0..self.channels {
                for kz in 0..K {
                    for ky in 0..K {
                        let at = c * channel + kz * z + ky * row;
                        for kx in 0..K {
                            let x: [L; V] = std::array::from_fn(|v| L::load(inputs[v].add(at + kx)));
                            for n in 0..N {
                                let scale = L::splat(*weight.add(n));
                                for v in 0..V {
                                    acc[n][v] = acc[n][v].add_product(x[v], scale);
                                }
                            }
                            weight = weight.add(BLOCK);
                        }
                    }
                }
            }
            for n in 0..N {
                for v in 0..V {
                    acc[n][v].store(sums.add(n * plane + starts[v][1]));
                }
            }
        }
    }
}
