//! How well a stage's network does on the cases that were kept from it.

use std::ops::ControlFlow;

use metrics::gauge;

use super::{Job, LearnError, Metrics};
use crate::evaluate::{EvaluateError, Examination, HeldOut, HeldOutSettings, score_held_out};
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

/// Scores a network that was trained for `step` steps on a job's held-out cases.
///
/// # Errors
/// [`LearnError::Stopped`] where the watcher asks for it: the state of the last step is saved, so that a resumed run comes back here.
pub(super) fn held_out_scores(
    (net, step): (&dyn VoxelClassifier, u64),
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
    let scores = score_held_out(&exam, &mut |scored| {
        job.progress.on_note(&format!("scored {}", scored.score.case));
        match job.progress.should_stop() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    match scores {
        Err(EvaluateError::Stopped) => Err(LearnError::Stopped { step }),
        scores => Ok(scores?),
    }
}
