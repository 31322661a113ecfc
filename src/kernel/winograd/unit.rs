//! Units of tiles, and the filters that turn rows of input and of the output's gradient into points.

use super::super::isa::{Isa, Lanes, MAX_LANES};
use super::{POINTS, TAPS};

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
