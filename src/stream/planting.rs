//! Where a lesion goes: a drawn one, or a real one of another case.

use super::make::Maker;
use super::resolve::Prepared;
use crate::rng::{Purpose, Rng};
use crate::sampler::Draw;
use crate::store::StoreError;
use crate::synth::{Graft, GridBridge, PlantRequest, Planted, SynthesizerKind, TransplantRequest, plant, transplant};

/// A lesion with a place; a real one brings what it changes.
pub(super) type Lesion = (Planted, Option<Graft>);

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
            box_voxels: self.box_voxels(prepared, draw),
            key,
        })?;
        Ok(planted.map(|planted| (planted, None)))
    }

    /// Puts a real tumour, of the drawn size where there are some, into the host.
    fn transplant(&self, prepared: &Prepared, draw: &Draw, key: [u64; 3]) -> Result<Option<Lesion>, StoreError> {
        let [seed, index, attempt] = key;
        let mut rng = Rng::keyed(seed, index, attempt, Purpose::Pool);
        let Some((case, tumour)) = prepared.donors.draw(&mut rng, draw.organ.tumour_id, draw.size) else {
            return Ok(None);
        };
        let grafted = transplant(&TransplantRequest {
            cases: &*self.cases,
            donor: (case, &self.cases.records()[case].tumours[tumour]),
            host: draw.case,
            organ: &draw.organ,
            form: &prepared.resolved.recipe.lesion,
            box_voxels: self.box_voxels(prepared, draw),
            key,
        })?;
        Ok(grafted.map(|(planted, graft)| (planted, Some(graft))))
    }

    /// Returns the box in which a lesion is looked at, in the store's voxels.
    fn box_voxels(&self, prepared: &Prepared, draw: &Draw) -> [usize; 3] {
        let bridge = self.bridge(prepared, draw);
        bridge.map_or([prepared.cubes.of(draw.size); 3], |bridge| bridge.host_size())
    }

    /// Returns the way to the models' grid, where it is not the store's.
    pub(super) fn bridge(&self, prepared: &Prepared, draw: &Draw) -> Option<GridBridge> {
        let store_mm = self.cases.plan().spacing_mm;
        GridBridge::new(store_mm, prepared.models_mm, prepared.cubes.of(draw.size))
    }
}
