//! Puts a patch together: crop, lesion, labels on the wire, augmentation.

use ndarray::{Array3, Zip, s};

use super::StreamError;
use super::patch::{PatchMeta, StreamedPatch};
use super::recipe::Recipe;
use crate::rng::{Purpose, Rng};
use crate::sampler::{Change, Warp};
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
fn overlap(crop: Region, cube: Region) -> Option<[Region; 2]> {
    let part = crop.intersect(&cube);
    (!part.is_empty()).then(|| [part.relative_to(crop.start), part.relative_to(cube.start)])
}

/// Copies the shared part of a cube into a crop.
fn paste<T: Copy>(crop: &mut Array3<T>, cube: &Array3<T>, [to, from]: [Region; 2]) {
    let range = |region: Region, axis: usize| {
        let start = region.start[axis] as usize;
        start..start + region.size[axis]
    };
    crop.slice_mut(s![range(to, 0), range(to, 1), range(to, 2)])
        .assign(&cube.slice(s![range(from, 0), range(from, 1), range(from, 2)]));
}

/// Reads the crop of a patch, pastes the lesion, and augments.
///
/// # Errors
/// The store's, naming the damaged file; or a case whose annotation names an unknown class.
pub(super) fn assemble(
    cases: &dyn Cases,
    recipe: &Recipe,
    case: usize,
    painted: Option<&Painted>,
    meta: PatchMeta,
) -> Result<StreamedPatch, StreamError> {
    let failed = |what: String| StreamError::Failed {
        index: meta.index,
        what,
    };
    let record = &cases.records()[case];
    let labels = &cases.plan().labels;
    let size = meta.region.size;
    let mut rng = Rng::keyed(recipe.seed, meta.index, 0, Purpose::Warp);
    let warp = Warp::draw(&recipe.augment, size, record.grid.spacing_mm(), &mut rng);
    // What a warp looks up around the patch is read, and painted, with it.
    let region = warp
        .as_ref()
        .map_or(meta.region, |warp| meta.region.grown(warp.margin()));
    let crop = cases.read(case, region).map_err(|error| failed(error.to_string()))?;
    let label = wire_labels(record, labels, &crop).map_err(failed)?;
    let shape = crop.image.dim();
    let mut patch = StreamedPatch {
        image: crop.image.clone(),
        label,
        source: crop.image,
        soft_mask: Array3::zeros(shape),
        lesion_instance: Array3::zeros(size),
        meta,
    };
    if let Some(painted) = painted {
        paste_lesion(&mut patch, painted, region);
    }
    patch.meta.affine = record.grid.affine.shifted(patch.meta.region.start);
    if let Some(warp) = warp {
        patch.image = warp.image(&patch.image);
        patch.source = warp.image(&patch.source);
        patch.soft_mask = warp.soft(&patch.soft_mask);
        patch.label = warp.labels(&patch.label);
        patch.meta.affine = warp.affine(&patch.meta.affine);
    }
    if let Some(painted) = painted {
        label_lesion(&mut patch, painted.tumour_id);
    }
    let window = cases.plan().window_hu;
    let centre_hu = f64::from(window.low + window.high) / 2.0;
    let mut rng = Rng::keyed(recipe.seed, patch.meta.index, 0, Purpose::Augment);
    let change = Change::draw(&recipe.augment, size, centre_hu, &mut rng);
    augment(&mut patch, &change, painted.is_some());
    Ok(patch)
}

/// Pastes a lesion's image and soft mask into the box `region`.
fn paste_lesion(patch: &mut StreamedPatch, painted: &Painted, region: Region) {
    if let Some(parts) = overlap(region, painted.planted.host.region) {
        paste(&mut patch.image, &painted.image, parts);
        paste(&mut patch.soft_mask, &painted.planted.soft, parts);
    }
}

/// Labels the lesion where its soft mask says so.
fn label_lesion(patch: &mut StreamedPatch, tumour_id: u8) {
    Zip::from(&mut patch.label)
        .and(&mut patch.lesion_instance)
        .and(&patch.soft_mask)
        .for_each(|label, instance, soft| {
            if *soft >= LESION_FROM {
                *label = tumour_id;
                *instance = 1;
            }
        });
}

/// Returns the labels that are sent: the only class a voxel can have, or *ignore*.
fn wire_labels(record: &CaseRecord, labels: &LabelMap, crop: &Crop) -> Result<Array3<u8>, String> {
    let admissible = record
        .annotation
        .admissible(labels)
        .map_err(|error| format!("case {:?}: {error}", record.id))?;
    let sent = admissible.map(|classes| classes.single().unwrap_or(IGNORE));
    Ok(crop.labels.map(|label| sent[usize::from(*label)]))
}

fn augment(patch: &mut StreamedPatch, change: &Change, is_painted: bool) {
    patch.meta.affine = change.affine(&patch.meta.affine, patch.meta.region.size);
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
