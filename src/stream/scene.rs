//! Puts a patch together: crop, lesion, labels on the wire, augmentation.

use ndarray::{Array3, Zip, s};

use super::StreamError;
use super::negatives::{self, UnlabelledNegatives};
use super::patch::{PatchMeta, StreamedPatch};
use super::recipe::Recipe;
use crate::rng::{Purpose, Rng};
use crate::sampler::Change;
use crate::store::{CaseRecord, Cases, Crop};
use crate::synth::{LESION_FROM, Planted};
use crate::volume::{IGNORE, LabelMap, Region, Shape};

/// A painted lesion, ready to be pasted.
pub(super) struct Painted {
    pub(super) planted: Planted,
    /// The cube after synthesis, in HU.
    pub(super) image: Array3<i16>,
    /// The label id of the organ's tumour.
    pub(super) tumour_id: u8,
}

/// Draws the box of a patch that shows `centre`: it lies in the middle half of the patch where the volume allows.
pub(super) fn crop_around(centre: [i64; 3], volume: Shape, patch: Shape, rng: &mut Rng) -> Region {
    let start = std::array::from_fn(|axis| {
        let at = (patch[axis] / 4 + rng.below(patch[axis] / 2 + 1)) as i64;
        let spare = volume[axis] as i64 - patch[axis] as i64;
        if spare < 0 {
            // The volume is smaller than the patch: it lies in the middle, in air.
            return spare.div_euclid(2);
        }
        (centre[axis] - at).clamp(0, spare)
    });
    Region { start, size: patch }
}

/// Returns the part of a cube that a crop shows, as slices of the crop and of the cube.
pub(super) fn overlap(crop: Region, cube: Region) -> Option<[Region; 2]> {
    let part = crop.intersect(&cube);
    (!part.is_empty()).then(|| [part.relative_to(crop.start), part.relative_to(cube.start)])
}

/// Copies the shared part of a cube into a crop.
pub(super) fn paste<T: Copy>(crop: &mut Array3<T>, cube: &Array3<T>, [to, from]: [Region; 2]) {
    let range = |region: Region, axis: usize| {
        let start = region.start[axis] as usize;
        start..start + region.size[axis]
    };
    crop.slice_mut(s![range(to, 0), range(to, 1), range(to, 2)])
        .assign(&cube.slice(s![range(from, 0), range(from, 1), range(from, 2)]));
}

/// What a patch is put together from.
pub(super) struct Scene<'a> {
    pub(super) cases: &'a dyn Cases,
    pub(super) recipe: &'a Recipe,
    pub(super) case: usize,
    pub(super) painted: Option<&'a Painted>,
    /// 1 where the critic calls tumour in the untouched patch; absent where it was not asked.
    pub(super) suspects: Option<Array3<u8>>,
}

/// Reads the crop of a patch, pastes the lesion, leaves out what may hide a tumour, and augments.
///
/// # Errors
/// The store's, naming the damaged file; or a case whose annotation names an unknown class.
pub(super) fn assemble(scene: &Scene, meta: PatchMeta) -> Result<StreamedPatch, StreamError> {
    let Scene {
        cases, recipe, painted, ..
    } = *scene;
    let failed = |what: String| StreamError::Failed {
        index: meta.index,
        what,
    };
    let record = &cases.records()[scene.case];
    let crop = cases
        .read(scene.case, meta.region)
        .map_err(|error| failed(error.to_string()))?;
    let labels = &cases.plan().labels;
    let label = wire_labels(record, labels, &crop).map_err(failed)?;
    let shape = crop.image.dim();
    let mut patch = StreamedPatch {
        image: crop.image.clone(),
        label,
        source: crop.image,
        soft_mask: Array3::zeros(shape),
        lesion_instance: Array3::zeros(shape),
        meta,
    };
    if let Some(painted) = painted {
        add_lesion(&mut patch, painted);
    }
    doubt(&mut patch, scene);
    let window = cases.plan().window_hu;
    let centre_hu = f64::from(window.low + window.high) / 2.0;
    let mut rng = Rng::keyed(recipe.seed, patch.meta.index, 0, Purpose::Augment);
    let change = Change::draw(&recipe.augment, patch.meta.region.size, centre_hu, &mut rng);
    augment(&mut patch, record, &change, painted.is_some());
    Ok(patch)
}

/// Turns into *ignore* what the recipe does not take for healthy in an unlabelled host.
fn doubt(patch: &mut StreamedPatch, scene: &Scene) {
    let labels = &scene.cases.plan().labels;
    let record = &scene.cases.records()[scene.case];
    let label = &mut patch.label;
    patch.meta.ignored_voxels = match (scene.recipe.unlabelled_negatives, &scene.suspects) {
        (Some(UnlabelledNegatives::Critic), Some(suspects)) => negatives::ignore_suspects(label, suspects, labels),
        (Some(UnlabelledNegatives::Ignore), _) => {
            let near = |painted| negatives::near_lesion(painted, patch.meta.region, record.grid.spacing_mm());
            let organs = negatives::unsearched(record, labels);
            negatives::ignore_tissue(label, &organs, scene.painted.map(near).as_ref())
        }
        _ => 0,
    };
}

fn add_lesion(patch: &mut StreamedPatch, painted: &Painted) {
    let planted = &painted.planted;
    let Some(parts) = overlap(patch.meta.region, planted.host.region) else {
        return;
    };
    paste(&mut patch.image, &painted.image, parts);
    paste(&mut patch.soft_mask, &planted.soft, parts);
    Zip::from(&mut patch.label)
        .and(&mut patch.lesion_instance)
        .and(&patch.soft_mask)
        .for_each(|label, instance, soft| {
            if *soft >= LESION_FROM {
                *label = painted.tumour_id;
                *instance = 1;
            }
        });
}

/// Returns the labels that are sent: the only class a voxel can have, or *ignore*.
fn wire_labels(record: &CaseRecord, labels: &LabelMap, crop: &Crop) -> Result<Array3<u8>, String> {
    let admissible = negatives::sent_annotation(record)
        .admissible(labels)
        .map_err(|error| format!("case {:?}: {error}", record.id))?;
    let sent = admissible.map(|classes| classes.single().unwrap_or(IGNORE));
    Ok(crop.labels.map(|label| sent[usize::from(*label)]))
}

fn augment(patch: &mut StreamedPatch, record: &CaseRecord, change: &Change, is_painted: bool) {
    let region = patch.meta.region;
    patch.meta.affine = change.affine(&record.grid.affine.shifted(region.start), region.size);
    patch.image = change.reorder(&patch.image);
    patch.label = change.reorder(&patch.label);
    change.recolour(&mut patch.image);
    if !is_painted {
        // The image is its own source, and there is no lesion to reorder.
        patch.source = patch.image.clone();
        return;
    }
    patch.source = change.reorder(&patch.source);
    patch.soft_mask = change.reorder(&patch.soft_mask);
    patch.lesion_instance = change.reorder(&patch.lesion_instance);
    change.recolour(&mut patch.source);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_show_their_centre_and_stay_inside() {
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        for _ in 0..200 {
            let centre = [rng.below(40) as i64, rng.below(50) as i64, rng.below(20) as i64];
            let region = crop_around(centre, [40, 50, 20], [16, 16, 32], &mut rng);
            let end = region.end();
            for axis in 0..2 {
                assert!(region.start[axis] >= 0 && end[axis] <= [40, 50][axis]);
                assert!((region.start[axis]..end[axis]).contains(&centre[axis]));
            }
            assert_eq!(region.start[2], -6);
        }
    }
}
