//! 3D convolution of stride 1 on the CPU. Where it pays, `winograd` does it; else directly: no im2col, a register tile of
//! 8 output channels by 3 vectors of voxels. What a tap reads is a table of shifts, so that `strided` is this kernel, too.
//!
//! Every output is one chain of additions: bias, then input channels in order, taps in order within each. The chain does
//! not depend on threads, batch mates, or how the plane is cut into vectors. It is of single precision, but for kernels of
//! side 3 over up to three channels: an image's first convolution, whose rounding all further layers inherit and magnify
//! (a norm divides by what little varies), has its few products summed in double.

use rayon::prelude::*;

use super::isa::{Accumulator, Isa};
use super::layout::{BLOCK, Channels, Geometry, Padded, Shared, Vectors, from_zeros, pack, transpose};
use super::{wide, winograd};

/// Taps times input channels whose weights (7 KiB) stay in the first-level cache while a plane is worked on.
const PRODUCTS_AT_A_TIME: usize = 8 * 27;

/// Most input channels of a kernel of side 3 whose products are summed in double precision: 81 products, fewer than are worked on
/// [at a time](PRODUCTS_AT_A_TIME), so that no sum is rounded on the way.
const WIDE_CHANNELS: usize = 3;
const _: () = assert!(27 * WIDE_CHANNELS <= PRODUCTS_AT_A_TIME);

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
    let samples = x.chunks_exact(g.ci * g.voxels());
    of_padded(isa, g, samples.map(|x| Padded::new(x, g)), weight, bias)
}

/// Convolves samples that are laid out already; `g` has the voxels of the output.
pub fn of_padded<'a>(
    isa: Isa,
    g: &Geometry,
    samples: impl ExactSizeIterator<Item = Padded<'a>>,
    weight: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    let packed = pack(weight, [g.co, g.ci, g.taps()]);
    let mut biases = bias.to_vec();
    biases.resize(g.blocks() * BLOCK, 0.0);
    let size = g.co * g.voxels();
    let mut out = from_zeros(samples.len() * size, g.voxels(), |_, _| ());
    for (input, out) in samples.zip(out.chunks_exact_mut(size)) {
        sample(isa, g, &input, [&packed, &biases], out);
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
fn sample(isa: Isa, g: &Geometry, input: &Padded, parameters: [&[f32]; 2], out: &mut [f32]) {
    let [d, h, w] = g.size;
    let out = Shared::new(out);
    planes(isa, g, input, parameters, |block, z, sums| {
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
    input: &Padded,
    [packed, biases]: [&[f32]; 2],
    finish: impl Fn(usize, usize, Sums) + Sync,
) {
    let direct = Direct::new(isa, g, input);
    let blocks = g.blocks();
    (0..g.size[0] * blocks).into_par_iter().for_each_init(
        || vec![0.0; direct.numbers()],
        |sums, task| {
            let (z, block) = (task / blocks, task % blocks);
            let live = BLOCK.min(g.co - block * BLOCK);
            direct.start(sums, &biases[block * BLOCK..][..live]);
            let taps = Taps {
                shifts: &input.taps,
                weights: &packed[block * g.ci * g.taps() * BLOCK..],
            };
            direct.add(z, taps, live, sums);
            finish(block, z, direct.sums(sums));
        },
    );
}

/// The taps that make up a sum.
#[derive(Clone, Copy)]
pub struct Taps<'a> {
    /// Where each reads, in numbers from a voxel's place in the input.
    pub shifts: &'a [usize],
    /// `[ci, taps, BLOCK]`, and whatever follows.
    pub weights: &'a [f32],
}

/// The direct convolution of one sample, whose planes of output are cut into vectors.
pub struct Direct<'a> {
    isa: Isa,
    input: &'a Padded<'a>,
    ci: usize,
    vectors: Vectors,
    /// Starts of the vectors in a plane of input and of sums.
    starts: Vec<[usize; 2]>,
    /// Whether sums are of double precision.
    is_wide: bool,
}

impl<'a> Direct<'a> {
    /// Cuts the planes of an output that has the voxels of `g`.
    pub fn new(isa: Isa, g: &Geometry, input: &'a Padded<'a>) -> Self {
        let (vectors, lanes) = (Vectors::new(g.size[1], g.size[2], input.row, isa.lanes()), isa.lanes());
        let rows = (0..vectors.rows).map(|y| [y * input.row, y * vectors.pitch]);
        let starts = rows
            .flat_map(|row| (0..vectors.per_row).map(move |v| row.map(|start| start + v * lanes)))
            .collect();
        Self {
            isa,
            input,
            ci: g.ci,
            vectors,
            starts,
            is_wide: g.k == 3 && g.ci <= WIDE_CHANNELS,
        }
    }

    /// Returns the numbers of one block's sums.
    pub fn numbers(&self) -> usize {
        BLOCK * self.vectors.plane
    }

    /// Sets the sums of as many channels as there are biases.
    pub fn start(&self, sums: &mut [f32], biases: &[f32]) {
        for (sums, &bias) in sums.chunks_exact_mut(self.vectors.plane).zip(biases) {
            sums.fill(bias);
        }
    }

    /// Names the rows of sums.
    pub fn sums<'b>(&self, values: &'b [f32]) -> Sums<'b> {
        Sums {
            values,
            vectors: self.vectors,
        }
    }

    /// Adds the products of plane z of one block, which really has `live` channels, to its sums.
    pub fn add(&self, z: usize, taps: Taps, live: usize, sums: &mut [f32]) {
        let at_a_time = (PRODUCTS_AT_A_TIME / taps.shifts.len().max(1)).max(1);
        for first in (0..self.ci).step_by(at_a_time) {
            let plane = Plane {
                input: &self.input.values[first * self.input.channel + z * self.input.plane..],
                channel: self.input.channel,
                channels: at_a_time.min(self.ci - first),
                taps: taps.shifts,
                weights: &taps.weights[first * taps.shifts.len() * BLOCK..],
                starts: &self.starts,
                live,
                is_wide: self.is_wide,
            };
            plane.add(self.isa, sums, self.vectors.plane);
        }
    }
}

