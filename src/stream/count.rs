//! Counts what is handed on by its provenance (promise P4).

use metrics::counter;

use super::patch::{Outcome, PatchMeta};
use crate::telemetry::metrics as names;

/// Counts patches that were handed to a client or to a training of this server.
pub fn count_patches<'a>(patches: impl IntoIterator<Item = &'a PatchMeta>) {
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
    if let Some(asked) = meta.asked {
        // Both, also where one has nothing to count: a ratio needs them from the first patch on.
        let (size, contrast) = (asked.size.name(), asked.contrast.name());
        counter!(names::GATE_REJECTED_TOTAL, "organ" => organ(), "size" => size, "contrast" => contrast)
            .increment(asked.refused.into());
        counter!(names::GATE_ACCEPTED_TOTAL, "organ" => organ(), "size" => size, "contrast" => contrast)
            .increment((meta.outcome == Outcome::Accepted).into());
    }
    if meta.outcome == Outcome::Unplaceable {
        counter!(names::UNPLACEABLE_TOTAL, "organ" => organ()).increment(1);
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
