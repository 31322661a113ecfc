//! Masks with one bit a voxel: 64 voxels of a row are grown, counted and joined in one step.

use super::Shape;

/// A 1 in every byte of a word.
const BYTES: u64 = 0x0101_0101_0101_0101;

/// A mask, rows of x padded to whole words with zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct BitMask {
    size: Shape,
    /// Words a row.
    words: usize,
    bits: Vec<u64>,
}

/// A stretch of set bits in a row.
struct Run {
    row: usize,
    from: usize,
    to: usize,
    /// An earlier run of the same piece, or itself.
    parent: usize,
}

impl BitMask {
    /// Makes an empty mask.
    pub fn new(size: Shape) -> Self {
        let words = size[2].div_ceil(64);
        Self {
            size,
            words,
            bits: vec![0; size[0] * size[1] * words],
        }
    }

    /// Makes the mask of the bytes that are at least `least`; `rows` writes the bytes of row (z, y).
    ///
    /// # Panics
    /// When `least` is 0 or above 128.
    pub fn at_least(size: Shape, least: u8, mut rows: impl FnMut([usize; 2], &mut [u8])) -> Self {
        assert!((1..=128).contains(&least), "a threshold from 1 to 128");
        let mut out = Self::new(size);
        let mut bytes = vec![0; out.words * 64];
        let lift = u64::from(128 - least) * BYTES;
        for (row, words) in out.bits.chunks_exact_mut(out.words.max(1)).enumerate() {
            rows([row / size[1], row % size[1]], &mut bytes[..size[2]]);
            for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(64)) {
                for (i, eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
                    let eight = u64::from_le_bytes(*eight);
                    // The sum of the low seven bits and the lift reaches the highest bit, and no further.
                    let high = ((((eight & !(BYTES << 7)) + lift) | eight) >> 7) & BYTES;
                    // The product moves bit 8k to bit 56 + k, without carries.
                    *word |= (high.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * i);
                }
            }
        }
        out
    }

    /// Returns the number of set voxels.
    pub fn count(&self) -> usize {
        self.bits.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Removes the voxels that another mask of the same size lacks.
    pub fn intersect(&mut self, other: &Self) {
        self.bits
            .iter_mut()
            .zip(&other.bits)
            .for_each(|(bits, other)| *bits &= other);
    }

    /// Removes the voxels that another mask of the same size has.
    pub fn subtract(&mut self, other: &Self) {
        self.bits
            .iter_mut()
            .zip(&other.bits)
            .for_each(|(bits, other)| *bits &= !other);
    }

    /// Lists the set voxels in scan order.
    pub fn voxels(&self) -> impl Iterator<Item = Shape> {
        let [_, height, _] = self.size;
        let rest = |word: &u64| Some(word & (word - 1)).filter(|word| *word != 0);
        self.bits
            .iter()
            .enumerate()
            .filter(|(_, word)| **word != 0)
            .flat_map(move |(i, word)| {
                let (row, at) = (i / self.words, i % self.words * 64);
                std::iter::successors(Some(*word), rest)
                    .map(move |word| [row / height, row % height, at + word.trailing_zeros() as usize])
            })
    }

    /// Adds the voxels before and after set ones along an axis.
    pub fn grown_along(&self, axis: usize) -> Self {
        let mut out = self.clone();
        match axis {
            0 => out.add_shifted(self, 1, 0),
            1 => out.add_shifted(self, 0, 1),
            _ => out.widen(),
        }
        out
    }

    /// Keeps the largest face-connected piece, of equals the first in scan order; returns the other pieces' voxels.
    pub fn keep_largest(&mut self) -> Vec<Shape> {
        let mut runs = self.joined_runs();
        let mut sizes = vec![0; runs.len()];
        for i in 0..runs.len() {
            // Parents come first, so theirs are already the roots.
            runs[i].parent = runs[runs[i].parent].parent;
            sizes[runs[i].parent] += runs[i].to - runs[i].from;
        }
        let largest = (0..runs.len()).rev().max_by_key(|run| sizes[*run]);
        let mut lost = Vec::new();
        for run in runs.iter().filter(|run| Some(run.parent) != largest) {
            for x in run.from..run.to {
                self.bits[run.row * self.words + x / 64] &= !(1 << (x % 64));
                lost.push([run.row / self.size[1], run.row % self.size[1], x]);
            }
        }
        lost
    }

    /// Lists the runs in scan order, those that share faces joined.
    fn joined_runs(&self) -> Vec<Run> {
        let [depth, height, _] = self.size;
        let mut runs: Vec<Run> = Vec::new();
        let mut first = Vec::with_capacity(depth * height + 1);
        for row in 0..depth * height {
            first.push(runs.len());
            self.push_runs(row, &mut runs);
            let before = [(row % height > 0).then(|| row - 1), row.checked_sub(height)];
            for other in before.into_iter().flatten() {
                let (mut i, mut j) = (first[row], first[other]);
                let end = first[other + 1];
                while i < runs.len() && j < end {
                    if runs[i].from < runs[j].to && runs[j].from < runs[i].to {
                        join(&mut runs, i, j);
                    }
                    if runs[i].to < runs[j].to { i += 1 } else { j += 1 }
                }
            }
        }
        runs
    }

    fn push_runs(&self, row: usize, runs: &mut Vec<Run>) {
        let words = &self.bits[row * self.words..(row + 1) * self.words];
        for (i, word) in words.iter().enumerate() {
            let (mut word, mut at) = (*word, 64 * i);
            while word != 0 {
                let gap = word.trailing_zeros();
                let length = (word >> gap).trailing_ones();
                let from = at + gap as usize;
                let to = from + length as usize;
                match runs.last_mut() {
                    // A run that goes on across the border of two words.
                    Some(last) if last.row == row && last.to == from => last.to = to,
                    _ => runs.push(Run {
                        row,
                        from,
                        to,
                        parent: runs.len(),
                    }),
                }
                at = to;
                word = (word >> gap).checked_shr(length).unwrap_or(0);
            }
        }
    }

    /// Returns the voxels at most `radius_mm` from the mask's, by distance between voxel centres.
    pub fn dilated(&self, spacing_mm: [f64; 3], radius_mm: f64) -> Self {
        let limit = super::distance::squared_limit(radius_mm);
        let reach = spacing_mm.map(|mm| (radius_mm / mm) as usize + 1);
        let mut out = Self::new(self.size);
        // Grown by 0, 1, ... voxels along x; every shift in the plane across takes the widest that stays in the ball.
        let mut wide = self.clone();
        let last = reach[2].min(self.size[2]);
        let is_within = |dz: usize, dy: usize, dx: usize| {
            let along =
                |steps: usize, axis: usize| (steps as f64 * spacing_mm[axis]) * (steps as f64 * spacing_mm[axis]);
            along(dz, 0) + along(dy, 1) + along(dx, 2) <= limit
        };
        for along in 0..=last {
            if along > 0 {
                wide.widen();
            }
            let is_widest = |dz, dy| is_within(dz, dy, along) && (along == last || !is_within(dz, dy, along + 1));
            for (dz, dy) in (0..=reach[0]).flat_map(|dz| (0..=reach[1]).map(move |dy| (dz, dy))) {
                if is_widest(dz, dy) {
                    out.add_shifted(&wide, dz, dy);
                }
            }
        }
        out
    }

    /// Adds the voxels beside set ones along x.
    fn widen(&mut self) {
        let last = match self.size[2] % 64 {
            0 => u64::MAX,
            used => (1 << used) - 1,
        };
        for row in self.bits.chunks_exact_mut(self.words.max(1)) {
            let mut before = 0;
            for i in 0..row.len() {
                let (word, after) = (row[i], row.get(i + 1).copied().unwrap_or(0));
                row[i] |= (word << 1) | (before >> 63) | (word >> 1) | (after << 63);
                before = word;
            }
            if let Some(end) = row.last_mut() {
                *end &= last;
            }
        }
    }

    /// Adds another mask moved by `dz` and `dy` voxels in either direction.
    fn add_shifted(&mut self, other: &Self, dz: usize, dy: usize) {
        let [depth, height, _] = self.size;
        if dz >= depth || dy >= height {
            return;
        }
        let (plane, shift) = (height * self.words, dy * self.words);
        for z in 0..depth - dz {
            for (from, to) in [(z, z + dz), (z + dz, z)] {
                let from = &other.bits[from * plane..(from + 1) * plane];
                let to = &mut self.bits[to * plane..(to + 1) * plane];
                to[shift..].iter_mut().zip(from).for_each(|(to, from)| *to |= from);
                to.iter_mut().zip(&from[shift..]).for_each(|(to, from)| *to |= from);
            }
        }
    }
}

