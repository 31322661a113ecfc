//! From input to output: the points' products, unit by unit.

use rayon::prelude::*;

use super::super::isa::{Isa, Lanes, MAX_LANES};
use super::super::layout::{BLOCK, Channels, Geometry, Shared, from_zeros, with_scratch};
use super::unit::{Filtered, Unit};
use super::{POINTS, TAPS};

/// Numbers of V that a unit aims at (512 KiB): it is read once for every block of output channels.
const V_NUMBERS: usize = 128 * 1024;

/// Tasks aimed at, so that a few threads end at about the same time.
const MIN_TASKS: usize = 8;

/// Convolves a batch.
///
/// # Shape
/// x `[n, ci, d, h, w]`, weight `[co, ci, 3, 3, 3]`, bias `[co]` or empty -> `[n, co, d, h, w]`.
pub fn forward(isa: Isa, g: &Geometry, x: Channels, weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let packed = filter_weights(weight, g);
    let mut biases = bias.to_vec();
    biases.resize(g.blocks() * BLOCK, 0.0);
    let (size_out, samples) = (g.co * g.voxels(), x.samples());
    let units = Unit::list(g.size, V_NUMBERS / (POINTS * g.ci));
    // Where there are few units, blocks of output channels are shared out, too, and V is made more than once.
    let parts = (MIN_TASKS.div_ceil(samples * units.len())).clamp(1, g.blocks());
    let per_part = g.blocks().div_ceil(parts);
    let mut out = from_zeros(samples * size_out, g.voxels(), |_, _| ());
    let shared = Shared::new(&mut out);
    (0..samples * units.len() * parts).into_par_iter().for_each(|task| {
        let (sample, unit, part) = (
            task / parts / units.len(),
            &units[task / parts % units.len()],
            task % parts,
        );
        let blocks = part * per_part..((part + 1) * per_part).min(g.blocks());
        let work = Forward {
            isa,
            g,
            unit,
            x,
            sample,
            packed: &packed,
            biases: &biases,
            out: shared,
        };
        work.run(blocks);
    });
    out
}

/// A^T of F(2, 3).
#[inline(always)]
unsafe fn output_filter<L: Lanes>([a, b, c, d]: [L; 4]) -> [L; 2] {
    // SAFETY: promised by the caller.
    unsafe { [a.plus(b).plus(c), b.minus(c).minus(d)] }
}

/// G of F(2, 3).
fn weight_filter([a, b, c]: [f32; 3]) -> [f32; 4] {
    [a, 0.5 * (a + b + c), 0.5 * (a - b + c), c]
}

/// Filters weights `[co, ci, 3, 3, 3]` to U, `[block, POINTS, ci, TAPS, BLOCK]`, zero where the last block has no channel.
fn filter_weights(weight: &[f32], g: &Geometry) -> Vec<f32> {
    let per_block = POINTS * g.ci * TAPS * BLOCK;
    from_zeros(g.blocks() * per_block, per_block, |block, out| {
        for lane in 0..BLOCK.min(g.co - block * BLOCK) {
            for ci in 0..g.ci {
                let kernel = &weight[((block * BLOCK + lane) * g.ci + ci) * 27..][..27];
                for tap in 0..TAPS {
                    let along_z: [[f32; 4]; 3] =
                        std::array::from_fn(|y| weight_filter(std::array::from_fn(|z| kernel[9 * z + 3 * y + tap])));
                    for a in 0..4 {
                        let points = weight_filter(std::array::from_fn(|y| along_z[y][a]));
                        for b in 0..4 {
                            out[(((4 * a + b) * g.ci + ci) * TAPS + tap) * BLOCK + lane] = points[b];
                        }
                    }
                }
            }
        }
    })
}

/// One unit of one sample.
struct Forward<'a> {
    isa: Isa,
    g: &'a Geometry,
    unit: &'a Unit,
    /// `[n, ci, d, h, w]`.
    x: Channels<'a>,
    sample: usize,
    /// U.
    packed: &'a [f32],
    /// One per output channel, blocks filled up.
    biases: &'a [f32],
    /// The whole output.
    out: Shared,
}

