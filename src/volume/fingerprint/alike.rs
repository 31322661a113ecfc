//! Whether two fingerprints are of one scan: every way to lay one along the other, and how much speaks for the best.

use super::Fingerprint;
use super::make::{FEATURES, HEADER_BYTES, MAX_SLABS, STEPS, VERSION, log2};

/// From this score on two scans count as one; chosen by the measurement in `docs/ingest.md`.
pub const MIN_SCORE: u16 = 80;

/// The least overlap, in slabs and in mm.
const MIN_SLABS: usize = 8;
const MIN_OVERLAP_MM: u64 = 60;
/// The most that one scan's slabs may be thicker than the other's.
const MAX_RATIO: i64 = 8;
/// Fractions of a code.
const FINE: i32 = 16;
/// How far the averages of re-saved scans of one patient lie apart in each number, in fractions of a code: the table and the
/// skin count for less in larger voxels.
const USUAL_LEVEL: [i32; FEATURES] = [32, 96, 64, 48, 64, 64];
/// A hundred over [`USUAL_LEVEL`], in parts of 256.
const PER_LEVEL: [i32; FEATURES] = {
    let mut per = USUAL_LEVEL;
    let mut feature = 0;
    while feature < FEATURES {
        per[feature] = 25_600 / USUAL_LEVEL[feature];
        feature += 1;
    }
    per
};
/// How far they lie apart slab by slab once the averages are made equal.
const USUAL_DETAIL: [i32; FEATURES] = [11, 32, 14, 8, 24, 10];
/// The most that each average may speak against, in hundredths of the usual: fat may have been clipped away.
const MOST_LEVEL: [i32; FEATURES] = [400, 200, 100, 400, 200, 400];
/// The same for the detail.
const MOST_DETAIL: [i32; FEATURES] = [500, 500, 200, 500, 500, 500];
/// The most that a single slab may speak against, in multiples of the usual.
const MOST_SLAB: i32 = 8;
/// The fractions of a slab by which scans are laid against each other.
const PHASES: usize = 4;
/// An average distance of so many hundredths of the usual speaks neither for nor against.
const NEUTRAL: i32 = 200;
/// Thick slabs, in micrometres, on which most pairs are told apart at a glance.
const ROUGH_UM: i64 = 10_000;
/// How many of them must overlap at a glance: one less than the least overlap holds.
const ROUGH_SLABS: usize = 5;
/// What is neutral at a glance, where scans lie up to half a thick slab beside each other.
const ROUGH_NEUTRAL: i32 = 250;
/// Files that say nothing of their voxels have this size, in micrometres.
const UNKNOWN_SIZE: [u32; 3] = [1000; 3];

/// A fingerprint made ready for comparing.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// Planes of a slab.
    thickness: u16,
    /// Voxel size along the body and within a plane, in micrometres.
    size: [u32; 3],
    /// The codes in parts of [`FINE`], number by number: of slab s, number n at `n * slabs + s`.
    codes: Vec<i16>,
    /// Averages over slabs of [`ROUGH_UM`], and the same upside down; none where the scan's own slabs are thicker.
    rough: Option<[Row; 2]>,
}

/// One scan laid along another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alignment {
    /// Average distance in hundredths of the usual.
    pub distance: i32,
    /// Length of the overlap in mm.
    pub overlap_mm: i64,
    /// What speaks for it.
    pub score: i32,
}

/// Codes on slabs of a common thickness.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    slabs: usize,
    /// Number by number.
    codes: Vec<i16>,
    /// Of each number: the sums of the codes before every slab, and of all.
    sums: Vec<i32>,
}

/// Whether sizes in mm or numbers of voxels are compared.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    Millimetres,
    Voxels,
}

impl Outline {
    /// Reads a fingerprint; nothing where it is empty, of another version, or of fewer slabs than an overlap needs.
    pub fn of(fingerprint: &Fingerprint) -> Option<Self> {
        let bytes = fingerprint.as_bytes();
        let (head, codes) = bytes.split_at_checked(HEADER_BYTES)?;
        let slabs = codes.len() / FEATURES;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let thickness = u16::from_le_bytes([head[1], head[2]]);
        let size = [word(3), word(7), word(11)];
        let whole = codes.len().is_multiple_of(FEATURES) && (MIN_SLABS..=MAX_SLABS).contains(&slabs);
        if head[0] != VERSION || !whole || thickness == 0 || size.iter().any(|side| !(1..=1_000_000).contains(side)) {
            return None;
        }
        let code = |n: usize| i16::from(codes[n % slabs * FEATURES + n / slabs]) * FINE as i16;
        let codes: Vec<i16> = (0..codes.len()).map(code).collect();
        let thin = i64::from(thickness) * i64::from(size[0]);
        let rough = (thin <= ROUGH_UM).then(|| {
            let row = resample(&codes, (thin, ROUGH_UM), 0);
            [row.reversed(), row]
        });
        Some(Self {
            thickness,
            size,
            codes,
            rough,
        })
    }

