//! Writes a cohort of phantoms into a store, as if ingested.

use std::path::Path;

use rayon::prelude::*;

use super::{PhantomSettings, PhantomSpec, PhantomVolume, Tumours, generate_with};
use crate::ingest::source_hash;
use crate::store::{CaseInput, CaseKind, Finished, SourceGeometry, StoreError, StoreWriter};
use crate::volume::{Affine, Annotation, BACKGROUND, Fingerprint, LabelMap, Plan};

/// Returns the id that a phantom has in a store.
pub fn case_id(spec: &PhantomSpec) -> String {
    let kind = match spec.tumours {
        Tumours::None => "healthy",
        Tumours::Hidden => "hidden",
        Tumours::Labelled => "labelled",
    };
    format!("phantom-{}-{kind}-{:04}", spec.seed, spec.index)
}

/// Makes the volumes of a cohort and writes them into the store at `dir`; `done` hears of every finished case.
///
/// Volumes are made in parallel, one per thread at a time. A case that is already there is made again and left untouched.
///
/// # Errors
/// [`StoreError`] where the store has another plan or cannot be written.
pub fn write_store(
    dir: &Path,
    plan: &Plan,
    specs: &[PhantomSpec],
    done: &(dyn Fn(&str) + Sync),
) -> Result<Finished, StoreError> {
    write_cohort(dir, plan, (&PhantomSettings::default(), specs), done)
}

/// As [`write_store`], with settings. Labels are the plan's, by name: what the plan does not know is background.
///
/// # Errors
/// [`StoreError`] where the store has another plan or cannot be written.
pub fn write_cohort(
    dir: &Path,
    plan: &Plan,
    (settings, specs): (&PhantomSettings, &[PhantomSpec]),
    done: &(dyn Fn(&str) + Sync),
) -> Result<Finished, StoreError> {
    let writer = StoreWriter::create(dir, plan)?;
    specs.par_iter().try_for_each(|spec| {
        let case = case_input(plan, generate_with(settings, spec), spec);
        let id = case.id.clone();
        writer.write(case)?;
        done(&id);
        Ok::<_, StoreError>(())
    })?;
    writer.finish()
}

fn case_input(plan: &Plan, volume: PhantomVolume, spec: &PhantomSpec) -> CaseInput {
    let painted = LabelMap::default();
    let is_labelled = spec.tumours == Tumours::Labelled;
    let is_searched = |class: &str| is_labelled || !class.ends_with("_tumour");
    let known = painted
        .iter()
        .filter(|(name, id)| *id != BACKGROUND && plan.labels.id(name).is_ok());
    let classes: Vec<String> = known
        .filter(|(name, _)| is_searched(name))
        .map(|(name, _)| name.to_string())
        .collect();
    let sent: [u8; 256] = std::array::from_fn(|id| {
        let name = painted.name(id as u8).unwrap_or_default();
        let seen = if is_labelled {
            name
        } else {
            name.trim_end_matches("_tumour")
        };
        plan.labels.id(seen).unwrap_or(BACKGROUND)
    });
    let [depth, height, width] = volume.grid.shape;
    CaseInput {
        id: case_id(spec),
        kind: if is_labelled {
            CaseKind::Labelled
        } else {
            CaseKind::Unlabelled
        },
        grid: volume.grid,
        // No assumption where it is true: the phantom's maker knows that it painted no tumour.
        annotation: Annotation {
            classes,
            assumed_tumour_free: spec.tumours == Tumours::None,
        },
        patient: String::new(),
        labels_by: String::new(),
        source_hash: source_hash(&volume.image),
        fingerprint: Fingerprint::of(volume.image.view(), volume.grid.spacing_mm()),
        source: SourceGeometry {
            shape_xyz: [width, height, depth],
            affine_xyz: reversed_columns(&volume.grid.affine),
            orientation: "RAS".into(),
        },
        image: volume.image,
        labels: volume.labels.mapv(|id| sent[usize::from(id)]),
    }
}

/// Returns the affine from (x, y, z) instead of (z, y, x) indices.
fn reversed_columns(affine: &Affine) -> [[f64; 4]; 4] {
    affine.0.map(|[z, y, x, origin]| [x, y, z, origin])
}
