//! Copy-paste: a real tumour cut out of a labelled case and put into a healthy organ, the baseline that needs no model.
//!
//! # Source
//! Ghiasi et al., "Simple copy-paste is a strong data augmentation method", CVPR 2021, for tumours in CT. Departure: the
//! donor's HU are shifted by the difference of the two organs around the lesion, which keeps its contrast.

use ndarray::{Array3, Axis, Zip};

use super::{Planted, habitat};
use crate::lesion::{LesionForm, choose_centre};
use crate::rng::{Purpose, Rng};
use crate::store::{Cases, Crop, StoreError, TumourRecord};
use crate::volume::{Connectivity, Organ, Region, dilated, take_component};

/// Places tried in one attempt before it counts as unplaceable.
const PLACES: u32 = 8;
/// How far from the lesion the organ counts as its surroundings, in mm.
const AROUND_MM: f64 = 10.0;
/// The share of the donor in voxels that touch the tumour, in 1/255: they hold part of its blurred edge, and are not lesion.
const RIM: u8 = 96;

/// Which real tumour goes where.
pub struct TransplantRequest<'a> {
    /// The cases.
    pub cases: &'a dyn Cases,
    /// The donor's case and its tumour.
    pub donor: (usize, &'a TumourRecord),
    /// The host's case.
    pub host: usize,
    /// The organ.
    pub organ: &'a Organ,
    /// What of the form is used: where it may lie, and how much of it must be left.
    pub form: &'a LesionForm,
    /// The box that is read around it, in voxels (z, y, x).
    pub box_voxels: [usize; 3],
    /// Seed, index and attempt: the key of every random number.
    pub key: [u64; 3],
}

/// What a real tumour changes in its host.
pub struct Graft {
    /// The residual in HU.
    pub residual: Array3<f32>,
    /// The donor's contrast in HU.
    pub contrast_hu: f64,
}

/// A tumour cut out: its voxels, its HU, and the mean of the organ around it.
struct Cutting {
    image: Array3<i16>,
    lesion: Array3<u8>,
    around_hu: f64,
}

/// Cuts a tumour out, mirrors it at random and looks for a place; nothing where none was found, or no healthy organ lies
/// around it.
///
/// # Errors
/// [`StoreError`] names the damaged file.
pub fn transplant(request: &TransplantRequest) -> Result<Option<(Planted, Graft)>, StoreError> {
    let [seed, index, attempt] = request.key;
    let candidates = request.cases.candidates(request.host, request.organ.id)?;
    let Some(cutting) = cut(request, &mut Rng::keyed(seed, index, attempt, Purpose::Shape))? else {
        return Ok(None);
    };
    let mut places = Rng::keyed(seed, index, attempt, Purpose::Place);
    let diameter_mm = f64::from(request.donor.1.diameter_mm);
    for tried in 0..PLACES {
        let Some(centre) = choose_centre(&candidates, diameter_mm, (request.form, tried), &mut places) else {
            continue;
        };
        if let Some(grafted) = put(request, &cutting, centre)? {
            return Ok(Some(grafted));
        }
    }
    Ok(None)
}

fn spacing_mm(request: &TransplantRequest, case: usize) -> [f64; 3] {
    request.cases.records()[case].grid.spacing_mm()
}

fn cut(request: &TransplantRequest, rng: &mut Rng) -> Result<Option<Cutting>, StoreError> {
    let (case, tumour) = request.donor;
    let crop = request
        .cases
        .read(case, Region::centred(tumour.centre, request.box_voxels))?;
    let mut tumours = crop.labels.mapv(|label| label == tumour.id);
    let mut lesion = Array3::zeros(crop.labels.dim());
    for at in take_component(
        &mut tumours,
        request.box_voxels.map(|side| side / 2),
        Connectivity::Corners,
    ) {
        lesion[at] = 1;
    }
    let Some(around_hu) = around(&crop, &lesion, request.organ.id, spacing_mm(request, case)) else {
        return Ok(None);
    };
    let mut cutting = Cutting {
        image: crop.image,
        lesion,
        around_hu,
    };
    for axis in (0..3).map(Axis).filter(|_| rng.chance(0.5)) {
        cutting.image.invert_axis(axis);
        cutting.lesion.invert_axis(axis);
    }
    Ok(Some(cutting))
}

/// Returns the mean of the healthy organ within 10 mm; nothing where there is none.
fn around(crop: &Crop, lesion: &Array3<u8>, organ_id: u8, spacing_mm: [f64; 3]) -> Option<f64> {
    let near = dilated(lesion, spacing_mm, AROUND_MM);
    let (mut sum, mut count) = (0i64, 0i64);
    Zip::from(&near)
        .and(lesion)
        .and(&crop.labels)
        .and(&crop.image)
        .for_each(|near, lesion, label, hu| {
            if *near && *lesion == 0 && *label == organ_id {
                sum += i64::from(*hu);
                count += 1;
            }
        });
    (count > 0).then(|| sum as f64 / count as f64)
}

