//! What a case holds, computed once when it is written: organs, real tumours, and where lesions may be centred.

use std::borrow::Cow;
use std::collections::BTreeMap;

use ndarray::{Array3, s};

use super::memory::cut;
use super::{Candidate, OrganRecord, TumourRecord};
use crate::volume::{Connectivity, Grid, Organ, Region, components, squared_distance_mm};

/// The most candidates kept per organ.
pub(super) const MAX_CANDIDATES: usize = 4096;
/// Smaller components are annotation noise: five voxels of 1.5 mm are a ball of 3 mm.
const MIN_TUMOUR_VOXELS: usize = 5;
/// How far from a tumour its organ's tissue is compared with it.
const RING_MM: f64 = 10.0;

/// The voxels of one case.
#[derive(Clone, Copy)]
pub(super) struct Voxels<'a> {
    pub(super) grid: &'a Grid,
    pub(super) image: &'a Array3<i16>,
    pub(super) labels: &'a Array3<u8>,
}

impl Voxels<'_> {
    /// Cuts a box out of the labels; what lies outside the volume is background.
    fn labels_in(&self, region: Region) -> Array3<u8> {
        cut(self.labels, region, 0)
    }
}

/// Finds an organ's healthy tissue and its candidates, deepest first; nothing where it has no voxel.
pub(super) fn organ(voxels: Voxels, organ: &Organ, region: Region) -> (OrganRecord, Vec<Candidate>) {
    // A rim of one voxel stands for everything outside: the organ's surface, or the volume's border.
    let grown = region.grown([1; 3]);
    let outside = voxels.labels_in(grown).mapv(|label| label != organ.id);
    let squared = squared_distance_mm(outside.view(), voxels.grid.spacing_mm());
    let mut ranked: Vec<(f64, u64, [u16; 3])> = squared
        .indexed_iter()
        .filter(|(_, squared_mm)| **squared_mm > 0.0)
        .map(|((z, y, x), squared_mm)| {
            let voxel: [u16; 3] = std::array::from_fn(|axis| (grown.start[axis] + [z, y, x][axis] as i64) as u16);
            (*squared_mm, scatter(voxel), voxel)
        })
        .collect();
    ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let depth = |squared_mm: f64| libm::sqrt(squared_mm) as f32;
    let record = OrganRecord {
        id: organ.id,
        voxels: ranked.len() as u64,
        region,
        holds_mm: ranked.first().map_or(0.0, |(deepest, ..)| 2.0 * depth(*deepest)),
    };
    let candidates = spread_ranks(ranked.len())
        .map(|rank| Candidate {
            voxel: ranked[rank].2,
            depth_mm: depth(ranked[rank].0),
        })
        .collect();
    (record, candidates)
}

