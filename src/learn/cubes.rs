//! Which cubes a step sees, and their tensors.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use ndarray::Array3;

use super::LearnError;
use super::augment::Look;
use crate::nn::{CubeSides, Targets};
use crate::rng::Rng;
use crate::store::{Candidate, CaseKind, CaseRecord, Cases, TumourRecord};
use crate::volume::{ClassSet, Connectivity, HuWindow, Organ, Region, SizeClass, take_component};

/// A cube of a case, after augmentation.
#[derive(Clone, Debug)]
pub(super) struct Cube {
    /// The case's position in the store.
    pub case: usize,
    /// Intensities in HU.
    pub image: Array3<f32>,
    /// Stored label ids.
    pub labels: Array3<u8>,
}

/// Returns the cube's side for a size class, no longer than `max_side`.
pub(super) fn side_of(size: SizeClass, max_side: usize) -> usize {
    CubeSides::up_to(max_side).of(size)
}

/// Reads the cube of `side` voxels around a centre and changes its look.
pub(super) fn read_cube(
    cases: &dyn Cases,
    case: usize,
    centre: [i64; 3],
    side: usize,
    look: &Look,
) -> Result<Cube, LearnError> {
    let crop = cases.read(case, Region::centred(centre, [side; 3]))?;
    let (image, labels) = look.apply(crop.image.mapv(f32::from), crop.labels);
    Ok(Cube { case, image, labels })
}

/// Marks a cube's lesion with 1: the tumour's voxels that hang together with those at its centre. Other tumours of the class may
/// lie in the cube, too.
pub(super) fn lesion_of(cube: &Cube, tumour_id: u8) -> Array3<u8> {
    let (d, h, w) = cube.labels.dim();
    let mut lesion = Array3::zeros((d, h, w));
    let mut is_tumour = cube.labels.mapv(|id| id == tumour_id);
    for voxel in take_component(&mut is_tumour, [d / 2, h / 2, w / 2], Connectivity::Corners) {
        lesion[voxel] = 1;
    }
    lesion
}

/// Stacks arrays to `[B, 1, D, H, W]`.
pub(super) fn stack<'a>(arrays: impl Iterator<Item = &'a Array3<f32>>, device: &Device) -> Tensor<5> {
    let arrays: Vec<&Array3<f32>> = arrays.collect();
    let (d, h, w) = arrays[0].dim();
    let values: Vec<f32> = arrays.iter().flat_map(|array| array.iter().copied()).collect();
    Tensor::from_data(TensorData::new(values, [arrays.len(), 1, d, h, w]), device)
}

/// Maps HU to what networks see; differentiable.
pub(super) fn normalise(hu: Tensor<5>, window: &HuWindow) -> Tensor<5> {
    ((hu - window.low) / (window.high - window.low)).clamp(0.0, 1.0)
}

/// What every voxel of a cube may be, given what its case's annotators looked for.
pub(super) fn admissible(cases: &dyn Cases, cube: &Cube) -> Result<Vec<ClassSet>, LearnError> {
    let table = cases.records()[cube.case].annotation.admissible(&cases.plan().labels)?;
    Ok(cube.labels.iter().map(|label| table[usize::from(*label)]).collect())
}

/// The targets of a batch of cubes.
pub(super) fn targets(cases: &dyn Cases, cubes: &[Cube]) -> Result<Targets, LearnError> {
    let mut sets = Vec::new();
    for cube in cubes {
        sets.extend(admissible(cases, cube)?);
    }
    Ok(Targets::new(sets))
}

/// What there is to sample from: real tumours by organ and size, and cases that show an organ.
pub(super) struct Catalogue<'a> {
    pub cases: &'a dyn Cases,
    pub organs: Vec<Organ>,
    /// (organ's position, size) to (case, tumour's position).
    tumours: BTreeMap<(usize, SizeClass), Vec<(usize, usize)>>,
    /// (kind is labelled, organ's position) to cases.
    hosts: BTreeMap<(bool, usize), Vec<usize>>,
}

