//! Counts what is sent by its provenance (promise P4), and puts provenance into JSON.

use std::sync::Arc;

use metrics::counter;
use serde::Serialize;

use crate::digest::{Digest, canonical_json};
use crate::stream::patch::{Outcome, PatchMeta, StreamedPatch};
use crate::stream::{PatchService, Resolved};
use crate::telemetry::metrics as names;
use crate::volume::{HuWindow, LabelMap};

/// Counts patches that were handed to a client.
pub(super) fn count<'a>(patches: impl IntoIterator<Item = &'a PatchMeta>) {
    patches.into_iter().for_each(count_one);
}

fn count_one(meta: &PatchMeta) {
    if meta.failed.is_some() {
        counter!(names::PATCHES_FAILED_TOTAL).increment(1);
        return;
    }
    let organ = || meta.organ.clone();
    let lesion = meta.lesions.first();
    let size = lesion.map_or("none", |lesion| lesion.size.name());
    let contrast = lesion.map_or("none", |lesion| lesion.contrast.name());
    let outcome = outcome_name(meta.outcome);
    counter!(names::PATCHES_TOTAL, "outcome" => outcome, "pool" => meta.pool.name(), "organ" => organ(),
        "size" => size, "contrast" => contrast)
    .increment(1);
    counter!(names::ATTEMPTS_TOTAL, "organ" => organ()).increment(meta.attempts.into());
    counter!(names::HOST_SUSPECT_TOTAL, "organ" => organ()).increment(meta.host_suspect.into());
    counter!(names::IGNORED_VOXELS_TOTAL, "organ" => organ()).increment(meta.ignored_voxels.into());
    counter!(names::BORDERLINE_TOTAL).increment(meta.borderline.into());
    let is_accepted = meta.outcome == Outcome::Accepted;
    counter!(names::GATE_REJECTED_TOTAL, "organ" => organ(), "size" => size)
        .increment(u64::from(meta.attempts).saturating_sub(is_accepted.into()));
    if meta.outcome == Outcome::Unplaceable {
        counter!(names::UNPLACEABLE_TOTAL, "organ" => organ()).increment(1);
    }
    if is_accepted {
        for lesion in &meta.lesions {
            counter!(names::GATE_ACCEPTED_TOTAL, "organ" => lesion.organ.clone(), "size" => lesion.size.name(),
                "contrast" => lesion.contrast.name())
            .increment(1);
        }
    }
}

fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Real => "real",
        Outcome::Accepted => "accepted",
        Outcome::HealthyAfterK => "healthy_after_k",
        Outcome::BestAfterK => "best_after_k",
        Outcome::RealAfterK => "real_after_k",
        Outcome::Unplaceable => "unplaceable",
    }
}

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
