//! 3D convolution with a kernel of side 3 and stride 1 on the CPU, by minimal filtering along z and y.
//!
//! A tile of 2 x 2 rows of the output, along z and y, comes from 4 x 4 rows of the input. Rows stay rows: the filters of
//! Winograd's F(2, 3) only add and subtract whole rows, and along x the three taps are three shifted reads. A tile then
//! costs 16 x 3 products per voxel column where the direct sum costs 4 x 27: 2.25 times fewer.
//!
//! Legend: a *point* is one of the 16 combinations of filtered rows; V holds the input's, U the weights', M the output's:
//! `M[point][co]` = sum over ci and taps along x of `U[point][co][ci][tap]` `V[point][ci]` shifted by the tap. A *unit* is
//! a box of tiles whose rows are laid one after the other, each with a zero before and after it, so that one long row
//! of *columns* holds them all; what is computed for the columns between two rows is not used.
//!
//! Every output is one chain of additions, whatever the threads, the batch, or the units.
//!
//! # Source
//! Lavin and Gray, arXiv 1509.09308, section 4.1: B^T, G and A^T of F(2, 3).
//! Departure: two of the three axes. The third would save another third of the products and cost shuffles within rows.

use rayon::prelude::*;

use super::isa::{Isa, Lanes, MAX_LANES};
use super::layout::{BLOCK, Channels, Geometry, Shared, from_zeros, with_scratch};

/// Combinations of filtered rows.
pub const POINTS: usize = 16;

/// Taps along x.
pub const TAPS: usize = 3;

/// Numbers of V that a unit aims at (512 KiB): it is read once for every block of output channels.
const V_NUMBERS: usize = 128 * 1024;

/// Returns whether filtering beats the direct sum: below four channels of input its own additions outweigh what it saves.
pub fn pays(g: &Geometry) -> bool {
    g.k == 3 && g.ci >= 4
}

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

/// Tasks aimed at, so that a few threads end at about the same time.
const MIN_TASKS: usize = 8;

/// Where the filtered rows of one channel go.
pub struct Filtered<'a> {
    /// Room for the rows to be filtered, at least [`Unit::input_room`].
    pub rows: &'a mut [f32],
    /// From the channel's first number on.
    pub out: &'a mut [f32],
    /// Numbers from one point to the next.
    pub point: usize,
}

/// A box of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// First tile along z and y.
    pub start: [usize; 2],
    /// Tiles along z and y.
    pub tiles: [usize; 2],
    /// Columns of one row: its voxels and a zero on either side.
    pub pitch: usize,
}

impl Unit {
    /// Cuts a volume into units of about `columns` columns, at least one row of tiles.
    pub fn list([d, h, w]: [usize; 3], columns: usize) -> Vec<Self> {
        let (pitch, tiles_z, tiles_y) = (w + 2, d.div_ceil(2), h.div_ceil(2));
        let most = (columns / pitch).max(1);
        // As many parts as needed, as equal as can be.
        let per_part = |tiles: usize, most: usize| tiles.div_ceil(tiles.div_ceil(most.clamp(1, tiles)));
        let per_y = per_part(tiles_y, most);
        let per_z = per_part(tiles_z, if per_y == tiles_y { most / tiles_y } else { 1 });
        let along = |tiles: usize, per: usize| (0..tiles).step_by(per).map(move |at| (at, per.min(tiles - at)));
        along(tiles_z, per_z)
            .flat_map(|(z, nz)| {
                along(tiles_y, per_y).map(move |(y, ny)| Self {
                    start: [z, y],
                    tiles: [nz, ny],
                    pitch,
                })
            })
            .collect()
    }

    /// Returns the columns.
    pub fn columns(&self) -> usize {
        self.tiles[0] * self.tiles[1] * self.pitch
    }

    /// Returns the numbers from one channel to the next in V: the columns, and room for shifted and whole vectors.
    pub fn stride(&self) -> usize {
        (self.columns() + TAPS - 1).next_multiple_of(MAX_LANES) + MAX_LANES
    }

    /// Returns the numbers from one point to the next where each has some channels: a few cache lines more than a multiple
    /// of 4 KiB, because sixteen rows at multiples of that, walked side by side, evict each other from the first-level cache.
    pub fn point(&self, channels: usize) -> usize {
        (channels * self.stride()).next_multiple_of(1024) + 64
    }