impl Forward<'_> {
    /// Computes the output of some blocks of channels.
    fn run(&self, blocks: std::ops::Range<usize>) {
        let (g, unit, stride) = (self.g, self.unit, self.unit.stride());
        let [v_point, m_point] = [unit.point(g.ci), unit.point(BLOCK)];
        let (v_size, m_size) = (POINTS * v_point, POINTS * m_point);
        with_scratch(unit.input_room() + v_size + m_size, |scratch| {
            let (rows, rest) = scratch.split_at_mut(unit.input_room());
            let (v, m) = rest.split_at_mut(v_size);
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
            for block in blocks {
                let live = BLOCK.min(g.co - block * BLOCK);
                for point in 0..POINTS {
                    let product = Product {
                        weights: &self.packed[(block * POINTS + point) * g.ci * TAPS * BLOCK..][..g.ci * TAPS * BLOCK],
                        v: &v[point * v_point..][..g.ci * stride],
                        stride,
                        columns: unit.columns(),
                        live,
                    };
                    product.write(self.isa, &mut m[point * m_point..][..BLOCK * stride]);
                }
                for lane in 0..live {
                    self.finish(block * BLOCK + lane, &m[lane * stride..], m_point);
                }
            }
        });
    }

    /// Turns one output channel's M, whose points lie `point` numbers apart, into voxels.
    fn finish(&self, channel: usize, m: &[f32], point: usize) {
        let (stride, [d, h, w]) = (self.unit.stride(), self.g.size);
        assert!(m.len() >= (POINTS - 1) * point + stride, "points fit their buffer");
        for z in 0..self.unit.tiles[0] {
            for y in 0..self.unit.tiles[1] {
                let (top, left) = (2 * (self.unit.start[0] + z), 2 * (self.unit.start[1] + y));
                let row = |dz: usize, dy: usize| {
                    let inside = top + dz < d && left + dy < h;
                    let start = (((self.sample * self.g.co + channel) * d + top + dz) * h + left + dy) * w;
                    // SAFETY: sample, channel, plane and row name one row of the output; no other task has the same
                    // block of channels and unit, and no two rows of a tile are the same.
                    inside.then(|| unsafe { self.out.slice(start, w) }.as_mut_ptr())
                };
                let rows = [row(0, 0), row(0, 1), row(1, 0), row(1, 1)];
                let from = m[(z * self.unit.tiles[1] + y) * self.unit.pitch..].as_ptr();
                let bias = self.biases[channel];
                // SAFETY: the instruction set was detected when `isa` was chosen; a register at any of the row's columns
                // stays within its channel's stride, and rows have w voxels.
                unsafe {
                    match self.isa {
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx512 => finish_avx512(from, point, bias, rows, w),
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx2 => finish_avx2(from, point, bias, rows, w),
                        _ => finish_row::<[f32; 4]>(from, point, bias, rows, w),
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`finish_row`], and the processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn finish_avx512(m: *const f32, point: usize, bias: f32, rows: [Option<*mut f32>; 4], w: usize) {
    // SAFETY: promised by the caller.
    unsafe { finish_row::<std::arch::x86_64::__m512>(m, point, bias, rows, w) }
}

/// # Safety
/// As [`finish_row`], and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn finish_avx2(m: *const f32, point: usize, bias: f32, rows: [Option<*mut f32>; 4], w: usize) {
    // SAFETY: promised by the caller.
    unsafe { finish_row::<std::arch::x86_64::__m256>(m, point, bias, rows, w) }
}

/// Writes a tile's four rows, (z, y) = (0, 0), (0, 1), (1, 0), (1, 1), where they exist.
///
/// # Safety
/// `m` is readable for w rounded up to registers at every multiple of `point`, rows have w numbers, and the processor has
/// the instructions of `L`.
#[expect(
    clippy::needless_range_loop,
    reason = "iterators take the registers' address, which keeps them out of registers"
)]
#[inline(always)]
unsafe fn finish_row<L: Lanes>(m: *const f32, point: usize, bias: f32, rows: [Option<*mut f32>; 4], w: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        let bias = L::splat(bias);
        for column in (0..w).step_by(L::COUNT) {
            let mut along_z = [[L::splat(0.0); 4]; 2];
            for b in 0..4 {
                let mut points = [L::splat(0.0); 4];
                for (a, value) in points.iter_mut().enumerate() {
                    *value = L::load(m.add((4 * a + b) * point + column));
                }
                [along_z[0][b], along_z[1][b]] = output_filter(points);
            }
            for z in 0..2 {
                let voxels = output_filter(along_z[z]);
                for y in 0..2 {
                    if let Some(row) = rows[2 * z + y] {
                        voxels[y].plus(bias).store_first(row.add(column), w - column);
                    }
                }
            }
        }
    }
}

