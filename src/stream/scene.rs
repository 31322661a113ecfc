//! Puts a patch together: crop, lesion, labels on the wire, augmentation.

use ndarray::{Array3, Slice, Zip, s};

use super::StreamError;
use super::encoded::Encoded;
use super::negatives::{self, Suspects, UnlabelledNegatives};
use super::patch::{PatchMeta, StreamedPatch, Undecided};
use super::recipe::Recipe;
use crate::rng::{Purpose, Rng};
use crate::sampler::{Change, Grain, Warp};
use crate::store::{CaseRecord, Cases, Crop};
use crate::synth::{LESION_FROM, Planted};
use crate::telemetry::metrics::Stage;
use crate::volume::{ClassSet, IGNORE, LabelMap, Region, Shape};

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
    pub(super) warp: Option<Warp>,
    /// What the critic sees in the untouched box of [`read_box`]; absent where it was not asked.
    pub(super) suspects: Option<Suspects>,
}

/// Draws the warp of a patch.
pub(super) fn draw_warp(recipe: &Recipe, index: u64, patch: Shape, spacing_mm: [f64; 3]) -> Option<Warp> {
    let mut rng = Rng::keyed(recipe.seed, index, 0, Purpose::Warp);
    Warp::draw(&recipe.augment, patch, spacing_mm, &mut rng)
}

/// Returns the box that is read for a patch: what a warp looks up around it is read, and painted, with it.
pub(super) fn read_box(patch: Region, warp: Option<&Warp>) -> Region {
    warp.map_or(patch, |warp| patch.grown(warp.margin()))
}

/// Reads the crop of a patch, pastes the lesion, leaves out what may hide a tumour, and augments.
///
/// # Errors
/// The store's, naming the damaged file; or a case whose annotation names an unknown class.
pub(super) fn assemble(scene: &Scene, meta: PatchMeta) -> Result<StreamedPatch, StreamError> {
    let Scene {
        cases, recipe, painted, ..
    } = *scene;
    let (size, region) = (meta.region.size, read_box(meta.region, scene.warp.as_ref()));
    let failed = |what: String| StreamError::Failed {
        index: meta.index,
        what,
    };
    let record = &cases.records()[scene.case];
    let labels = &cases.plan().labels;
    let crop = Stage::Read
        .time(|| cases.read(scene.case, region))
        .map_err(|error| failed(error.to_string()))?;
    let (label, sets) = coded_labels(record, labels, &crop).map_err(failed)?;
    let shape = crop.image.dim();
    let mut patch = StreamedPatch {
        image: crop.image.clone(),
        label,
        source: crop.image,
        soft_mask: Array3::zeros(shape),
        lesion_instance: Array3::zeros(shape),
        undecided: None,
        encoded: Encoded::default(),
        meta,
    };
    let healthy = scene.warp.as_ref().map(|_| patch.label.clone());
    if let Some(painted) = painted {
        paste_lesion(&mut patch, painted, region);
        label_lesion(&mut patch, painted.tumour_id);
    }
    doubt(&mut patch, scene, region);
    patch.meta.affine = record.grid.affine.shifted(patch.meta.region.start);
    if let (Some(warp), Some(healthy)) = (&scene.warp, healthy) {
        Stage::Augment.time(|| warp_patch(&mut patch, warp, &healthy));
        if let Some(painted) = painted {
            label_lesion(&mut patch, painted.tumour_id);
        }
    }
    let window = cases.plan().window_hu;
    let centre_hu = f64::from(window.low + window.high) / 2.0;
    let mut rng = Rng::keyed(recipe.seed, patch.meta.index, 0, Purpose::Augment);
    let change = Change::draw(&recipe.augment, size, centre_hu, &mut rng);
    Stage::Augment.time(|| {
        augment(&mut patch, &change, painted.is_some());
        roughen(&mut patch, recipe);
    });
    decide(&mut patch, sets);
    Ok(patch)
}

