//! Shows a painted lesion to critic and discriminator, and lets the gate decide.

use ndarray::Array3;

use super::patch::GateScores;
use super::scene::Painted;
use crate::checkpoint::{Bundle, Thresholds};
use crate::sampler::Draw;
use crate::synth::gate::{self, Judged, Verdict};
use crate::synth::{Cancelled, Engine, GateRule, GateSettings, GridBridge, LESION_FROM, SynthError};
use crate::volume::ClassSet;

/// A painted lesion, and who judges it by what.
pub(super) struct Trial<'a> {
    pub(super) engine: &'a Engine,
    pub(super) bundle: &'a Bundle,
    pub(super) gate: &'a GateSettings,
    pub(super) draw: &'a Draw,
    pub(super) painted: &'a Painted,
    /// The way to the models' grid, where it is not the store's.
    pub(super) bridge: Option<GridBridge>,
    /// Whose critic judges, see `stream::judges`.
    pub(super) judge: Option<usize>,
    /// Whether the best of refused lesions is kept.
    pub(super) keeps_best: bool,
    pub(super) cancelled: &'a Cancelled,
}

/// What was thought of a lesion.
pub(super) struct Opinion {
    pub(super) verdict: Verdict,
    /// All scores; absent where recall alone refused the lesion.
    pub(super) scores: Option<GateScores>,
    /// The discriminator's mean probability of "real tumour" over the lesion.
    pub(super) discriminator: Option<f64>,
}

/// Asks the networks and decides, all on the models' grid: the gate's thresholds were calibrated there. A lesion that the critic does
/// not recognise is refused after one pass; the others cost two more.
///
/// # Errors
/// [`SynthError`] where the device fails, or the models have no threshold for the lesion's bin.
pub(super) fn judge(trial: &Trial) -> Result<Opinion, SynthError> {
    let planted = &trial.painted.planted;
    let view = |image: &Array3<i16>| trial.bridge.map_or_else(|| image.clone(), |bridge| bridge.view(image));
    let image = view(&trial.painted.image);
    let soft = (trial.bridge).map_or_else(|| planted.soft.clone(), |bridge| bridge.soft_view(&planted.soft));
    let lesion = soft.mapv_into(|soft| u8::from(soft >= LESION_FROM));
    let after = trial.engine.judge(image.clone(), trial.judge, trial.cancelled)?;
    let thresholds = thresholds(trial)?;
    let tumours = tumours(trial);
    let tumour_id = trial.draw.organ.tumour_id;
    let by_recall = match trial.gate.rule {
        GateRule::Published => Some(gate::judge_published(gate::published_recall(&after, &lesion, tumours))),
        GateRule::Fixed | GateRule::Calibrated => {
            gate::refused_by(gate::recall(&after, &lesion, tumour_id), thresholds)
        }
    };
    // The best of several refused ones is known by all its scores.
    if let Some(verdict) = by_recall.filter(|verdict| !verdict.passes && !trial.keeps_best) {
        return Ok(Opinion {
            verdict,
            scores: None,
            discriminator: None,
        });
    }
    let images = [view(&planted.host.image), image];
    let seen = trial.engine.compare(images, trial.judge, trial.cancelled)?;
    let others = planted.host.labels.map(|label| u8::from(tumours.contains(*label)));
    let others = trial
        .bridge
        .map_or_else(|| others.clone(), |bridge| bridge.labels_view(&others));
    let scores = gate::scores(&Judged {
        before: &seen.before,
        after: &after,
        lesion: &lesion,
        others: &others,
        tumour_id,
        spacing_mm: trial.bundle.plan.spacing_mm,
        radius_mm: planted.diameter_mm / 2.0,
    });
    Ok(Opinion {
        verdict: match (trial.gate.rule, by_recall) {
            (GateRule::Published, Some(verdict)) => verdict,
            _ => gate::judge(scores, thresholds),
        },
        scores: Some(GateScores {
            recall: scores.recall,
            precision: scores.precision,
            before: scores.before,
            recall_threshold: thresholds.recall,
            precision_threshold: thresholds.precision,
        }),
        discriminator: seen.real.as_ref().map(|real| mean_over(real, &lesion)),
    })
}

/// Returns every tumour class of the models.
fn tumours(trial: &Trial) -> ClassSet {
    let mut tumours = ClassSet::default();
    let organs = trial.bundle.plan.labels.organs();
    organs.iter().for_each(|organ| tumours.insert(organ.tumour_id));
    tumours
}

/// Returns what the recipe's rule asks for.
fn thresholds(trial: &Trial) -> Result<Thresholds, SynthError> {
    match trial.gate.rule {
        GateRule::Published => Ok(Thresholds {
            recall: gate::PUBLISHED_RECALL,
            precision: 0.0,
        }),
        GateRule::Fixed => Ok(Thresholds {
            recall: trial.gate.recall,
            precision: trial.gate.precision,
        }),
        GateRule::Calibrated => {
            let draw = trial.draw;
            let found = (trial.bundle.calibration).thresholds(&draw.organ.name, draw.size, draw.contrast);
            found.ok_or(SynthError::NoModel("calibration"))
        }
    }
}

/// Returns the mean over a mask; 0 over none.
fn mean_over(values: &Array3<f32>, mask: &Array3<u8>) -> f64 {
    let inside = values.iter().zip(mask).filter(|(_, inside)| **inside != 0);
    let (sum, count) = inside.fold((0.0, 0u64), |(sum, n), (value, _)| (sum + f64::from(*value), n + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}
