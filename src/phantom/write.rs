//! Writes a cohort of phantoms into a store, as if ingested.

use std::path::Path;

use rayon::prelude::*;

use super::{PhantomSpec, generate};
use crate::ingest::source_hash;
use crate::store::{CaseInput, CaseKind, Finished, SourceGeometry, StoreError, StoreWriter};
use crate::volume::{Affine, Annotation, Fingerprint, Plan};

/// Returns the id that a phantom has in a store.
pub fn case_id(spec: &PhantomSpec) -> String {
    let kind = if spec.with_tumours { "labelled" } else { "healthy" };
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
    let writer = StoreWriter::create(dir, plan)?;
    specs.par_iter().try_for_each(|spec| {
        let case = case_input(spec);
        let id = case.id.clone();
        writer.write(case)?;
        done(&id);
        Ok::<_, StoreError>(())
    })?;
    writer.finish()
}

fn case_input(spec: &PhantomSpec) -> CaseInput {
    let volume = generate(spec);
    let mut classes = vec!["liver", "pancreas", "kidney"];
    if spec.with_tumours {
        classes.extend(["liver_tumour", "pancreas_tumour", "kidney_tumour"]);
    }
    let [depth, height, width] = volume.grid.shape;
    CaseInput {
        id: case_id(spec),
        kind: if spec.with_tumours {
            CaseKind::Labelled
        } else {
            CaseKind::Unlabelled
        },
        grid: volume.grid,
        // No assumption: the generator knows that it painted no tumour, so the pool is free of them.
        annotation: Annotation {
            classes: classes.into_iter().map(String::from).collect(),
            assumed_tumour_free: !spec.with_tumours,
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
        labels: volume.labels,
    }
}

/// Returns the affine from (x, y, z) instead of (z, y, x) indices.
fn reversed_columns(affine: &Affine) -> [[f64; 4]; 4] {
    affine.0.map(|[z, y, x, origin]| [x, y, z, origin])
}
