//! Where a lesion goes: a drawn one, or a real one of another case.

use super::donors::kind_of;
use super::make::Maker;
use super::resolve::Prepared;
use crate::rng::{Purpose, Rng};
use crate::sampler::Draw;
use crate::store::StoreError;
use crate::synth::{Graft, GridBridge, PlantRequest, Planted, SynthesizerKind, TransplantRequest, plant, transplant};

/// A lesion with a place.
pub(super) struct Lesion {
    /// What was asked for; a real one's size and contrast are its own.
    pub(super) draw: Draw,
    pub(super) planted: Planted,
    /// What a real one changes.
    pub(super) graft: Option<Graft>,
}

impl Maker {
    /// Looks for a place for a drawn lesion, or for a real one; nothing where the host has none.
    pub(super) fn plant(&self, prepared: &Prepared, draw: &Draw, key: [u64; 3]) -> Result<Option<Lesion>, StoreError> {
        if prepared.resolved.recipe.synthesizer == Some(SynthesizerKind::CopyPaste) {
            return self.transplant(prepared, draw, key);
        }
        let organ = self.cases.records()[draw.case].organ(draw.organ.id);
        let holds_mm = organ.map_or(0.0, |organ| f64::from(organ.holds_mm));
        let Some(diameters_mm) = prepared.mix.diameters_mm(draw.size, holds_mm) else {
            return Ok(None);
        };
        let planted = plant(&PlantRequest {
            cases: &*self.cases,
            case: draw.case,
            organ: &draw.organ,
            size: draw.size,
            diameters_mm,
            form: &prepared.resolved.recipe.lesion,
            box_voxels: prepared.box_voxels[draw.size as usize],
            key,
        })?;
        Ok(planted.map(|planted| Lesion {
            draw: draw.clone(),
            planted,
            graft: None,
        }))
    }

    /// Puts a real tumour, of the drawn size where there are some, into the host.
    fn transplant(&self, prepared: &Prepared, draw: &Draw, key: [u64; 3]) -> Result<Option<Lesion>, StoreError> {
        let [seed, index, attempt] = key;
        let mut rng = Rng::keyed(seed, index, attempt, Purpose::Pool);
        let Some((case, tumour)) = prepared.donors.draw(&mut rng, draw.organ.tumour_id, draw.size) else {
            return Ok(None);
        };
        let tumour = &self.cases.records()[case].tumours[tumour];
        let (size, contrast) = kind_of(tumour);
        let draw = Draw {
            size,
            contrast,
            ..draw.clone()
        };
        let grafted = transplant(&TransplantRequest {
            cases: &*self.cases,
            donor: (case, tumour),
            host: draw.case,
            organ: &draw.organ,
            form: &prepared.resolved.recipe.lesion,
            box_voxels: prepared.box_voxels[draw.size as usize],
            key,
        })?;
        Ok(grafted.map(|(planted, graft)| Lesion {
            draw,
            planted,
            graft: Some(graft),
        }))
    }

    /// Returns the way to the models' grid, where it is not the store's.
    pub(super) fn bridge(&self, prepared: &Prepared, draw: &Draw) -> Option<GridBridge> {
        let store_mm = self.cases.plan().spacing_mm;
        GridBridge::new(store_mm, prepared.models_mm, prepared.cubes.of(draw.size))
    }
}
