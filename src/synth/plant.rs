//! Finds a lesion's place and soft mask in a case: what a synthesizer is then asked to paint.

use ndarray::Array3;

use super::LESION_FROM;
use crate::lesion::LesionForm;
use crate::rng::{Purpose, Rng};
use crate::sampler::draw_diameter_mm;
use crate::store::{Cases, Crop, StoreError};
use crate::volume::{Organ, Region, SizeClass};

/// Places tried in one attempt before it counts as unplaceable.
const PLACES: usize = 8;

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
    /// Side of the cube in voxels.
    pub cube: usize,
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
    for _ in 0..PLACES {
        let diameter_mm = draw_diameter_mm(&mut shapes, request.organ, request.diameters_mm);
        // Deepest first: those at least a radius deep hold the lesion whole.
        let deep = candidates.partition_point(|candidate| f64::from(candidate.depth_mm) >= diameter_mm / 2.0);
        let choice = candidates[places.below(if deep == 0 { candidates.len() } else { deep })];
        let centre = choice.voxel.map(i64::from);
        let host = request
            .cases
            .read(request.case, Region::centred(centre, [request.cube; 3]))?;
        if let Some(planted) = grow(request, host, centre, diameter_mm) {
            return Ok(Some(planted));
        }
    }
    Ok(None)
}

/// Makes the soft mask and refuses it where too much is clipped or its size class changes.
fn grow(request: &PlantRequest, host: Crop, centre: [i64; 3], diameter_mm: f64) -> Option<Planted> {
    let spacing_mm = request.cases.records()[request.case].grid.spacing_mm();
    let (edge_mm, middle) = (request.form.edge_mm, (request.cube / 2) as f64);
    let mut soft = Array3::from_shape_fn(host.labels.dim(), |(z, y, x)| {
        let d: f64 = [z, y, x]
            .iter()
            .zip(spacing_mm)
            .map(|(v, mm)| (*v as f64 - middle) * mm)
            .map(|mm| mm * mm)
            .sum();
        let inside_mm = diameter_mm / 2.0 - libm::sqrt(d);
        (255.0 * (0.5 + 0.5 * inside_mm / edge_mm).clamp(0.0, 1.0)).round() as u8
    });
    let whole = lesion_voxels(&soft);
    ndarray::Zip::from(&mut soft)
        .and(&host.labels)
        .for_each(|soft, label| *soft = if *label == request.organ.id { *soft } else { 0 });
    let kept = lesion_voxels(&soft);
    let voxel_mm3: f64 = spacing_mm.iter().product();
    let diameter_kept = libm::cbrt(6.0 / std::f64::consts::PI * kept as f64 * voxel_mm3);
    let fits = kept as f64 >= request.form.min_kept * whole as f64 && kept > 0;
    (fits && SizeClass::of_diameter(diameter_kept) == request.size).then_some(Planted {
        host,
        centre,
        soft,
        diameter_mm: diameter_kept,
        radii_mm: [diameter_mm / 2.0; 3],
    })
}

fn lesion_voxels(soft: &Array3<u8>) -> usize {
    soft.iter().filter(|soft| **soft >= LESION_FROM).count()
}
