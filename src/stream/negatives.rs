//! What a hidden tumour in an unlabelled host means: the tissue of its organs is healthy, unknown, or what the critic sees.
//!
//! Applies to cases of kind *unlabelled*, whose organs are known and whose tumours nobody looked for. The image never
//! changes (promise P5), and the synthesized lesion keeps its label.

use ndarray::{Array3, Zip};
use serde::{Deserialize, Serialize};

use super::patch::Undecided;
use super::scene::{Painted, overlap, paste};
use crate::nn::CubeSides;
use crate::store::{CaseKind, CaseRecord, Cases, StoreError};
use crate::synth::gate::dilate_voxel;
use crate::synth::{Cancelled, Engine, GridBridge, HostLook, LESION_FROM, SynthError};
use crate::volume::{Annotation, ClassSet, IGNORE, LabelMap, Organ, Region, Shape, dilated};

/// How far around a synthesized lesion healthy tissue is kept that may be tumour, in mm: the soft edge takes up to 3, the rest is
/// untouched tissue that teaches where the lesion ends. The gate counts false tumour at least as far.
const RIM_MM: f64 = 6.0;

/// What a hidden tumour in an unlabelled host means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnlabelledNegatives {
    /// There is none: the organs' tissue is healthy, as the published pools have it.
    Trust,
    /// It may be anywhere: the organs' tissue is *ignore*, but for 6 mm around the synthesized lesion.
    Ignore,
    /// It is where the critic sees one in the untouched patch. *Ignore* is what it calls tumour, and one voxel around it; and, but for 6 mm
    /// around the synthesized lesion, the organs' tissue that it finds as probably tumour as it finds nine in ten real lesions.
    Critic,
}

/// Lists the organs of an unlabelled case in which nobody looked for tumours; none of a labelled case.
pub(super) fn unsearched(record: &CaseRecord, labels: &LabelMap) -> Vec<Organ> {
    if record.kind == CaseKind::Labelled {
        return Vec::new();
    }
    let looked_for = |id: u8| {
        let name = labels.name(id);
        record
            .annotation
            .classes
            .iter()
            .any(|class| Some(class.as_str()) == name)
    };
    let organs = labels.organs().into_iter();
    organs.filter(|organ| !looked_for(organ.tumour_id)).collect()
}

/// Returns the annotation under which a case's labels are sent: for unlabelled cases the recipe decides what a hidden
/// tumour means, not the case.
pub(super) fn sent_annotation(record: &CaseRecord) -> Annotation {
    Annotation {
        classes: record.annotation.classes.clone(),
        assumed_tumour_free: record.annotation.assumed_tumour_free || record.kind == CaseKind::Unlabelled,
    }
}

/// Turns the organs' healthy tissue into *ignore*, except near the lesion.
pub(super) fn ignore_tissue(label: &mut Array3<u8>, organs: &[Organ], near: Option<&Array3<bool>>) {
    let tissue = organs.iter().fold(ClassSet::default(), |mut set, organ| {
        set.insert(organ.id);
        set
    });
    let ignore = |id: &mut u8, near: bool| {
        if !near && tissue.contains(*id) {
            *id = IGNORE;
        }
    };
    match near {
        Some(near) => Zip::from(label).and(near).for_each(|id, near| ignore(id, *near)),
        None => label.iter_mut().for_each(|id| ignore(id, false)),
    }
}

/// Marks the voxels of a patch that lie on a lesion or within [`RIM_MM`] of it.
///
/// The distance is taken in the lesion's cube, so that a lesion which the patch's border cuts has its whole rim.
pub(super) fn near_lesion(painted: &Painted, patch: Region, spacing_mm: [f64; 3]) -> Array3<bool> {
    let planted = &painted.planted;
    let lesion = planted.soft.map(|soft| u8::from(*soft >= LESION_FROM));
    let mut near = Array3::from_elem(patch.size, false);
    if let Some(parts) = overlap(patch, planted.host.region) {
        paste(&mut near, &dilated(&lesion, spacing_mm, RIM_MM), parts);
    }
    near
}

/// What the critic sees in an untouched patch.
pub(super) struct Suspects {
    /// 1 where it calls tumour.
    called: Array3<u8>,
    /// Of each organ, where its tumour is as probable as the critic's calibration asks: 1 there.
    possible: Vec<(Organ, Array3<u8>)>,
}

impl Suspects {
    /// Turns what is called tumour and what touches it into *ignore*, but never a tumour's voxels; and, except near the lesion, the
    /// organs' healthy tissue that may be one.
    pub fn ignore(&self, label: &mut Array3<u8>, labels: &LabelMap, near: Option<&Array3<bool>>) {
        let mut keep = ClassSet::default();
        labels.organs().iter().for_each(|organ| keep.insert(organ.tumour_id));
        for (organ, possible) in &self.possible {
            let mut kept = possible.mapv(|possible| possible == 0);
            if let Some(near) = near {
                kept |= near;
            }
            ignore_tissue(label, std::slice::from_ref(organ), Some(&kept));
        }
        Zip::from(label)
            .and(&dilate_voxel(&self.called))
            .for_each(|id, called| {
                if *called && *id < Undecided::FIRST && !keep.contains(*id) {
                    *id = IGNORE;
                }
            });
    }
}