    fn slabs(&self) -> usize {
        self.codes.len() / FEATURES
    }

    fn thickness_um(&self) -> i64 {
        i64::from(self.thickness) * i64::from(self.size[0])
    }

    /// Finds the best way to lay one scan along the other; nothing where no way is better than chance.
    ///
    /// Sizes are compared in mm, or in voxels where one of the files does not know the size of its voxels.
    pub fn align(&self, other: &Self) -> Option<Alignment> {
        // In one order, so that both orders give the same score.
        let key = |outline: &Self| (outline.thickness_um(), outline.size);
        let is_first = (key(self), &self.codes) >= (key(other), &other.codes);
        let (one, two) = if is_first { (self, other) } else { (other, self) };
        let in_mm = (one.is_roughly(two))
            .then(|| one.align_in(two, Unit::Millimetres))
            .flatten();
        if (one.size == UNKNOWN_SIZE) == (two.size == UNKNOWN_SIZE) {
            return in_mm;
        }
        let in_voxels = one.align_in(two, Unit::Voxels);
        [in_mm, in_voxels].into_iter().flatten().max_by_key(|found| found.score)
    }

    /// Tells at a glance whether sizes in mm may agree: it spares most pairs the search through all shifts.
    fn is_roughly(&self, other: &Self) -> bool {
        let (Some([_, still]), Some(rows)) = (&self.rough, &other.rough) else {
            return true;
        };
        rows.iter()
            .flat_map(|row| overlaps(still, row, ROUGH_SLABS).map(move |at| (row, at)))
            .any(|(row, at)| distance(still, row, at, ROUGH_NEUTRAL).is_some())
    }

    fn align_in(&self, other: &Self, unit: Unit) -> Option<Alignment> {
        let thickness = |outline: &Self| match unit {
            Unit::Millimetres => outline.thickness_um(),
            Unit::Voxels => i64::from(outline.thickness),
        };
        let (coarse, fine) = if thickness(self) >= thickness(other) {
            (self, other)
        } else {
            (other, self)
        };
        let (step, thin) = (thickness(coarse), thickness(fine));
        if step > MAX_RATIO * thin {
            return None;
        }
        // In voxels, the size is that of the file that knows it.
        let step_um = match unit {
            Unit::Voxels if coarse.size == UNKNOWN_SIZE => step * i64::from(fine.size[0]),
            Unit::Voxels => step * i64::from(coarse.size[0]),
            Unit::Millimetres => step,
        };
        let least = MIN_SLABS.max((1000 * MIN_OVERLAP_MM).div_ceil(step_um as u64) as usize);
        let still = Row::new(coarse.slabs(), coarse.in_unit(unit));
        let codes = fine.in_unit(unit);
        let mut best: Option<Alignment> = None;
        for phase in 0..PHASES {
            let moved = resample(&codes, (thin, step), phase);
            for row in [moved.reversed(), moved] {
                let found = slide(&still, &row, least, step_um);
                best = [best, found].into_iter().flatten().max_by_key(|found| found.score);
            }
        }
        best
    }

    /// Returns the codes of areas and spreads in mm or in voxels: a constant is added to a logarithm.
    fn in_unit(&self, unit: Unit) -> Vec<i16> {
        let mut codes = self.codes.clone();
        if unit == Unit::Voxels {
            let [_, a, b] = self.size.map(u128::from);
            let pixel = ((log2(a * b) - log2(1_000_000)) * STEPS * i64::from(FINE)) >> 10;
            let ends = (FEATURES - 1) * self.slabs();
            codes[..ends].iter_mut().for_each(|code| *code -= pixel as i16);
        }
        codes
    }
}

impl Row {
    fn new(slabs: usize, codes: Vec<i16>) -> Self {
        let mut sums = Vec::with_capacity((slabs + 1) * FEATURES);
        for feature in 0..FEATURES {
            let mut sum = 0;
            sums.push(sum);
            for code in &codes[feature * slabs..(feature + 1) * slabs] {
                sum += i32::from(*code);
                sums.push(sum);
            }
        }
        Self { slabs, codes, sums }
    }

