//! Puts the provenance of patches into JSON (promise P4).

use std::sync::Arc;

use serde::Serialize;

use crate::digest::{Digest, canonical_json};
use crate::stream::patch::{PatchMeta, StreamedPatch};
use crate::stream::{PatchService, Resolved};
use crate::volume::{HuWindow, LabelMap};

/// The `meta` document of a single batch: everything that decides its bytes, and no time.
#[derive(Serialize)]
struct BatchMeta<'a> {
    recipe: Digest,
    snapshot: Digest,
    bundle: Digest,
    revision: u32,
    numerics: &'a str,
    labels: &'a LabelMap,
    spacing_mm: [f64; 3],
    window_hu: HuWindow,
    next_index: u64,
    patches: Vec<&'a PatchMeta>,
}

/// Returns the `meta` document of a single batch as canonical JSON.
pub(super) fn batch_json(
    service: &dyn PatchService,
    resolved: &Resolved,
    patches: &[Arc<StreamedPatch>],
    next_index: u64,
) -> String {
    canonical_json(&BatchMeta {
        recipe: resolved.hash,
        snapshot: resolved.snapshot,
        bundle: resolved.bundle,
        revision: resolved.revision,
        numerics: &resolved.numerics,
        labels: &resolved.labels,
        spacing_mm: service.plan().spacing_mm,
        window_hu: service.plan().window_hu,
        next_index,
        patches: patches.iter().map(|patch| &patch.meta).collect(),
    })
}