/// A patch of a host that the critic is to look at.
pub(super) struct Search<'a> {
    pub(super) engine: &'a Engine,
    pub(super) cases: &'a dyn Cases,
    pub(super) case: usize,
    pub(super) patch: Region,
    /// Voxel size (z, y, x) of the critic in mm.
    pub(super) models_mm: [f64; 3],
    /// Sides of the critic's cubes.
    pub(super) cubes: CubeSides,
    pub(super) cancelled: &'a Cancelled,
}

/// Why the critic could not look.
#[derive(Debug, thiserror::Error)]
pub(super) enum SearchError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Synth(#[from] SynthError),
}

impl Search<'_> {
    /// Returns what the critic sees of tumours of the organs in the untouched patch.
    pub(super) fn suspects(&self, organs: &[Organ]) -> Result<Suspects, SearchError> {
        let is_tumour = |id: &u8| organs.iter().any(|organ| organ.tumour_id == *id);
        // Where boxes overlap, one that sees a tumour is enough.
        let add = |all: &mut Array3<u8>, seen: &Array3<u8>, parts| {
            let mut part = Array3::zeros(all.dim());
            paste(&mut part, seen, parts);
            *all |= &part;
        };
        let store_mm = self.cases.plan().spacing_mm;
        let ratio = std::array::from_fn(|axis| self.models_mm[axis] / store_mm[axis]);
        let mut called = Array3::zeros(self.patch.size);
        let mut possible: Vec<(Organ, Array3<u8>)> = Vec::new();
        let (side, boxes) = cover(self.cubes, self.patch, ratio);
        let bridge = GridBridge::new(store_mm, self.models_mm, side);
        for seen in boxes {
            let look = self.look(seen, bridge)?;
            let Some(parts) = overlap(self.patch, seen) else {
                continue;
            };
            add(&mut called, &look.classes.map(is_tumour).mapv(u8::from), parts);
            for (tumour_id, seen) in &look.possible {
                let Some(organ) = organs.iter().find(|organ| organ.tumour_id == *tumour_id) else {
                    continue;
                };
                match possible.iter_mut().find(|(other, _)| other == organ) {
                    Some((_, all)) => add(all, seen, parts),
                    None => {
                        let mut all = Array3::zeros(self.patch.size);
                        add(&mut all, seen, parts);
                        possible.push((organ.clone(), all));
                    }
                }
            }
        }
        Ok(Suspects { called, possible })
    }

    /// Returns what the critic says of a box, which on another grid is the part of its cube that the cube surely holds.
    fn look(&self, seen: Region, bridge: Option<GridBridge>) -> Result<HostLook, SearchError> {
        let Some(bridge) = bridge else {
            let host = self.cases.read(self.case, seen)?;
            return Ok(self.engine.look(host.image, self.cancelled)?);
        };
        let centre = std::array::from_fn(|axis| seen.start[axis] + (seen.size[axis] / 2) as i64);
        let around = Region::centred(centre, bridge.host_size());
        let host = self.cases.read(self.case, around)?;
        let look = self.engine.look(bridge.view(&host.image), self.cancelled)?;
        let back = |ids: &Array3<u8>| {
            let mut inside = Array3::zeros(seen.size);
            if let Some(parts) = overlap(seen, around) {
                paste(&mut inside, &bridge.labels_back(ids), parts);
            }
            inside
        };
        Ok(HostLook {
            classes: back(&look.classes),
            possible: (look.possible.iter())
                .map(|(id, possible)| (*id, back(possible)))
                .collect(),
        })
    }
}

/// Covers a patch with the cubes that the critic is defined on: one of the least side that holds the patch, reaching past
/// it evenly; along an axis longer than the largest cube as many of those as needed, evenly spread. Returns the cubes' side
/// in the models' voxels, and their boxes in the store's; `ratio` is the models' voxel size over the store's.
fn cover(cubes: CubeSides, patch: Region, ratio: [f64; 3]) -> (usize, Vec<Region>) {
    let sides = cubes.all();
    let largest = sides.into_iter().fold(0, usize::max);
    let size_of = |side: usize| ratio.map(|ratio| libm::floor(side as f64 * ratio + 1e-9) as usize);
    let holds = |side: &usize| size_of(*side).iter().zip(patch.size).all(|(held, side)| *held >= side);
    let side = sides.into_iter().find(holds).unwrap_or(largest);
    let size = size_of(side);
    let [zs, ys, xs] = std::array::from_fn(|axis| starts(patch.start[axis], patch.size[axis], size[axis]));
    let mut boxes = Vec::with_capacity(zs.len() * ys.len() * xs.len());
    for z in &zs {
        for y in &ys {
            boxes.extend(xs.iter().map(|x| cube_at([*z, *y, *x], size)));
        }
    }
    (side, boxes)
}

