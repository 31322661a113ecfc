//! The gradient of a convolution's weights by minimal filtering: the transpose of what `forward` computes.
//!
//! With T the output's gradient filtered by A along z and y, the gradient of `U[point][co][ci][tap]` is the sum over
//! columns of `T[point][co]` times `V[point][ci]` shifted by the tap; G^T turns the points back into taps along z and y.
//!
//! Every lane is summed in `f32` over the columns of a unit; lanes are then added as a tree, units and samples in `f64`.
//! The shape alone fixes units, tasks and the order of additions.

use rayon::prelude::*;

use super::super::isa::{Isa, Lanes, MAX_LANES};
use super::super::layout::{BLOCK, Channels, Geometry, with_scratch};
use super::unit::{Filtered, Unit};
use super::{POINTS, TAPS};

/// Numbers of V that a unit aims at (2 MiB): longer units spend less on adding lanes, and one point's part still fits the
/// second-level cache.
const V_NUMBERS: usize = 512 * 1024;

/// Columns whose block of T (16 KiB) stays in the first-level cache while all input channels go by.
const CHUNK: usize = 512;

/// Blocks of output channels of a task: V is made anew for each task.
const BLOCKS_AT_A_TIME: usize = 4;

/// Tasks aimed at: enough for any desktop, and constant, so that the order of additions is too.
const TASKS: usize = 16;

/// Numbers of the gradient of U that one point, block and input channel has.
const FILTERS: usize = BLOCK * TAPS;

/// Computes the gradient of the weights.
///
/// # Shape
/// x `[n, ci, d, h, w]`, gradient `[n, co, d, h, w]` -> `[co, ci, 3, 3, 3]`.
pub fn weight(isa: Isa, g: &Geometry, x: Channels, gradient: &[f32]) -> Vec<f32> {
    let samples = x.samples();
    let units = Unit::list(g.size, (V_NUMBERS / (POINTS * g.ci)).max(CHUNK));
    let rounds = samples * units.len();
    let parts = g.blocks().div_ceil(BLOCKS_AT_A_TIME);
    let groups = TASKS.div_ceil(parts).min(rounds);
    let per_group = rounds.div_ceil(groups);
    let totals: Vec<Vec<f64>> = (0..parts * groups)
        .into_par_iter()
        .map(|task| {
            let (part, group) = (task / groups, task % groups);
            let first = part * BLOCKS_AT_A_TIME;
            let blocks = first..(first + BLOCKS_AT_A_TIME).min(g.blocks());
            let mut totals = vec![0.0; blocks.len() * POINTS * g.ci * FILTERS];
            for round in (group * per_group..rounds).take(per_group) {
                let (sample, unit) = (round / units.len(), &units[round % units.len()]);
                let work = Work {
                    isa,
                    g,
                    unit,
                    x,
                    sample,
                    gradient: &gradient[sample * g.co * g.voxels()..][..g.co * g.voxels()],
                };
                work.add(blocks.clone(), &mut totals);
            }
            totals
        })
        .collect();
    let mut sums = totals.chunks(groups);
    let mut out = Vec::with_capacity(g.co * g.ci * g.taps());
    for first in (0..g.blocks()).step_by(BLOCKS_AT_A_TIME) {
        let [total, others @ ..] = sums.next().unwrap_or_default() else {
            continue;
        };
        let mut total = total.clone();
        for other in others {
            total.iter_mut().zip(other).for_each(|(sum, v)| *sum += v);
        }
        let channels = (g.co - first * BLOCK).min(BLOCKS_AT_A_TIME * BLOCK);
        for channel in 0..channels {
            for ci in 0..g.ci {
                out.extend(kernel_of(&total, g, channel, ci));
            }
        }
    }
    out
}

/// G^T of F(2, 3).
fn weight_gradient_filter([a, b, c, d]: [f64; 4]) -> [f64; 3] {
    [a + 0.5 * (b + c), 0.5 * (b - c), 0.5 * (b + c) + d]
}