    /// Returns the rows of one plane of input, and the planes.
    fn input_rows(&self) -> [usize; 2] {
        self.tiles.map(|tiles| 2 * tiles + 2)
    }

    /// Returns the room that [`Self::filter_input`] needs for rows.
    pub fn input_room(&self) -> usize {
        let [planes, rows] = self.input_rows();
        planes * rows * self.pitch + MAX_LANES
    }

    /// Writes one channel's part of V, of which the first `stride` numbers of each point are all set.
    ///
    /// # Shape
    /// x `[d, h, w]`.
    pub fn filter_input(&self, isa: Isa, x: &[f32], size: [usize; 3], to: Filtered) {
        let Filtered { rows, out, point } = to;
        let [d, h, w] = size;
        let [planes, in_plane] = self.input_rows();
        for plane in 0..planes {
            let z = (2 * self.start[0] + plane).wrapping_sub(1);
            for row in 0..in_plane {
                let y = (2 * self.start[1] + row).wrapping_sub(1);
                let to = &mut rows[(plane * in_plane + row) * self.pitch..][..self.pitch];
                if z < d && y < h {
                    (to[0], to[w + 1]) = (0.0, 0.0);
                    to[1..=w].copy_from_slice(&x[(z * h + y) * w..][..w]);
                } else {
                    to.fill(0.0);
                }
            }
        }
        self.filter(isa, Filter::Input, rows, out, point);
    }

    /// Writes one channel's part of the filtered output gradient, laid out like V; columns without a voxel are 0.
    ///
    /// # Shape
    /// gradient `[d, h, w]`.
    pub fn filter_gradient(&self, isa: Isa, gradient: &[f32], size: [usize; 3], to: Filtered) {
        let Filtered { rows, out, point } = to;
        let [d, h, w] = size;
        let [planes, in_plane] = self.tiles.map(|tiles| 2 * tiles);
        for plane in 0..planes {
            let z = 2 * self.start[0] + plane;
            for row in 0..in_plane {
                let y = 2 * self.start[1] + row;
                let to = &mut rows[(plane * in_plane + row) * self.pitch..][..self.pitch];
                if z < d && y < h {
                    to[..w].copy_from_slice(&gradient[(z * h + y) * w..][..w]);
                    to[w..].fill(0.0);
                } else {
                    to.fill(0.0);
                }
            }
        }
        self.filter(isa, Filter::Gradient, rows, out, point);
    }

