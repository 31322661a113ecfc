//! From voxels to a fingerprint, in integers throughout: equal on every machine, and equal to the Python function.

use ndarray::{ArrayView3, Axis};

use super::Fingerprint;

/// The layout of the bytes and the meaning of the numbers.
pub(super) const VERSION: u8 = 1;
/// Bytes before the slabs: version, planes of a slab (u16), spacing along the body and within the planes (3 x u32, micrometres).
pub(super) const HEADER_BYTES: usize = 15;
/// The most slabs.
pub(super) const MAX_SLABS: usize = 96;
/// Numbers of a slab, see [`Sums::codes`].
pub(super) const FEATURES: usize = 6;
/// Steps of a code for each doubling: 3.5 % a step.
pub(super) const STEPS: i64 = 20;

/// Intensities beyond these are all alike, as they are in scans that were clipped: fat and tissue lie between.
const LOW_HU: i32 = -150;
const HIGH_HU: i32 = 230;
/// The lowest where tissue alone is measured: clipping may have taken the fat as well.
const LOW_TISSUE_HU: i32 = -125;
/// What files hold that were saved without their intercept.
const OFFSET_HU: i32 = 1024;
/// Denser is soft tissue or bone: what decides how the body lies.
const SOFT_HU: i32 = -30;
/// Along a plane's sides the body is measured in about so many blocks: noise and voxel size then matter little, and the
/// number does not depend on a spacing that may be wrong.
const BLOCKS: usize = 64;
/// Fractions of an HU in a block's mean.
const PARTS: i32 = 16;
/// Fractions of a logarithm's unit.
const LOG_ONE: i64 = 1024;

impl Fingerprint {
    /// Describes a scan; empty where no voxel is soft tissue.
    ///
    /// `voxels` are HU on canonical axes (z, y, x) before any resampling, `spacing_mm` their size along these axes. The body is
    /// looked for along the axis that cuts it bluntly, so that a wrong orientation changes nothing.
    pub fn of(voxels: ArrayView3<i16>, spacing_mm: [f64; 3]) -> Self {
        let micrometres = spacing_mm.map(|mm| (mm * 1000.0).round_ties_even().clamp(1.0, 1e6) as u32);
        let tissue = Tissue::of(voxels);
        let Some((axis, planes)) = tissue.body_axis(voxels) else {
            return Self::default();
        };
        let [along, rows, columns] = match axis {
            0 => [0, 1, 2],
            1 => [1, 0, 2],
            _ => [2, 0, 1],
        };
        let stack = voxels.permuted_axes([along, rows, columns]);
        let size = [along, rows, columns].map(|axis| micrometres[axis]);
        let thickness = planes.len().div_ceil(MAX_SLABS);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + MAX_SLABS * FEATURES);
        bytes.push(VERSION);
        bytes.extend((thickness as u16).to_le_bytes());
        size.iter().for_each(|side| bytes.extend(side.to_le_bytes()));
        let mut blocks = Blocks::new(stack.len_of(Axis(1)), stack.len_of(Axis(2)), thickness);
        for slab in 0..planes.len() / thickness {
            let first = planes.start + slab * thickness;
            blocks.fill(&tissue, stack, first);
            bytes.extend(blocks.sums().codes([size[1], size[2]], thickness));
        }
        Self(bytes)
    }
}

/// How a scan's numbers become HU.
struct Tissue {
    offset: i32,
}

impl Tissue {
    /// Tells by the fat whether a scan was saved without its intercept.
    fn of(voxels: ArrayView3<i16>) -> Self {
        let (mut plain, mut shifted) = (0_u64, 0_u64);
        for plane in voxels.outer_iter() {
            let (mut in_plane, mut in_shifted) = (0_u32, 0_u32);
            for hu in plane {
                in_plane += u32::from((-200..=-30).contains(hu));
                in_shifted += u32::from((824..=994).contains(hu));
            }
            plain += u64::from(in_plane);
            shifted += u64::from(in_shifted);
        }
        Self {
            offset: if shifted > plain { OFFSET_HU } else { 0 },
        }
    }

    /// Returns HU above the lowest that counts, 0 to 380, and above the lowest of tissue, 0 to 330.
    fn values(&self, hu: i16) -> [u32; 2] {
        let hu = (i32::from(hu) - self.offset).min(HIGH_HU);
        [LOW_HU, LOW_TISSUE_HU].map(|low| (hu - low).max(0) as u32)
    }