/// Turns the gradient of U of one pair of channels into that of their kernel.
fn kernel_of(total: &[f64], g: &Geometry, channel: usize, ci: usize) -> [f32; 27] {
    let at = |point: usize, tap: usize| {
        let row = ((channel / BLOCK) * POINTS + point) * g.ci + ci;
        total[row * FILTERS + channel % BLOCK * TAPS + tap]
    };
    let mut kernel = [0.0; 27];
    for tap in 0..TAPS {
        let along_y: [[f64; 3]; 4] =
            std::array::from_fn(|a| weight_gradient_filter(std::array::from_fn(|b| at(4 * a + b, tap))));
        for y in 0..3 {
            let along_z = weight_gradient_filter(std::array::from_fn(|a| along_y[a][y]));
            for z in 0..3 {
                kernel[9 * z + 3 * y + tap] = along_z[z] as f32;
            }
        }
    }
    kernel
}

/// One unit of one sample.
struct Work<'a> {
    isa: Isa,
    g: &'a Geometry,
    unit: &'a Unit,
    /// `[n, ci, d, h, w]`.
    x: Channels<'a>,
    sample: usize,
    /// The sample's, `[co, d, h, w]`.
    gradient: &'a [f32],
}

impl Work<'_> {
    /// Adds to the gradient of U, `[block, POINTS, ci, BLOCK, TAPS]`.
    fn add(&self, blocks: std::ops::Range<usize>, totals: &mut [f64]) {
        let (g, unit, stride) = (self.g, self.unit, self.unit.stride());
        let channels = blocks.start * BLOCK..(blocks.end * BLOCK).min(g.co);
        let [v_point, t_point] = [unit.point(g.ci), unit.point(blocks.len() * BLOCK)];
        let sums_size = g.ci * FILTERS * MAX_LANES;
        let room = unit.input_room() + POINTS * (v_point + t_point) + sums_size;
        with_scratch(room, |scratch| {
            let (rows, rest) = scratch.split_at_mut(unit.input_room());
            let (v, rest) = rest.split_at_mut(POINTS * v_point);
            let (t, sums) = rest.split_at_mut(POINTS * t_point);
            for (channel, x) in self.x.of_sample(self.sample).enumerate() {
                unit.filter_input(
                    self.isa,
                    x,
                    g.size,
                    Filtered {
                        rows: &mut *rows,
                        out: &mut v[channel * stride..],
                        point: v_point,
                    },
                );
            }
            for (at, channel) in channels.clone().enumerate() {
                let gradient = &self.gradient[channel * g.voxels()..][..g.voxels()];
                unit.filter_gradient(
                    self.isa,
                    gradient,
                    g.size,
                    Filtered {
                        rows: &mut *rows,
                        out: &mut t[at * stride..],
                        point: t_point,
                    },
                );
            }
            let of_point = totals.chunks_exact_mut(g.ci * FILTERS);
            for (at, totals) in of_point.enumerate() {
                let (block, point) = (at / POINTS, at % POINTS);
                let product = Product {
                    v: &v[point * v_point..][..g.ci * stride],
                    t: &t[point * t_point + block * BLOCK * stride..][..BLOCK * stride],
                    stride,
                    columns: unit.columns(),
                    live: BLOCK.min(channels.len() - block * BLOCK),
                };
                product.add(self.isa, sums, totals);
            }
        });
    }
}

/// The products of one point and one block of output channels.
struct Product<'a> {
    /// `[ci]` of `stride` numbers.
    v: &'a [f32],
    /// `[BLOCK]` of `stride` numbers.
    t: &'a [f32],
    stride: usize,
    columns: usize,
    /// Output channels that the block really has.
    live: usize,
}