/// Changes sharpness and noise, of image and source alike.
fn roughen(patch: &mut StreamedPatch, recipe: &Recipe) {
    let rng = Rng::keyed(recipe.seed, patch.meta.index, 1, Purpose::Augment);
    if let Some(grain) = Grain::draw(&recipe.augment, rng) {
        grain.apply(&mut patch.image);
        grain.apply(&mut patch.source);
    }
}

/// Turns into *ignore* what the recipe does not take for healthy in an unlabelled host, and counts what lies in the patch;
/// `region` is the box that was read.
fn doubt(patch: &mut StreamedPatch, scene: &Scene, region: Region) {
    let labels = &scene.cases.plan().labels;
    let record = &scene.cases.records()[scene.case];
    let margin = scene.warp.as_ref().map_or([0; 3], Warp::margin);
    let before = ignored_inside(&patch.label, margin);
    let label = &mut patch.label;
    let organs = negatives::unsearched(record, labels);
    let near = || {
        let painted = scene.painted?;
        Some(negatives::near_lesion(painted, region, record.grid.spacing_mm()))
    };
    match (scene.recipe.unlabelled_negatives, &scene.suspects) {
        (Some(UnlabelledNegatives::Critic), Some(suspects)) => {
            suspects.ignore(label, labels, near().as_ref());
        }
        (Some(UnlabelledNegatives::Ignore), _) => negatives::ignore_tissue(label, &organs, near().as_ref()),
        _ => return,
    }
    patch.meta.ignored_voxels = ignored_inside(&patch.label, margin) - before;
}

/// Counts *ignore* in a box without its margin.
fn ignored_inside(label: &Array3<u8>, margin: Shape) -> u32 {
    let inside = label.slice_each_axis(|axis| {
        let margin = margin[axis.axis.index()] as isize;
        Slice::new(margin, Some(axis.len as isize - margin), 1)
    });
    inside.iter().filter(|id| **id == IGNORE).count() as u32
}

/// Warps what was read for a patch to the patch. The lesion is to be labelled anew, from its interpolated mask: under it lies
/// what `healthy` says.
fn warp_patch(patch: &mut StreamedPatch, warp: &Warp, healthy: &Array3<u8>) {
    Zip::from(&mut patch.label)
        .and(&patch.soft_mask)
        .and(healthy)
        .for_each(|label, soft, healthy| {
            if *soft >= LESION_FROM {
                *label = *healthy;
            }
        });
    patch.image = warp.image(&patch.image);
    patch.source = warp.image(&patch.source);
    patch.soft_mask = warp.soft(&patch.soft_mask);
    patch.label = warp.labels(&patch.label);
    patch.lesion_instance = Array3::zeros(patch.meta.region.size);
    patch.meta.affine = warp.affine(&patch.meta.affine);
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

/// Returns the labels as codes: the only class that a voxel can have, a place in the sets of several, or *ignore*.
fn coded_labels(record: &CaseRecord, labels: &LabelMap, crop: &Crop) -> Result<(Array3<u8>, Vec<ClassSet>), String> {
    let admissible = negatives::sent_annotation(record)
        .admissible(labels)
        .map_err(|error| format!("case {:?}: {error}", record.id))?;
    let nothing_known = admissible[usize::from(IGNORE)];
    let mut sets = Vec::<ClassSet>::new();
    let codes = admissible.map(|classes| match classes.single() {
        Some(class) => class,
        None if classes == nothing_known => IGNORE,
        None => {
            let place = sets.iter().position(|set| *set == classes).unwrap_or_else(|| {
                sets.push(classes);
                sets.len() - 1
            });
            Undecided::FIRST + place as u8
        }
    });
    Ok((crop.labels.map(|label| codes[usize::from(*label)]), sets))
}

/// Turns codes into the labels that are sent, and keeps them for trainings where they say more.
fn decide(patch: &mut StreamedPatch, sets: Vec<ClassSet>) {
    if sets.is_empty() {
        return;
    }
    let sent = patch
        .label
        .mapv(|code| if code < Undecided::FIRST { code } else { IGNORE });
    let codes = std::mem::replace(&mut patch.label, sent);
    patch.undecided = Some(Undecided { codes, sets });
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