    /// Finds the axis along which the body lies, and the planes that it fills.
    ///
    /// A scan ends in the middle of the body along that axis, where a plane holds as much tissue as any, and beside the body
    /// along the others. The axis that the header calls the body's stays unless another ends clearly more bluntly.
    fn body_axis(&self, voxels: ArrayView3<i16>) -> Option<(usize, std::ops::Range<usize>)> {
        let profiles = self.profiles(voxels);
        let mut ends = Vec::with_capacity(3);
        for profile in &profiles {
            let most = profile.iter().copied().max().filter(|most| *most > 0)?;
            let holds = |count: &u64| 20 * count > most;
            let first = profile.iter().position(holds)?;
            let last = profile.iter().rposition(holds)?;
            ends.push((profile[first] + profile[last], most, first..last + 1));
        }
        let blunter = |a: usize, b: usize, by: (u64, u64)| by.1 * ends[a].0 * ends[b].1 > by.0 * ends[b].0 * ends[a].1;
        let other = if blunter(2, 1, (1, 1)) { 2 } else { 1 };
        let axis = if blunter(other, 0, (3, 2)) { other } else { 0 };
        Some((axis, ends[axis].2.clone()))
    }

    /// Counts soft voxels plane by plane along each axis.
    fn profiles(&self, voxels: ArrayView3<i16>) -> [Vec<u64>; 3] {
        let (depth, rows, columns) = voxels.dim();
        let mut profiles = [vec![0; depth], vec![0; rows], vec![0; columns]];
        let mut in_columns = vec![0_u32; columns];
        for (z, plane) in voxels.outer_iter().enumerate() {
            for (y, row) in plane.outer_iter().enumerate() {
                let mut in_row = 0_u32;
                for (count, hu) in in_columns.iter_mut().zip(row) {
                    let soft = u32::from(i32::from(*hu) - self.offset > SOFT_HU);
                    *count += soft;
                    in_row += soft;
                }
                profiles[0][z] += u64::from(in_row);
                profiles[1][y] += u64::from(in_row);
            }
        }
        in_columns
            .iter()
            .zip(&mut profiles[2])
            .for_each(|(count, sum)| *sum = u64::from(*count));
        profiles
    }
}

/// Sums of a slab's values over blocks of voxels.
struct Blocks {
    /// Voxels of a block along rows and columns; the last ones may be smaller.
    sides: [usize; 2],
    shape: [usize; 2],
    thickness: usize,
    /// Block by block, above the lowest that counts and above the lowest of tissue.
    sums: Vec<[u32; 2]>,
}

impl Blocks {
    fn new(rows: usize, columns: usize, thickness: usize) -> Self {
        let sides = [rows, columns].map(|side| ((side + BLOCKS / 2) / BLOCKS).max(1));
        let count = rows.div_ceil(sides[0]) * columns.div_ceil(sides[1]);
        Self {
            sides,
            shape: [rows, columns],
            thickness,
            sums: vec![[0; 2]; count],
        }
    }

    /// Sums the slab that begins with a plane.
    fn fill(&mut self, tissue: &Tissue, stack: ArrayView3<i16>, first: usize) {
        self.sums.fill([0; 2]);
        let across = self.shape[1].div_ceil(self.sides[1]);
        for plane in first..first + self.thickness {
            for (y, row) in stack.index_axis(Axis(0), plane).outer_iter().enumerate() {
                let sums = &mut self.sums[y / self.sides[0] * across..][..across];
                for (x, hu) in row.iter().enumerate() {
                    let [value, tissue] = tissue.values(*hu);
                    let sum = &mut sums[x / self.sides[1]];
                    sum[0] += value;
                    sum[1] += tissue;
                }
            }
        }
    }

    /// Weighs every block by its mean.
    fn sums(&self) -> Sums {
        let counts = [0, 1].map(|axis| self.shape[axis].div_ceil(self.sides[axis]));
        let length = |axis: usize, block: usize| self.sides[axis].min(self.shape[axis] - block * self.sides[axis]);
        let mut sums = Sums::new(counts);
        for y in 0..counts[0] {
            for x in 0..counts[1] {
                let voxels = self.thickness * length(0, y) * length(1, x);
                let [mean, tissue] = self.sums[y * counts[1] + x].map(|sum| sum as i32 * PARTS / voxels as i32);
                let [mean, tissue] = [mean + LOW_HU * PARTS, tissue + LOW_TISSUE_HU * PARTS];
                let soft = ramp(tissue, -40, 20) * voxels as u64;
                let dense = ramp(tissue, 120, 200) * voxels as u64;
                sums.fat += ramp(mean, -140, -110).min(256 - ramp(mean, -80, -40)) * voxels as u64;
                sums.soft[0][y] += soft;
                sums.soft[1][x] += soft;
                sums.dense[0][y] += dense;
                sums.dense[1][x] += dense;
            }
        }
        // Twice the middle of a block, in voxels.
        sums.middles = [0, 1].map(|axis| {
            let middle = |block: usize| 2 * block * self.sides[axis] + length(axis, block) - 1;
            (0..counts[axis]).map(|block| middle(block) as i64).collect()
        });
        sums
    }
}