/// What some input channels add to one plane of one block of output channels.
struct Plane<'a> {
    /// The padded input from the first channel's plane on.
    input: &'a [f32],
    /// Numbers from channel to channel of the input.
    channel: usize,
    /// How many input channels.
    channels: usize,
    /// Shifts of the taps.
    taps: &'a [usize],
    /// Weights `[channels, taps, BLOCK]`.
    weights: &'a [f32],
    /// Starts of the vectors in input and sums.
    starts: &'a [[usize; 2]],
    /// Output channels that the block really has.
    live: usize,
    /// Whether sums are of double precision.
    is_wide: bool,
}

impl Plane<'_> {
    /// Adds to `sums`, `[BLOCK, plane]`.
    fn add(&self, isa: Isa, sums: &mut [f32], plane: usize) {
        let lanes = isa.lanes();
        let last = self.starts.last().map_or([0, 0], |&s| s);
        let furthest = self.taps.iter().max().map_or(0, |&shift| shift);
        let reach = (self.channels - 1) * self.channel + furthest + last[0] + lanes;
        assert!(reach <= self.input.len(), "vectors stay within the padded input");
        assert!(
            (BLOCK - 1) * plane + last[1] + lanes <= sums.len(),
            "vectors stay within the sums"
        );
        assert!(self.channels * self.taps.len() * BLOCK <= self.weights.len());
        // SAFETY: the instruction set was detected when `isa` was chosen, and the three assertions bound every access:
        // starts ascend, so the last one reaches furthest.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => self.add_avx512(sums.as_mut_ptr(), plane),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.add_avx2(sums.as_mut_ptr(), plane),
                _ if self.is_wide => self.add_tiles::<[f64; 4], 2>(sums.as_mut_ptr(), plane),
                _ => self.add_tiles::<[f32; 4], 2>(sums.as_mut_ptr(), plane),
            }
        }
    }

    /// # Safety
    /// As [`Self::add_tiles`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn add_avx512(&self, sums: *mut f32, plane: usize) {
        use std::arch::x86_64::{__m512, __m512d};
        // SAFETY: promised by the caller.
        unsafe {
            match self.live {
                _ if self.is_wide => self.add_tiles::<wide::Wide<__m512d>, 4>(sums, plane),
                // Half a tile: a network of 12 channels would waste a quarter of the work otherwise.
                ..=4 => self.add_tiles::<__m512, 4>(sums, plane),
                _ => self.add_tiles::<__m512, 8>(sums, plane),
            }
        }
    }

    /// # Safety
    /// As [`Self::add_tiles`], and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_avx2(&self, sums: *mut f32, plane: usize) {
        use std::arch::x86_64::{__m256, __m256d};
        // SAFETY: promised by the caller.
        unsafe {
            if self.is_wide {
                self.add_tiles::<wide::Wide<__m256d>, 2>(sums, plane);
            } else {
                self.add_tiles::<__m256, 4>(sums, plane);
            }
        }
    }

    /// Goes through the plane, `N` output channels (as many as registers allow) at a time.
    ///
    /// # Safety
    /// The bounds asserted by [`Self::add`] hold and the processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn add_tiles<L: Accumulator, const N: usize>(&self, sums: *mut f32, plane: usize) {
        for starts in self.starts.chunks(TILE) {
            for first in (0..self.live).step_by(N) {
                // SAFETY: promised by the caller; N divides BLOCK, so that `first + N <= BLOCK`.
                unsafe {
                    let sums = sums.add(first * plane);
                    match *starts {
                        [a, b, c] => self.tile::<L, 3, N>([a, b, c], first, sums, plane),
                        [a, b] => self.tile::<L, 2, N>([a, b], first, sums, plane),
                        [a] => self.tile::<L, 1, N>([a], first, sums, plane),
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
    unsafe fn tile<L: Accumulator, const V: usize, const N: usize>(
        &self,
        starts: [[usize; 2]; V],
        first: usize,
        sums: *mut f32,
        plane: usize,
    ) {
        // SAFETY: the assertions of `add` bound all offsets below.
        unsafe {
            let mut acc: [[L; V]; N] =
                std::array::from_fn(|n| std::array::from_fn(|v| L::load(sums.add(n * plane + starts[v][1]))));
            let inputs: [*const f32; V] = std::array::from_fn(|v| self.input.as_ptr().add(starts[v][0]));
            let mut weight = self.weights.as_ptr().add(first);
            for c in 0..self.channels {
                for &tap in self.taps {
                    let at = c * self.channel + tap;
                    let x: [L; V] = std::array::from_fn(|v| L::load(inputs[v].add(at)));
                    for n in 0..N {
                        let scale = L::splat(*weight.add(n));
                        for v in 0..V {
                            acc[n][v] = acc[n][v].add_product(x[v], scale);
                        }
                    }
                    weight = weight.add(BLOCK);
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