    /// Filters all tiles' rows and clears what follows the last column.
    fn filter(&self, isa: Isa, kind: Filter, rows: &[f32], out: &mut [f32], point: usize) {
        let (columns, stride) = (self.columns(), self.stride());
        assert!(rows.len() >= self.input_room(), "rows fit their buffer");
        assert!(out.len() >= (POINTS - 1) * point + stride, "points fit their buffer");
        // SAFETY: the instruction set was detected when `isa` was chosen. Reads reach at most a register beyond the last
        // row, writes a register beyond the last column: the assertions cover both.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => self.filter_avx512(kind, rows.as_ptr(), out.as_mut_ptr(), point),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => self.filter_avx2(kind, rows.as_ptr(), out.as_mut_ptr(), point),
                _ => self.filter_lanes::<[f32; 4]>(kind, rows.as_ptr(), out.as_mut_ptr(), point),
            }
        }
        for at in 0..POINTS {
            out[at * point..][columns..stride].fill(0.0);
        }
    }

    /// # Safety
    /// As [`Self::filter_lanes`], and the processor has AVX-512.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn filter_avx512(&self, kind: Filter, rows: *const f32, out: *mut f32, point: usize) {
        // SAFETY: promised by the caller.
        unsafe { self.filter_lanes::<std::arch::x86_64::__m512>(kind, rows, out, point) }
    }

    /// # Safety
    /// As [`Self::filter_lanes`], and the processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn filter_avx2(&self, kind: Filter, rows: *const f32, out: *mut f32, point: usize) {
        // SAFETY: promised by the caller.
        unsafe { self.filter_lanes::<std::arch::x86_64::__m256>(kind, rows, out, point) }
    }

    /// # Safety
    /// The bounds asserted by [`Self::filter`] hold and the processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn filter_lanes<L: Lanes>(&self, kind: Filter, rows: *const f32, out: *mut f32, point: usize) {
        // SAFETY: promised by the caller.
        unsafe {
            match kind {
                Filter::Input => self.filter_tiles::<L, InputFilter, 4>(rows, out, point),
                Filter::Gradient => self.filter_tiles::<L, GradientFilter, 2>(rows, out, point),
            }
        }
    }

    /// Applies a filter of `R` rows to four along z, then along y, for all tiles.
    ///
    /// # Safety
    /// As [`Self::filter_lanes`].
    #[expect(
        clippy::needless_range_loop,
        reason = "iterators take the registers' address, which keeps them out of registers"
    )]
    #[inline(always)]
    unsafe fn filter_tiles<L: Lanes, F: RowFilter<R>, const R: usize>(
        &self,
        rows: *const f32,
        out: *mut f32,
        point: usize,
    ) {
        let pitch = self.pitch;
        let plane = (2 * self.tiles[1] + R - 2) * pitch;
        // SAFETY: promised by the caller. Vectors run over the end of a row into the next one, which is written after
        // it: tiles go up, and within a plane of tiles vectors go down.
        unsafe {
            for z in 0..self.tiles[0] {
                for column in (0..pitch).step_by(L::COUNT).rev() {
                    let from = rows.add(2 * z * plane + column);
                    let to = out.add(z * self.tiles[1] * pitch + column);
                    let mut filtered = [[L::splat(0.0); 4]; R];
                    for r in 2..R {
                        filtered[r] = along_z::<L, F, R>(from.add((r - 2) * pitch), plane);
                    }
                    for y in 0..self.tiles[1] {
                        for r in 2..R {
                            filtered[r - 2] = filtered[r];
                        }
                        for r in R - 2..R {
                            filtered[r] = along_z::<L, F, R>(from.add((2 * y + r) * pitch), plane);
                        }
                        for a in 0..4 {
                            let mut rows = [L::splat(0.0); R];
                            for r in 0..R {
                                rows[r] = filtered[r][a];
                            }
                            let points = F::apply(rows);
                            for b in 0..4 {
                                points[b].store(to.add((4 * a + b) * point + y * pitch));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What rows are filtered by.
#[derive(Clone, Copy)]
enum Filter {
    /// B^T: four rows of input.
    Input,
    /// A: two rows of the output's gradient.
    Gradient,
}

/// A filter of `R` rows to four points.
trait RowFilter<const R: usize> {
    /// # Safety
    /// The processor has the instructions of `L`.
    unsafe fn apply<L: Lanes>(rows: [L; R]) -> [L; 4];
}

/// B^T of F(2, 3).
struct InputFilter;

impl RowFilter<4> for InputFilter {
    #[inline(always)]
    unsafe fn apply<L: Lanes>([a, b, c, d]: [L; 4]) -> [L; 4] {
        // SAFETY: promised by the caller.
        unsafe { [a.minus(c), b.plus(c), c.minus(b), b.minus(d)] }
    }
}

/// A of F(2, 3).
struct GradientFilter;

impl RowFilter<2> for GradientFilter {
    #[inline(always)]
    unsafe fn apply<L: Lanes>([a, b]: [L; 2]) -> [L; 4] {
        // SAFETY: promised by the caller.
        unsafe { [a, a.plus(b), a.minus(b), L::splat(0.0).minus(b)] }
    }
}

/// Filters one register of each of `R` planes.
///
/// # Safety
/// The registers are readable and the processor has the instructions of `L`.
#[inline(always)]
unsafe fn along_z<L: Lanes, F: RowFilter<R>, const R: usize>(from: *const f32, plane: usize) -> [L; 4] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut rows = [L::splat(0.0); R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = L::load(from.add(r * plane));
        }
        F::apply(rows)
    }
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

/// G^T of F(2, 3).
pub fn weight_gradient_filter([a, b, c, d]: [f64; 4]) -> [f64; 3] {
    [a + 0.5 * (b + c), 0.5 * (b - c), 0.5 * (b + c) + d]
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