/// Makes two runs parts of one piece, under the earlier of their first runs.
fn join(runs: &mut [Run], a: usize, b: usize) {
    let [a, b] = [a, b].map(|mut run| {
        while runs[run].parent != run {
            run = runs[run].parent;
        }
        run
    });
    runs[a.max(b)].parent = a.min(b);
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, s};

    use super::*;
    use crate::rng::{Purpose, Rng};
    use crate::volume::{Connectivity, components};

    fn random(size: Shape, share: f64, rng: &mut Rng) -> (Array3<bool>, BitMask) {
        let array = Array3::from_shape_fn(size, |_| rng.chance(share));
        let bits = BitMask::at_least(size, 128, |[z, y], bytes| {
            let row = array.slice(s![z, y, ..]);
            bytes
                .iter_mut()
                .zip(row)
                .for_each(|(byte, set)| *byte = if *set { 128 } else { 127 });
        });
        (array, bits)
    }

    fn array(mask: &BitMask) -> Array3<bool> {
        let mut out = Array3::from_elem(mask.size, false);
        mask.voxels().for_each(|voxel| out[voxel] = true);
        out
    }

    #[test]
    fn rows_keep_every_voxel() {
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        for width in [1, 7, 8, 63, 64, 65, 130] {
            let bytes = Array3::from_shape_fn([2, 3, width], |_| rng.bits() as u8);
            for least in [1, 2, 100, 128] {
                let mask = BitMask::at_least([2, 3, width], least, |[z, y], row| {
                    row.copy_from_slice(bytes.slice(s![z, y, ..]).as_slice().unwrap());
                });
                let wanted = bytes.mapv(|byte| byte >= least);
                assert_eq!(array(&mask), wanted, "{width} {least}");
                assert_eq!(mask.count(), wanted.iter().filter(|set| **set).count());
            }
        }
    }

    #[test]
    fn the_largest_piece_is_that_of_the_search_voxel_by_voxel() {
        let mut rng = Rng::keyed(2, 0, 0, Purpose::Test);
        for share in [0.0, 0.1, 0.25, 0.32, 0.5, 1.0] {
            for size in [[5, 6, 70], [4, 4, 4], [1, 9, 129]] {
                let (voxels, mut mask) = random(size, share, &mut rng);
                let pieces = components(voxels.clone(), Connectivity::Faces);
                let largest = (0..pieces.len()).rev().max_by_key(|piece| pieces[*piece].len());
                let mut kept = Array3::from_elem(size, false);
                largest
                    .iter()
                    .flat_map(|piece| &pieces[*piece])
                    .for_each(|voxel| kept[*voxel] = true);
                let lost = mask.keep_largest();
                assert_eq!(array(&mask), kept, "{share} {size:?}");
                let gone = voxels
                    .iter()
                    .zip(&kept)
                    .filter(|(before, after)| before != after)
                    .count();
                assert_eq!(lost.len(), gone);
                assert!(lost.iter().all(|voxel| voxels[*voxel] && !kept[*voxel]));
            }
        }
    }

    #[test]
    fn a_mask_grows_like_the_distance_transform_says() {
        let mut rng = Rng::keyed(3, 0, 0, Purpose::Test);
        for (spacing_mm, radius_mm) in [
            ([1.5; 3], 3.0),
            ([1.0; 3], 3.0),
            ([5.0, 0.8, 0.7], 3.0),
            ([0.4, 3.0, 6.0], 3.0),
        ] {
            for size in [[6, 7, 66], [3, 2, 3], [20, 1, 128]] {
                let (voxels, mask) = random(size, 0.01, &mut rng);
                let squared = crate::volume::squared_distance_mm(voxels.view(), spacing_mm);
                let wanted = squared.mapv(|squared| squared <= radius_mm * radius_mm + 1e-6);
                assert_eq!(
                    array(&mask.dilated(spacing_mm, radius_mm)),
                    wanted,
                    "{spacing_mm:?} {size:?}"
                );
            }
        }
    }
}
