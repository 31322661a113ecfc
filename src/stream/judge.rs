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
    /// All scores; absent where recall or the discriminator alone refused the lesion.
    pub(super) scores: Option<GateScores>,
    /// How probably real rather than painted the discriminator finds the lesion, on the mean; absent where it was not asked.
    pub(super) discriminator: Option<f64>,
}

impl Opinion {
    /// What refuses a lesion before all its scores are known.
    fn early(verdict: Verdict, discriminator: Option<f64>) -> Self {
        Self {
            verdict,
            scores: None,
            discriminator,
        }
    }
}

/// Asks the networks and decides, all on the models' grid: the gate's thresholds were calibrated there. A lesion that its recall refuses
/// costs one pass of the critic, the others two, and those that pass one of the discriminator; with `realism` the discriminator's comes
/// first, and what it refuses costs that alone.
///
/// # Errors
/// [`SynthError`] where the device fails, or the models have no threshold for the lesion's bin.
pub(super) fn judge(trial: &Trial) -> Result<Opinion, SynthError> {
    let painted = on_models_grid(trial);
    let realism = realism(trial)?;
    // Where it has a say and what it refuses is not kept, the discriminator is asked first, else last.
    let first = match realism {
        Some(_) if !trial.keeps_best => looks_real(trial, &painted)?,
        _ => None,
    };
    if let (Some(least), Some(real)) = (realism, first)
        && real < least
    {
        return Ok(Opinion::early(Verdict::unreal(real, least), first));
    }
    let after = (trial.engine).judge(painted.image.clone(), trial.judge, trial.cancelled)?;
    let thresholds = thresholds(trial)?;
    let recall = recall(trial, &after, &painted.lesion);
    let by_recall = match trial.gate.rule {
        GateRule::Published => Some(gate::judge_published(recall)),
        GateRule::Fixed | GateRule::Calibrated => gate::refused_by(recall, thresholds),
    };
    // The best of several refused ones is known by all its scores.
    if let Some(verdict) = by_recall.filter(|verdict| !verdict.passes && !trial.keeps_best) {
        return Ok(Opinion::early(verdict, None));
    }
    let scores = second_look(trial, &painted, &after)?;
    let verdict = match (trial.gate.rule, by_recall) {
        (GateRule::Published, Some(verdict)) => verdict,
        _ => gate::judge(scores, thresholds),
    };
    let real = match first {
        None if verdict.passes || trial.keeps_best => looks_real(trial, &painted)?,
        first => first,
    };
    Ok(Opinion {
        verdict: match (realism, real) {
            (Some(least), Some(real)) => verdict.and_real(real, least),
            _ => verdict,
        },
        scores: Some(GateScores {
            recall,
            precision: scores.precision,
            before: scores.before,
            recall_threshold: thresholds.recall,
            precision_threshold: thresholds.precision,
            realism_threshold: realism,
        }),
        discriminator: real,
    })
}

/// A lesion's cube as the models see it.
struct Seen {
    /// In HU, after synthesis.
    image: Array3<i16>,
    /// 1 inside.
    lesion: Array3<u8>,
}

fn on_models_grid(trial: &Trial) -> Seen {
    let (planted, bridge) = (&trial.painted.planted, trial.bridge);
    let soft = bridge.map_or_else(|| planted.soft.clone(), |bridge| bridge.soft_view(&planted.soft));
    Seen {
        image: view(trial, &trial.painted.image),
        lesion: soft.mapv_into(|soft| u8::from(soft >= LESION_FROM)),
    }
}

fn view(trial: &Trial, image: &Array3<i16>) -> Array3<i16> {
    trial.bridge.map_or_else(|| image.clone(), |bridge| bridge.view(image))
}

/// Returns how real the discriminator finds a lesion; nothing where the models have none.
fn looks_real(trial: &Trial, painted: &Seen) -> Result<Option<f64>, SynthError> {
    if trial.bundle.discriminator.is_none() {
        return Ok(None);
    }
    let real = (trial.engine).discriminate(painted.image.clone(), trial.cancelled)?;
    Ok(Some(mean_over(&real, &painted.lesion)))
}

/// Returns how much of the lesion the critic calls its organ's tumour; any tumour by the published rule. That rule decides by it alone, the
/// others where it is too low.
fn recall(trial: &Trial, after: &Array3<u8>, lesion: &Array3<u8>) -> f64 {
    match trial.gate.rule {
        GateRule::Published => gate::published_recall(after, lesion, tumours(trial)),
        GateRule::Fixed | GateRule::Calibrated => gate::recall(after, lesion, trial.draw.organ.tumour_id),
    }
}

/// Returns the critic's scores, for which it also looks at the cube before synthesis.
fn second_look(trial: &Trial, painted: &Seen, after: &Array3<u8>) -> Result<gate::Scores, SynthError> {
    let (planted, tumours) = (&trial.painted.planted, tumours(trial));
    let host = view(trial, &planted.host.image);
    let before = trial.engine.judge(host, trial.judge, trial.cancelled)?;
    let others = planted.host.labels.map(|label| u8::from(tumours.contains(*label)));
    let others = (trial.bridge).map_or_else(|| others.clone(), |bridge| bridge.labels_view(&others));
    Ok(gate::scores(&Judged {
        before: &before,
        after,
        lesion: &painted.lesion,
        others: &others,
        tumour_id: trial.draw.organ.tumour_id,
        spacing_mm: trial.bundle.plan.spacing_mm,
        radius_mm: planted.diameter_mm / 2.0,
    }))
}

/// Returns every tumour class of the models.
fn tumours(trial: &Trial) -> ClassSet {
    let mut tumours = ClassSet::default();
    let organs = trial.bundle.plan.labels.organs();
    organs.iter().for_each(|organ| tumours.insert(organ.tumour_id));
    tumours
}

/// Returns how real the discriminator must find a lesion; nothing where the recipe does not ask.
fn realism(trial: &Trial) -> Result<Option<f64>, SynthError> {
    if trial.gate.realism == 0.0 {
        return Ok(None);
    }
    if trial.bundle.discriminator.is_none() {
        return Err(SynthError::NoModel("discriminator"));
    }
    let measured = trial.bundle.realism.as_ref();
    let least = measured.and_then(|realism| realism.threshold(trial.gate.realism));
    least.map(Some).ok_or(SynthError::NoModel("calibration of realism"))
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
