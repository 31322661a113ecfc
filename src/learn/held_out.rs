//! How well a stage's network does on the cases that were kept from it.

use metrics::gauge;

use super::{Job, LearnError, Metrics};
use crate::evaluate::{Examination, HeldOut, HeldOutSettings, score_held_out};
use crate::nn::VoxelClassifier;
use crate::telemetry::metrics::TRAINING_DICE;

/// Returns the mean Dice of each class by name, and shows it to who scrapes the metrics.
pub(super) fn dice_metrics(scores: &HeldOut) -> Metrics {
    let scored = scores
        .classes
        .iter()
        .filter_map(|(name, score)| Some((name, score.dice?)));
    scored
        .map(|(name, dice)| {
            gauge!(TRAINING_DICE, "class" => name.clone()).set(dice);
            (format!("dice_{name}"), dice)
        })
        .collect()
}

/// Scores a network on a job's held-out cases.
pub(super) fn held_out_scores(
    net: &dyn VoxelClassifier,
    job: &mut Job,
    held_out: &[usize],
    settings: &HeldOutSettings,
) -> Result<HeldOut, LearnError> {
    let exam = Examination {
        net,
        device: job.device,
        cases: job.cases,
        held_out,
        settings,
    };
    Ok(score_held_out(&exam, &mut |scored| {
        job.progress.on_note(&format!("scored {}", scored.score.case));
    })?)
}