impl<'a> Catalogue<'a> {
    /// Lists what a set of cases holds.
    pub fn new(cases: &'a dyn Cases, among: &[usize]) -> Self {
        let organs = cases.plan().labels.organs();
        let mut tumours: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut hosts: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for &case in among {
            let record = &cases.records()[case];
            for (at, organ) in organs.iter().enumerate() {
                if record.organ(organ.id).is_some_and(|organ| organ.voxels > 0) {
                    let labelled = record.kind == CaseKind::Labelled;
                    hosts.entry((labelled, at)).or_default().push(case);
                }
                for (i, tumour) in record.tumours.iter().enumerate() {
                    if tumour.id == organ.tumour_id {
                        let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
                        tumours.entry((at, size)).or_default().push((case, i));
                    }
                }
            }
        }
        Self {
            cases,
            organs,
            tumours,
            hosts,
        }
    }

    pub fn record(&self, case: usize) -> &'a CaseRecord {
        &self.cases.records()[case]
    }

    /// Lists all real tumours as (case, organ's position, record).
    pub fn all_tumours(&self) -> Vec<(usize, usize, &'a TumourRecord)> {
        let entries = self.tumours.iter();
        let flat = entries.flat_map(|((organ, _), list)| list.iter().map(move |(case, i)| (*case, *organ, *i)));
        flat.map(|(case, organ, i)| (case, organ, &self.record(case).tumours[i]))
            .collect()
    }

    /// Lists the contrasts of those of an organ's real tumours that lie in its tissue, in HU.
    pub fn contrasts_hu(&self, organ: usize) -> Vec<f32> {
        let lists = self.tumours.iter().filter(|((o, _), _)| *o == organ);
        let flat = lists.flat_map(|(_, list)| list);
        flat.filter_map(|(case, i)| self.record(*case).tumours[*i].known_contrast_hu())
            .collect()
    }

    /// Draws a real tumour: organ, then size class, then lesion, each uniformly among those that exist; of `sizes` where
    /// the organ has any.
    pub fn draw_tumour(&self, rng: &mut Rng, sizes: &[SizeClass]) -> Option<(usize, usize, &'a TumourRecord)> {
        let mut organs: Vec<usize> = self.tumours.keys().map(|(organ, _)| *organ).collect();
        organs.dedup();
        if organs.is_empty() {
            return None;
        }
        let organ = organs[rng.below(organs.len())];
        let of_organ = || self.tumours.iter().filter(|((o, _), _)| *o == organ);
        let mut lists: Vec<_> = of_organ().filter(|((_, size), _)| sizes.contains(size)).collect();
        if lists.is_empty() {
            lists = of_organ().collect();
        }
        let list = lists[rng.below(lists.len())].1;
        let (case, i) = list[rng.below(list.len())];
        Some((case, organ, &self.record(case).tumours[i]))
    }

    /// Draws a case that shows an organ: organ, then case, uniformly.
    pub fn draw_host(&self, rng: &mut Rng, labelled: bool) -> Option<(usize, usize)> {
        let lists: Vec<_> = self.hosts.iter().filter(|((l, _), _)| *l == labelled).collect();
        if lists.is_empty() {
            return None;
        }
        let (&(_, organ), list) = lists[rng.below(lists.len())];
        Some((list[rng.below(list.len())], organ))
    }

    /// Draws a place in a case's organ, at least `depth_mm` deep where the organ has such places.
    pub fn draw_place(
        &self,
        rng: &mut Rng,
        case: usize,
        organ: usize,
        depth_mm: f64,
    ) -> Result<Option<[i64; 3]>, LearnError> {
        let places = self.cases.candidates(case, self.organs[organ].id)?;
        let deep = places.iter().take_while(|place| f64::from(place.depth_mm) >= depth_mm);
        let among = match deep.count() {
            0 => places.len(),
            count => count,
        };
        Ok((among > 0).then(|| {
            let Candidate { voxel, .. } = places[rng.below(among)];
            voxel.map(i64::from)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lesion_is_what_hangs_together_at_the_cubes_centre() {
        let labels = Array3::from_shape_fn((8, 8, 8), |(z, y, x)| match x {
            3..=4 if z > 2 && y > 2 => 2,
            7 => 2,
            _ => 1,
        });
        let cube = Cube {
            case: 0,
            image: Array3::zeros(labels.dim()),
            labels,
        };
        let lesion = lesion_of(&cube, 2);
        assert_eq!(lesion.iter().map(|v| usize::from(*v)).sum::<usize>(), 2 * 5 * 5);
        assert_eq!((lesion[[4, 4, 4]], lesion[[4, 4, 7]]), (1, 0));
        assert!(lesion_of(&cube, 4).iter().all(|voxel| *voxel == 0));
    }
}