/// The products of one point and one block of output channels.
struct Product<'a> {
    /// `[ci, TAPS, BLOCK]`.
    weights: &'a [f32],
    /// `[ci]` of `stride` numbers.
    v: &'a [f32],
    stride: usize,
    columns: usize,
    /// Output channels that the block really has.
    live: usize,
}

impl Product<'_> {
    /// Writes M, `[BLOCK]` of `stride` numbers; rows of channels that do not exist stay as they are.
    fn write(&self, isa: Isa, m: &mut [f32]) {
        assert!(m.len() >= BLOCK * self.stride, "M fits its buffer");
        assert!(
            self.columns + TAPS - 1 + MAX_LANES <= self.stride + 1,
            "vectors stay within their channel"
        );
        assert_eq!(self.weights.len() / (TAPS * BLOCK), self.v.len() / self.stride);
        // SAFETY: the instruction set was detected when `isa` was chosen; the last register of a row starts before
        // `columns` and is read shifted by at most TAPS - 1, so that the second assertion bounds it.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => self.write_avx512(m.as_mut_ptr()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.write_avx2(m.as_mut_ptr()),
                _ => self.write_tiles::<[f32; 4], 2, 3>(m.as_mut_ptr()),
            }
        }
    }

    /// # Safety
    /// As [`Self::write_tiles`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn write_avx512(&self, m: *mut f32) {
        use std::arch::x86_64::__m512;
        // SAFETY: promised by the caller.
        unsafe {
            match self.live {
                // Half a tile: a network of 12 channels would waste a quarter of the work otherwise.
                ..=4 => self.write_tiles::<__m512, 4, 6>(m),
                _ => self.write_tiles::<__m512, 8, 3>(m),
            }
        }
    }

    /// # Safety
    /// As [`Self::write_tiles`], and the processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn write_avx2(&self, m: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { self.write_tiles::<std::arch::x86_64::__m256, 4, 3>(m) }
    }

    /// Goes through the columns, `N` output channels by `V` registers (what fits the processor's registers) at a time.
    ///
    /// # Safety
    /// The bounds asserted by [`Self::write`] hold and the processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn write_tiles<L: Lanes, const N: usize, const V: usize>(&self, m: *mut f32) {
        let vectors = self.columns.div_ceil(L::COUNT);
        for first in (0..vectors).step_by(V) {
            for lane in (0..self.live).step_by(N) {
                let column = first * L::COUNT;
                // SAFETY: promised by the caller; N divides BLOCK.
                unsafe {
                    match vectors - first {
                        1 => self.tile::<L, N, 1>(m, lane, column),
                        2 if V > 2 => self.tile::<L, N, 2>(m, lane, column),
                        3 if V > 3 => self.tile::<L, N, 3>(m, lane, column),
                        4 if V > 4 => self.tile::<L, N, 4>(m, lane, column),
                        5 if V > 5 => self.tile::<L, N, 5>(m, lane, column),
                        _ => self.tile::<L, N, V>(m, lane, column),
                    }
                }
            }
        }
    }

    /// Computes `V` registers of `N` output channels.
    ///
    /// # Safety
    /// As [`Self::write_tiles`].
    #[expect(
        clippy::needless_range_loop,
        reason = "iterators take the sums' address, which keeps them out of registers: half the speed"
    )]
    #[inline(always)]
    unsafe fn tile<L: Lanes, const N: usize, const V: usize>(&self, m: *mut f32, lane: usize, column: usize) {
        // SAFETY: the assertions of `write` bound all offsets below.
        unsafe {
            let mut acc = [[L::splat(0.0); V]; N];
            let mut weight = self.weights.as_ptr().add(lane);
            let mut v = self.v.as_ptr().add(column);
            for _ in 0..self.v.len() / self.stride {
                for tap in 0..TAPS {
                    let x: [L; V] = std::array::from_fn(|i| L::load(v.add(i * L::COUNT + tap)));
                    for n in 0..N {
                        let scale = L::splat(*weight.add(n));
                        for i in 0..V {
                            acc[n][i] = acc[n][i].add_product(x[i], scale);
                        }
                    }
                    weight = weight.add(BLOCK);
                }
                v = v.add(self.stride);
            }
            for n in 0..N {
                for i in 0..V {
                    acc[n][i].store(m.add((lane + n) * self.stride + column + i * L::COUNT));
                }
            }
        }
    }
}