impl Product<'_> {
    /// Adds to `totals`, `[ci, BLOCK, TAPS]`; `sums` holds a register for each of them.
    fn add(&self, isa: Isa, sums: &mut [f32], totals: &mut [f64]) {
        let channels = self.v.len() / self.stride;
        assert!(
            self.columns + TAPS - 1 + MAX_LANES <= self.stride + 1,
            "vectors stay within their channel"
        );
        assert_eq!(self.t.len(), BLOCK * self.stride);
        assert!(sums.len() >= channels * FILTERS * MAX_LANES && totals.len() == channels * FILTERS);
        let sums = &mut sums[..channels * FILTERS * isa.lanes()];
        // SAFETY: the instruction set was detected when `isa` was chosen; the last register of a row starts before
        // `columns` and is read shifted by at most TAPS - 1, so that the first assertion bounds it.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => self.add_avx512(sums, totals),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.add_avx2(sums, totals),
                _ => self.add_lanes::<[f32; 4], 2>(sums, totals),
            }
        }
    }

    /// # Safety
    /// As [`Self::add_lanes`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn add_avx512(&self, sums: &mut [f32], totals: &mut [f64]) {
        use std::arch::x86_64::__m512;
        // SAFETY: promised by the caller.
        unsafe {
            match self.live {
                // Half a tile: a network of 12 channels would waste a quarter of the work otherwise.
                ..=4 => self.add_lanes::<__m512, 4>(sums, totals),
                _ => self.add_lanes::<__m512, 8>(sums, totals),
            }
        }
    }

    /// # Safety
    /// As [`Self::add_lanes`], and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_avx2(&self, sums: &mut [f32], totals: &mut [f64]) {
        // SAFETY: promised by the caller.
        unsafe { self.add_lanes::<std::arch::x86_64::__m256, 4>(sums, totals) }
    }

    /// Sums chunk after chunk, `N` output channels (as many as registers allow) at a time; then adds the lanes.
    ///
    /// # Safety
    /// The bounds asserted by [`Self::add`] hold, `sums` has a register of `L` per total, and the processor has the
    /// instructions of `L`.
    #[inline(always)]
    unsafe fn add_lanes<L: Lanes, const N: usize>(&self, sums: &mut [f32], totals: &mut [f64]) {
        sums.fill(0.0);
        let vectors = self.columns.div_ceil(L::COUNT);
        for first in (0..vectors).step_by(CHUNK / L::COUNT) {
            let count = (CHUNK / L::COUNT).min(vectors - first);
            for (channel, sums) in sums.chunks_exact_mut(FILTERS * L::COUNT).enumerate() {
                for lane in (0..self.live).step_by(N) {
                    let column = first * L::COUNT;
                    // SAFETY: promised by the caller; N divides BLOCK.
                    unsafe {
                        let v = self.v.as_ptr().add(channel * self.stride + column);
                        let t = self.t.as_ptr().add(lane * self.stride + column);
                        self.tile::<L, N>([v, t], count, sums.as_mut_ptr().add(lane * TAPS * L::COUNT));
                    }
                }
            }
        }
        let live = self.live * TAPS;
        for (sums, totals) in sums
            .chunks_exact(FILTERS * L::COUNT)
            .zip(totals.chunks_exact_mut(FILTERS))
        {
            for (sums, totals) in sums
                .chunks_exact(8 * L::COUNT)
                .zip(totals.chunks_exact_mut(8))
                .take(live.div_ceil(8))
            {
                // SAFETY: the chunk has eight registers; promised by the caller.
                let sums = unsafe { L::sum_lanes(sums.as_ptr()) };
                totals
                    .iter_mut()
                    .zip(sums)
                    .for_each(|(total, sum)| *total += f64::from(sum));
            }
        }
    }

    /// Adds some registers of columns to `N` x TAPS registers of sums.
    ///
    /// # Safety
    /// As [`Self::add_lanes`].
    #[expect(
        clippy::needless_range_loop,
        reason = "iterators take the sums' address, which keeps them out of registers: half the speed"
    )]
    #[inline(always)]
    unsafe fn tile<L: Lanes, const N: usize>(&self, [v, t]: [*const f32; 2], vectors: usize, sums: *mut f32) {
        // SAFETY: the assertions of `add` bound all offsets below.
        unsafe {
            let mut acc = [[L::splat(0.0); TAPS]; N];
            for n in 0..N {
                for tap in 0..TAPS {
                    acc[n][tap] = L::load(sums.add((n * TAPS + tap) * L::COUNT));
                }
            }
            for i in 0..vectors {
                let mut x = [L::splat(0.0); TAPS];
                for tap in 0..TAPS {
                    x[tap] = L::load(v.add(i * L::COUNT + tap));
                }
                for n in 0..N {
                    let gradient = L::load(t.add(n * self.stride + i * L::COUNT));
                    for tap in 0..TAPS {
                        acc[n][tap] = acc[n][tap].add_product(x[tap], gradient);
                    }
                }
            }
            for n in 0..N {
                for tap in 0..TAPS {
                    acc[n][tap].store(sums.add((n * TAPS + tap) * L::COUNT));
                }
            }
        }
    }
}