fn put(
    request: &TransplantRequest,
    cutting: &Cutting,
    centre: [i64; 3],
) -> Result<Option<(Planted, Graft)>, StoreError> {
    let host = request
        .cases
        .read(request.host, Region::centred(centre, request.box_voxels))?;
    let spacing_mm = spacing_mm(request, request.host);
    let habitat = habitat(&host.labels, &host.image, request.organ.id);
    let lesion = Zip::from(&cutting.lesion)
        .and(&habitat)
        .map_collect(|lesion, place| u8::from(*lesion == 1 && *place == 1));
    let voxels = |mask: &Array3<u8>| mask.iter().filter(|inside| **inside == 1).count();
    let (left, all) = (voxels(&lesion), voxels(&cutting.lesion));
    let Some(around_hu) = around(&host, &lesion, request.organ.id, spacing_mm) else {
        return Ok(None);
    };
    if left == 0 || (left as f64) < request.form.min_kept * all as f64 {
        return Ok(None);
    }
    let rim = super::gate::dilate_voxel(&lesion);
    let soft = Zip::from(&lesion)
        .and(&rim)
        .and(&habitat)
        .map_collect(|lesion, rim, place| match (lesion, rim, place) {
            (1, ..) => u8::MAX,
            (_, true, 1) => RIM,
            _ => 0,
        });
    let shift = around_hu - cutting.around_hu;
    let residual = Zip::from(&soft)
        .and(&cutting.image)
        .and(&host.image)
        .map_collect(|soft, donor, host| {
            (f64::from(*soft) / 255.0 * (f64::from(*donor) + shift - f64::from(*host))) as f32
        });
    let volume_mm3 = left as f64 * spacing_mm.iter().product::<f64>();
    let diameter_mm = libm::cbrt(volume_mm3 * 6.0 / std::f64::consts::PI);
    let planted = Planted {
        host,
        centre,
        soft,
        diameter_mm,
        radii_mm: [diameter_mm / 2.0; 3],
    };
    let contrast_hu = f64::from(request.donor.1.contrast_hu);
    Ok(Some((planted, Graft { residual, contrast_hu })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lesion::LESION_FROM;
    use crate::synth::compose;
    use crate::toy;
    use crate::volume::LabelMap;

    #[test]
    fn a_real_tumour_keeps_its_contrast_and_changes_nothing_else() {
        let store = toy::store(3, 2);
        let organ = LabelMap::default().organ("liver").unwrap();
        let of_liver = |case: usize| {
            store.records()[case]
                .tumours
                .iter()
                .find(|tumour| tumour.id == organ.tumour_id)
        };
        let (case, tumour) = (0..3).find_map(|case| Some((case, of_liver(case)?))).unwrap();
        let host = (0..store.records().len())
            .rev()
            .find(|case| store.records()[*case].organ(organ.id).is_some())
            .unwrap();
        let graft = |attempt| {
            transplant(&TransplantRequest {
                cases: &store,
                donor: (case, tumour),
                host,
                organ: &organ,
                form: &LesionForm::default(),
                box_voxels: [32; 3],
                key: [1, 2, attempt],
            })
            .unwrap()
        };
        let (planted, found) = (0..20).find_map(graft).unwrap();
        let painted = compose(&planted.host.image, &found.residual, &planted.soft);
        for ((at, before), after) in planted.host.image.indexed_iter().zip(&painted) {
            assert!(planted.soft[at] > 0 || before == after);
            assert!(planted.soft[at] < LESION_FROM || planted.host.labels[at] == organ.id);
        }
        let lesion = planted.soft.mapv(|soft| u8::from(soft >= LESION_FROM));
        let crop = |image: &Array3<i16>| Crop {
            image: image.clone(),
            ..planted.host.clone()
        };
        let around = around(&crop(&painted), &lesion, organ.id, [1.5; 3]).unwrap();
        let inside: Vec<f64> = painted
            .iter()
            .zip(&lesion)
            .filter(|(_, l)| **l == 1)
            .map(|(hu, _)| f64::from(*hu))
            .collect();
        let contrast = inside.iter().sum::<f64>() / inside.len() as f64 - around;
        // Clipping takes up to 30 % of the tumour and the rim lies in the surroundings.
        assert!(
            (contrast - found.contrast_hu).abs() < 8.0,
            "{contrast} against {}",
            found.contrast_hu
        );
        assert_eq!(painted, {
            let (again, same) = (0..20).find_map(graft).unwrap();
            compose(&again.host.image, &same.residual, &again.soft)
        });
    }
}