/// Orders voxels of equal depth as if at random, so that a subsample is spread over the organ and not over a corner.
fn scatter(voxel: [u16; 3]) -> u64 {
    let [z, y, x] = voxel.map(u64::from);
    // The finaliser of SplitMix64: a fixed, well-mixed bijection.
    let mut mixed = (z << 32 | y << 16 | x).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Picks at most [`MAX_CANDIDATES`] of `count` ranks: all where they fit, else rank k^2 / K^2, dense where it is deep.
fn spread_ranks(count: usize) -> impl Iterator<Item = usize> {
    let kept = count.min(MAX_CANDIDATES);
    (0..kept).scan(None, move |last: &mut Option<usize>, k| {
        let next = last.map_or(0, |rank| rank + 1);
        let rank = if kept == count {
            k
        } else {
            next.max(count * k * k / (kept * kept))
        };
        *last = Some(rank);
        Some(rank)
    })
}

/// Returns the box around the voxels of every label that occurs.
pub(super) fn boxes(labels: &Array3<u8>) -> BTreeMap<u8, Region> {
    let mut limits: BTreeMap<u8, ([usize; 3], [usize; 3])> = BTreeMap::new();
    for (row, line) in labels.rows().into_iter().enumerate() {
        let (z, y) = (row / labels.dim().1, row % labels.dim().1);
        let line = line.as_slice().map_or_else(|| line.to_vec().into(), Cow::from);
        let mut x = 0;
        // Labels come in runs: only where one begins and ends is looked at.
        for run in line.chunk_by(|a, b| a == b) {
            let (first, last) = (x, x + run.len() - 1);
            x += run.len();
            if run[0] == 0 {
                continue;
            }
            let (low, high) = limits.entry(run[0]).or_insert(([usize::MAX; 3], [0; 3]));
            for (axis, (from, to)) in [(z, z), (y, y), (first, last)].into_iter().enumerate() {
                low[axis] = low[axis].min(from);
                high[axis] = high[axis].max(to);
            }
        }
    }
    let region = |(low, high): ([usize; 3], [usize; 3])| Region {
        start: low.map(|v| v as i64),
        size: std::array::from_fn(|axis| high[axis] - low[axis] + 1),
    };
    limits
        .into_iter()
        .map(|(label, limit)| (label, region(limit)))
        .collect()
}

/// Finds the connected real tumours of an organ (26 neighbours) within the box around their class.
pub(super) fn tumours(voxels: Voxels, organ: &Organ, region: Region) -> Vec<TumourRecord> {
    let mask = voxels.labels_in(region).mapv(|label| label == organ.tumour_id);
    components(mask, Connectivity::Corners)
        .into_iter()
        .filter(|members| members.len() >= MIN_TUMOUR_VOXELS)
        .map(|members| {
            let shift = |voxel: [usize; 3]| std::array::from_fn(|axis| region.start[axis] + voxel[axis] as i64);
            tumour(voxels, organ, &members.into_iter().map(shift).collect::<Vec<_>>())
        })
        .collect()
}

fn tumour(voxels: Voxels, organ: &Organ, members: &[[i64; 3]]) -> TumourRecord {
    let spacing_mm = voxels.grid.spacing_mm();
    let count = members.len() as f64;
    let volume_mm3 = count * spacing_mm.iter().product::<f64>();
    let low: [i64; 3] = std::array::from_fn(|axis| members.iter().map(|m| m[axis]).min().unwrap_or(0));
    let high: [i64; 3] = std::array::from_fn(|axis| members.iter().map(|m| m[axis]).max().unwrap_or(0));
    let region = Region {
        start: low,
        size: std::array::from_fn(|axis| (high[axis] - low[axis] + 1) as usize),
    };
    TumourRecord {
        id: organ.tumour_id,
        voxels: members.len() as u64,
        region,
        centre: nearest_to_centroid(members, spacing_mm),
        diameter_mm: libm::cbrt(6.0 * volume_mm3 / std::f64::consts::PI) as f32,
        contrast_hu: contrast(voxels, organ, members, region) as f32,
    }
}

fn nearest_to_centroid(members: &[[i64; 3]], spacing_mm: [f64; 3]) -> [i64; 3] {
    let count = members.len() as f64;
    let centroid: [f64; 3] = std::array::from_fn(|axis| members.iter().map(|m| m[axis]).sum::<i64>() as f64 / count);
    let squared = |member: &[i64; 3]| -> f64 {
        (0..3)
            .map(|axis| ((member[axis] as f64 - centroid[axis]) * spacing_mm[axis]).powi(2))
            .sum()
    };
    let nearest = members
        .iter()
        .min_by(|a, b| squared(a).total_cmp(&squared(b)).then(a.cmp(b)));
    *nearest.expect("a component has a voxel")
}

/// Returns mean inside minus mean of the organ's healthy voxels within 10 mm; 0 where there is none.
fn contrast(voxels: Voxels, organ: &Organ, members: &[[i64; 3]], region: Region) -> f64 {
    let spacing_mm = voxels.grid.spacing_mm();
    let shape: [usize; 3] = voxels.labels.dim().into();
    let margin = spacing_mm.map(|mm| libm::ceil(RING_MM / mm) as usize);
    let around = region.grown(margin).intersect(&Region::whole(shape));
    let mut inside = Array3::from_elem(around.size, false);
    let mut inside_sum = 0_i64;
    for member in members {
        let at: [usize; 3] = std::array::from_fn(|axis| (member[axis] - around.start[axis]) as usize);
        inside[at] = true;
        inside_sum += i64::from(voxels.image[member.map(|v| v as usize)]);
    }
    let squared = squared_distance_mm(inside.view(), spacing_mm);
    let [z, y, x] = around.start.map(|v| v as usize);
    let [d, h, w] = around.size;
    let window = s![z..z + d, y..y + h, x..x + w];
    let (mut ring_sum, mut ring_count) = (0_i64, 0_i64);
    ndarray::Zip::from(&squared)
        .and(voxels.labels.slice(window))
        .and(voxels.image.slice(window))
        .for_each(|squared_mm, label, hu| {
            if *label == organ.id && *squared_mm <= RING_MM * RING_MM {
                ring_sum += i64::from(*hu);
                ring_count += 1;
            }
        });
    if ring_count == 0 {
        return 0.0;
    }
    inside_sum as f64 / members.len() as f64 - ring_sum as f64 / ring_count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Affine, LabelMap};

    fn case() -> (Grid, Array3<i16>, Array3<u8>) {
        let shape = [20, 24, 28];
        let grid = Grid {
            shape,
            affine: Affine::axis_aligned([2.0, 1.0, 1.0], [0.0; 3]),
        };
        let mut labels = Array3::zeros(shape);
        labels.slice_mut(s![2..18, 2..22, 2..26]).fill(1);
        labels.slice_mut(s![4..7, 4..8, 4..8]).fill(2);
        labels[[7, 8, 8]] = 2; // joined over a corner: 26 neighbours
        labels[[15, 18, 20]] = 2; // a single voxel: noise
        let image = labels.mapv(|label| [0, 100, 40][usize::from(label)]);
        (grid, image, labels)
    }

    #[test]
    fn tumours_are_components_with_size_place_and_contrast() {
        let (grid, image, labels) = case();
        let voxels = Voxels {
            grid: &grid,
            image: &image,
            labels: &labels,
        };
        let liver = LabelMap::default().organ("liver").unwrap();
        let found = tumours(voxels, &liver, boxes(&labels)[&2]);
        assert_eq!(found.len(), 1);
        let tumour = &found[0];
        assert_eq!(
            (tumour.voxels, tumour.region.start, tumour.region.size),
            (49, [4, 4, 4], [4, 5, 5])
        );
        assert_eq!(tumour.contrast_hu, -60.0);
        assert_eq!(tumour.centre, [5, 6, 6]);
        // 49 voxels of 2 mm^3: the ball of 98 mm^3 is 5.72 mm across.
        assert!((tumour.diameter_mm - 5.72).abs() < 0.01);
    }

    #[test]
    fn organs_know_what_they_hold() {
        let (grid, image, labels) = case();
        let voxels = Voxels {
            grid: &grid,
            image: &image,
            labels: &labels,
        };
        let liver = LabelMap::default().organ("liver").unwrap();
        let (record, candidates) = organ(voxels, &liver, boxes(&labels)[&1]);
        assert_eq!(record.voxels, 16 * 20 * 24 - 50);
        assert_eq!(candidates.len(), MAX_CANDIDATES);
        assert!(candidates.is_sorted_by(|a, b| a.depth_mm >= b.depth_mm));
        assert_eq!(record.holds_mm, 2.0 * candidates[0].depth_mm);
        // Every depth is the distance to the nearest voxel that is not healthy liver.
        for candidate in candidates.iter().step_by(97) {
            let [z, y, x] = candidate.voxel.map(f64::from);
            let naive = labels
                .indexed_iter()
                .filter(|(_, label)| **label != 1)
                .map(|((a, b, c), _)| (2.0 * (a as f64 - z)).powi(2) + (b as f64 - y).powi(2) + (c as f64 - x).powi(2))
                .fold(f64::INFINITY, f64::min);
            assert!((f64::from(candidate.depth_mm) - naive.sqrt()).abs() < 1e-5);
        }
    }

    #[test]
    fn a_volumes_border_is_a_surface() {
        let labels = Array3::from_elem([9, 9, 9], 1_u8);
        let image = Array3::zeros([9, 9, 9]);
        let grid = Grid {
            shape: [9; 3],
            affine: Affine::axis_aligned([1.0; 3], [0.0; 3]),
        };
        let voxels = Voxels {
            grid: &grid,
            image: &image,
            labels: &labels,
        };
        let liver = LabelMap::default().organ("liver").unwrap();
        let (record, candidates) = organ(voxels, &liver, Region::whole([9; 3]));
        assert_eq!((record.holds_mm, candidates[0].voxel), (10.0, [4, 4, 4]));
    }

    #[test]
    fn ranks_are_unique_deep_and_reach_far() {
        let ranks: Vec<_> = spread_ranks(1_000_000).collect();
        assert_eq!(ranks.len(), MAX_CANDIDATES);
        assert!(ranks.is_sorted_by(|a, b| a < b) && ranks[ranks.len() - 1] < 1_000_000);
        assert!(ranks[2048] < 260_000 && ranks[4095] > 990_000);
        assert_eq!(spread_ranks(3).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
