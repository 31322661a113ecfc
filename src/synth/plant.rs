//! Finds a lesion's place and soft mask in a case: what a synthesizer is then asked to paint.

use ndarray::{Array3, Zip};

use crate::lesion::{BLOCKED, LesionForm, MaskRequest, Shape, ShapeRequest, choose_centre, soft_mask};
use crate::rng::{Purpose, Rng};
use crate::sampler::draw_diameter_mm;
use crate::store::{Cases, Crop, StoreError};
use crate::volume::{BACKGROUND, Organ, Region, SizeClass};

/// Places tried in one attempt before it counts as unplaceable.
const PLACES: u32 = 8;
/// Below this an unnamed voxel is air or lung, which no lesion grows into, in HU.
const TISSUE_FROM_HU: f32 = -300.0;

/// What lesion is wanted, and where.
pub struct PlantRequest<'a> {
    /// The cases.
    pub cases: &'a dyn Cases,
    /// The case's position.
    pub case: usize,
    /// The organ.
    pub organ: &'a Organ,
    /// The size class, which clipping must not change.
    pub size: SizeClass,
    /// Diameters in mm to draw from.
    pub diameters_mm: [f64; 2],
    /// The form.
    pub form: &'a LesionForm,
    /// The box in which the lesion is looked at, in the store's voxels (z, y, x).
    pub box_voxels: [usize; 3],
    /// Seed, index and attempt: the key of every random number.
    pub key: [u64; 3],
}

/// A lesion with a place and a soft mask, in the cube around it.
pub struct Planted {
    /// The cube as it is stored.
    pub host: Crop,
    /// Its centre in the case's voxels (z, y, x).
    pub centre: [i64; 3],
    /// The soft mask in 1/255.
    pub soft: Array3<u8>,
    /// Equivalent-sphere diameter in mm after clipping.
    pub diameter_mm: f64,
    /// Semi-axes before deformation and clipping, in mm.
    pub radii_mm: [f64; 3],
}

/// Draws a lesion and looks for a place where enough of it lies in the organ; nothing where none was found.
///
/// # Errors
/// [`StoreError`] names the damaged file.
pub fn plant(request: &PlantRequest) -> Result<Option<Planted>, StoreError> {
    let [seed, index, attempt] = request.key;
    let mut shapes = Rng::keyed(seed, index, attempt, Purpose::Shape);
    let mut places = Rng::keyed(seed, index, attempt, Purpose::Place);
    let candidates = request.cases.candidates(request.case, request.organ.id)?;
    if candidates.is_empty() {
        return Ok(None);
    }
    for tried in 0..PLACES {
        let shape = Shape::draw(
            &ShapeRequest {
                diameter_mm: draw_diameter_mm(&mut shapes, request.organ, request.diameters_mm),
                form: request.form,
            },
            &mut shapes,
        );
        let depth = (request.form, tried);
        let Some(centre) = choose_centre(&candidates, shape.diameter_mm(), depth, &mut places) else {
            continue;
        };
        if let Some(planted) = planted_at(request, &shape, centre)? {
            return Ok(Some(planted));
        }
    }
    Ok(None)
}

/// Returns the lesion at a place; nothing where too little of it lies in the organ.
fn planted_at(request: &PlantRequest, shape: &Shape, centre: [i64; 3]) -> Result<Option<Planted>, StoreError> {
    let region = Region::centred(centre, request.box_voxels);
    let host = request.cases.read(request.case, region)?;
    let mask = soft_mask(&MaskRequest {
        shape,
        centre,
        region,
        spacing_mm: request.cases.records()[request.case].grid.spacing_mm(),
        host: &habitat(&host.labels, &host.image, request.organ.id),
        form: request.form,
    });
    let keeps_its_class = SizeClass::of_diameter(mask.diameter_mm) == request.size;
    let holds = mask.voxels > 0 && mask.kept >= request.form.min_kept && keeps_its_class && mask.is_whole();
    Ok(holds.then(|| Planted {
        host,
        centre,
        soft: mask.soft,
        diameter_mm: mask.diameter_mm,
        radii_mm: mask.radii_mm,
    }))
}

/// Returns where a lesion may be: 1 in the healthy organ, 0 in unnamed tissue beside it, blocked in real tumours, other
/// organs and air. `labels` holds stored ids, `image` HU.
pub fn habitat<T: Copy + Into<f32>>(labels: &Array3<u8>, image: &Array3<T>, organ_id: u8) -> Array3<u8> {
    // Without branches, so that rows are tested in vectors.
    Zip::from(labels).and(image).map_collect(|label, hu| {
        let is_tissue = (*label == BACKGROUND) & ((*hu).into() >= TISSUE_FROM_HU);
        let beside = if is_tissue { 0 } else { BLOCKED };
        if *label == organ_id { 1 } else { beside }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_organ_and_tissue_beside_it_host_a_lesion() {
        let row = |values: [i16; 6]| Array3::from_shape_vec([1, 1, 6], values.to_vec()).unwrap();
        let labels = row([1, 0, 0, 2, 3, 1]).mapv(|label| label as u8);
        let image = row([-900, -300, -301, 40, 40, 40]);
        let expected = [1, 0, BLOCKED, BLOCKED, BLOCKED, 1];
        assert_eq!(habitat(&labels, &image, 1).as_slice().unwrap(), expected);
        assert_eq!(
            habitat(&labels, &image.mapv(f32::from), 1).as_slice().unwrap(),
            expected
        );
    }
}