    fn reversed(&self) -> Self {
        let lines = self.codes.chunks_exact(self.slabs.max(1));
        Self::new(self.slabs, lines.flat_map(|line| line.iter().rev().copied()).collect())
    }

    fn line(&self, feature: usize, from: usize, length: usize) -> &[i16] {
        &self.codes[feature * self.slabs + from..][..length]
    }

    fn sum(&self, feature: usize, from: usize, length: usize) -> i32 {
        let sums = &self.sums[feature * (self.slabs + 1) + from..];
        sums[length] - sums[0]
    }
}

/// Averages slabs of one thickness over slabs of another that is no less, beginning a part of the latter later.
fn resample(codes: &[i16], (thin, step): (i64, i64), phase: usize) -> Row {
    let count = codes.len() / FEATURES;
    let start = step * phase as i64 / PHASES as i64;
    let slabs = ((count as i64 * thin - start) / step).max(0) as usize;
    let mut out = Vec::with_capacity(slabs * FEATURES);
    for line in codes.chunks_exact(count) {
        for slab in 0..slabs as i64 {
            let (from, to) = (start + slab * step, start + (slab + 1) * step);
            let mut sum = 0;
            for n in from / thin..(to - 1) / thin + 1 {
                let part = to.min((n + 1) * thin) - from.max(n * thin);
                sum += part * i64::from(line[n as usize]);
            }
            out.push((sum / step) as i16);
        }
    }
    Row::new(slabs, out)
}

/// Where two rows overlap: the first slab of each, and how many.
#[derive(Clone, Copy)]
struct Overlap {
    still: usize,
    moved: usize,
    slabs: usize,
}

/// Lists every way to lay one row along another with at least so many slabs in common.
fn overlaps(still: &Row, moved: &Row, least: usize) -> impl Iterator<Item = Overlap> + use<> {
    let (still, moved) = (still.slabs, moved.slabs);
    let last = if still < least || moved < least {
        0
    } else {
        still + moved - least
    };
    // The moved row's first slab lies at `shift - moved` of the still one.
    (least..last + 1).map(move |shift| {
        let from = shift.saturating_sub(moved);
        Overlap {
            still: from,
            moved: from + moved - shift,
            slabs: shift.min(still) - from,
        }
    })
}

/// Returns the best of all shifts with the least overlap.
fn slide(still: &Row, moved: &Row, least: usize, step_um: i64) -> Option<Alignment> {
    let found = overlaps(still, moved, least).filter_map(|at| {
        let distance = distance(still, moved, at, NEUTRAL)?;
        let overlap_mm = at.slabs as i64 * step_um / 1000;
        Some(Alignment {
            distance,
            overlap_mm,
            score: (i64::from(NEUTRAL - distance) * overlap_mm / 100) as i32,
        })
    });
    found.max_by_key(|found| found.score)
}

/// Returns the average distance over an overlap in hundredths of the usual, or nothing where it is no less than neutral.
fn distance(still: &Row, moved: &Row, at: Overlap, neutral: i32) -> Option<i32> {
    let limit = neutral * FEATURES as i32;
    let length = at.slabs;
    // By multiplication: most of the time goes by on shifts that end here.
    let share = (1 << 16) / length as i64;
    let mut levels = [0; FEATURES];
    let mut sum = 0;
    for (feature, level) in levels.iter_mut().enumerate() {
        let apart = still.sum(feature, at.still, length) - moved.sum(feature, at.moved, length);
        *level = ((i64::from(apart) * share) >> 16) as i32;
        sum += ((level.abs() * PER_LEVEL[feature]) >> 8).min(MOST_LEVEL[feature]);
    }
    // The numbers that differ most between patients come first: most shifts end before the others.
    for feature in [0, 5, 3, 1, 4, 2] {
        if sum >= limit {
            return None;
        }
        let a = still.line(feature, at.still, length);
        let b = moved.line(feature, at.moved, length);
        let (level, most) = (levels[feature] as i16, (MOST_SLAB * USUAL_DETAIL[feature]) as u16);
        let apart = a
            .iter()
            .zip(b)
            .map(|(a, b)| i32::from((a - b).abs_diff(level).min(most)));
        let apart: i32 = apart.sum();
        sum += (100 * apart / (USUAL_DETAIL[feature] * length as i32)).min(MOST_DETAIL[feature]);
    }
    (sum < limit).then_some(sum / FEATURES as i32)
}