/// Rises from 0 at `from` to 256 at `to`, both in HU; the mean is in parts of an HU.
fn ramp(mean: i32, from: i32, to: i32) -> u64 {
    ((mean - from * PARTS).max(0) * 256 / ((to - from) * PARTS)).min(256) as u64
}

/// How much tissue a slab holds, by rows and by columns of blocks.
struct Sums {
    soft: [Vec<u64>; 2],
    dense: [Vec<u64>; 2],
    fat: u64,
    middles: [Vec<i64>; 2],
}

impl Sums {
    fn new(counts: [usize; 2]) -> Self {
        Self {
            soft: counts.map(|count| vec![0; count]),
            dense: counts.map(|count| vec![0; count]),
            fat: 0,
            middles: [Vec::new(), Vec::new()],
        }
    }

    /// Returns the logarithms of: area of soft tissue, of bone and contrast agent, of fat; mean squared distance from the soft
    /// tissue's centroid of the soft tissue, and of bone and contrast agent; ratio of the soft tissue's widths. None of them
    /// depends on flips or quarter turns.
    fn codes(&self, side: [u32; 2], thickness: usize) -> [u8; FEATURES] {
        let pixel = u128::from(side[0]) * u128::from(side[1]);
        let soft: u64 = self.soft[0].iter().sum();
        let dense: u64 = self.dense[0].iter().sum();
        let area = |weight: u64| u128::from(weight) * pixel / (256 * thickness as u128);
        let mut spreads = [[0; 2]; 2];
        for axis in 0..2 {
            if soft == 0 {
                continue;
            }
            let moment = |(weight, middle): (&u64, &i64)| i128::from(*weight) * i128::from(*middle);
            let moment: i128 = self.soft[axis].iter().zip(&self.middles[axis]).map(moment).sum();
            let centre = (16 * moment + i128::from(soft) / 2) / i128::from(soft);
            for (spread, weights) in spreads.iter_mut().zip([&self.soft, &self.dense]) {
                spread[axis] = self.spread(&weights[axis], axis, centre, side[axis]);
            }
        }
        let [[a, b], [c, d]] = spreads;
        [
            code(area(soft), 50_000_000),
            code(area(dense), 10_000_000),
            code(area(self.fat), 50_000_000),
            code(a + b, 10_000_000),
            code(c + d, 10_000_000),
            code(a.max(b) * 1_000_000 / a.min(b).max(1), 1_000_000),
        ]
    }

    /// Returns the mean squared distance from a centre along an axis, in square micrometres.
    fn spread(&self, weights: &[u64], axis: usize, centre: i128, side: u32) -> u128 {
        let total: u64 = weights.iter().sum();
        if total == 0 {
            return 0;
        }
        let term = |(weight, middle): (&u64, &i64)| {
            let away = (16 * i128::from(*middle) - centre).unsigned_abs();
            u128::from(*weight) * away * away
        };
        let sum: u128 = weights.iter().zip(&self.middles[axis]).map(term).sum();
        sum * u128::from(side) * u128::from(side) / (1024 * u128::from(total))
    }
}

/// Returns the logarithm of a quantity over its unit in steps, 0 for what is below one step or nothing.
fn code(value: u128, unit: u128) -> u8 {
    if value == 0 {
        return 0;
    }
    let steps = ((log2(value) - log2(unit)) * STEPS + LOG_ONE / 2).div_euclid(LOG_ONE);
    steps.clamp(0, 255) as u8
}

/// Returns the binary logarithm in parts of 1024, rounded down: the whole part from the highest bit, the others by squaring.
pub(super) fn log2(value: u128) -> i64 {
    let whole = i64::from(value.max(1).ilog2());
    let mut mantissa = if whole >= 31 {
        (value >> (whole - 31)) as u64
    } else {
        (value as u64) << (31 - whole)
    };
    let mut parts = whole;
    for _ in 0..10 {
        mantissa = (mantissa * mantissa) >> 31;
        parts = 2 * parts + i64::from(mantissa >= 1 << 32);
        mantissa >>= u32::from(mantissa >= 1 << 32);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_those_of_floats_rounded_down() {
        for value in (1..5000).chain([1 << 31, (1 << 32) - 1, 1 << 40, 3 << 90, u128::MAX]) {
            let exact = libm::log2(value as f64) * 1024.0;
            let found = log2(value) as f64;
            // Ten squarings of 31 bits lose up to one part.
            assert!(found <= exact + 1e-6 && found > exact - 2.0, "{value}: {found} {exact}");
        }
    }

    #[test]
    fn a_code_counts_steps_over_its_unit() {
        assert_eq!((code(0, 10), code(9, 10), code(10, 10)), (0, 0, 0));
        assert_eq!((code(20, 10), code(40, 10), code(u128::MAX, 1)), (20, 40, 255));
    }
}