fn cube_at(start: [i64; 3], size: Shape) -> Region {
    Region { start, size }
}

fn starts(start: i64, length: usize, side: usize) -> Vec<i64> {
    if length <= side {
        return vec![start - ((side - length) / 2) as i64];
    }
    let count = length.div_ceil(side);
    let free = length - side;
    (0..count).map(|i| start + (free * i / (count - 1)) as i64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubes_cover_every_voxel_of_a_patch() {
        for (size, side, count) in [
            ([48; 3], 48, 1),
            ([96; 3], 96, 1),
            ([40, 24, 16], 48, 1),
            ([16; 3], 32, 1),
            ([128, 96, 192], 96, 4),
            ([256; 3], 96, 27),
        ] {
            let patch = Region {
                start: [-7, 0, 1000],
                size,
            };
            let (_, cubes) = cover(CubeSides::default(), patch, [1.0; 3]);
            assert_eq!((cubes.len(), cubes[0].size), (count, [side; 3]), "{size:?}");
            for axis in 0..3 {
                let covered = |v: i64| cubes.iter().any(|c| (c.start[axis]..c.end()[axis]).contains(&v));
                assert!((patch.start[axis]..patch.end()[axis]).all(covered), "{size:?} {axis}");
            }
        }
    }

    #[test]
    fn on_another_grid_the_boxes_are_what_a_cube_surely_holds() {
        let patch = Region {
            start: [5; 3],
            size: [32, 48, 60],
        };
        // A cube of 48 voxels of 1.5 mm holds 28 voxels of 2.5 mm, one of 64 holds 38; 80 of 1.2 mm; 60 of 1.6 mm.
        let (side, boxes) = cover(CubeSides::default(), patch, [1.5 / 2.5, 1.5 / 1.2, 1.5 / 1.6]);
        assert_eq!((side, boxes.len(), boxes[0].size), (64, 1, [38, 80, 60]));
        assert_eq!(boxes[0].start, [2, -11, 5]);
    }

    fn row(values: &[u8]) -> Array3<u8> {
        Array3::from_shape_vec((1, 1, values.len()), values.to_vec()).unwrap()
    }

    #[test]
    fn ignored_tissue_is_that_of_organs_nobody_searched_outside_the_rim() {
        let organs = [LabelMap::default().organ("liver").unwrap()];
        let near = row(&[1, 1, 0, 0, 0, 0]).mapv(|near| near == 1);
        let mut label = row(&[2, 1, 1, 0, 3, 255]);
        ignore_tissue(&mut label, &organs, Some(&near));
        assert_eq!(label, row(&[2, 1, 255, 0, 3, 255]));
        ignore_tissue(&mut label, &organs, None);
        assert_eq!(label, row(&[2, 255, 255, 0, 3, 255]));
    }

    #[test]
    fn what_is_called_tumour_grows_by_a_voxel_and_spares_tumours() {
        let labels = LabelMap::default();
        let mut suspects = Suspects {
            called: row(&[0, 0, 1, 0, 0, 0, 1]),
            possible: Vec::new(),
        };
        let mut label = row(&[1, 1, 1, 2, 1, 255, 0]);
        suspects.ignore(&mut label, &labels, None);
        assert_eq!(label, row(&[1, 255, 255, 2, 1, 255, 255]));
        let before = label.clone();
        suspects.called.fill(0);
        suspects.ignore(&mut label, &labels, None);
        assert_eq!(label, before);
    }

    #[test]
    fn what_may_be_tumour_is_healthy_tissue_outside_the_rim() {
        let labels = LabelMap::default();
        let [liver, pancreas] = ["liver", "pancreas"].map(|name| labels.organ(name).unwrap());
        let suspects = Suspects {
            called: row(&[0, 0, 0, 0, 0, 0, 0, 1, 0]),
            possible: vec![
                (liver, row(&[1, 1, 1, 1, 1, 0, 0, 1, 0])),
                (pancreas.clone(), row(&[0, 0, 0, 0, 0, 1, 1, 1, 1])),
            ],
        };
        let near = row(&[0, 1, 1, 0, 0, 0, 0, 1, 0]).mapv(|near| near == 1);
        // What may be a tumour of the pancreas is no reason to leave liver out.
        let mut label = row(&[1, 1, 2, 0, 3, 1, 1, 1, pancreas.id]);
        suspects.ignore(&mut label, &labels, Some(&near));
        assert_eq!(label, row(&[255, 1, 2, 0, 3, 1, 255, 255, 255]));
    }
}
