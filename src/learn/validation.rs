//! Scores during training: which weights were best so far, and when more steps stopped to help.

use std::ops::ControlFlow;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::check::Section;
use super::{Job, LearnError};
use crate::checkpoint::{Weight, Weights};
use crate::evaluate::{EvaluateError, Examination, HeldOut, HeldOutSettings, score_held_out};
use crate::nn::VoxelClassifier;
use crate::store::{CaseKind, Cases};

/// How a run is watched on held-out cases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationSettings {
    /// Steps between scores; 0: none before the end.
    pub every: u64,
    /// Held-out cases that are scored.
    pub cases: usize,
    /// Scores in a row without a better one after which the run ends early; 0: never.
    pub patience: u64,
    /// Which weights become the model.
    pub keep: Keep,
}

/// Which weights become the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Those of the last step.
    #[default]
    Last,
    /// Those with the best score on held-out cases, which then measure too well: report others.
    Best,
}

impl Default for ValidationSettings {
    fn default() -> Self {
        Self {
            every: 0,
            cases: 4,
            patience: 0,
            keep: Keep::Last,
        }
    }
}

impl ValidationSettings {
    pub(super) fn check(&self, section: &Section, steps: u64) -> Result<(), LearnError> {
        section.count("validation.cases", self.cases as u64)?;
        let needed = self.patience > 0 || self.keep == Keep::Best;
        let expected = format!("1 to steps = {steps} where patience or keep = \"best\" ask for scores");
        let ok = !needed || (1..=steps).contains(&self.every);
        section.check("validation.every", ok, &expected, self.every)
    }

    /// Refuses to ask for scores where there is no case to be scored.
    pub(super) fn check_cases(
        &self,
        section: &Section,
        (cases, held_out): (&dyn Cases, &[usize]),
    ) -> Result<(), LearnError> {
        let is_labelled = |case: &usize| cases.records()[*case].kind == CaseKind::Labelled;
        let ok = self.every == 0 || held_out.iter().any(is_labelled);
        let expected = "0, because no case with labelled tumours is held out";
        section.check("validation.every", ok, expected, self.every)
    }
}

/// Names in a saved state.
const STATE: &str = "validation";
const DUE: &str = "validation.due";

/// What the scores came to so far: part of the state that a run is resumed from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Watch {
    best: Option<(f32, u64)>,
    since: u64,
    /// The best step that the saved state knows of.
    pub saved: Option<u64>,
    /// Whether the saved state is still to be scored: the run was stopped while that was done.
    pub is_due: bool,
}

impl Watch {
    /// Takes a score and tells whether it is the best so far.
    pub fn take(&mut self, score: f64, step: u64) -> bool {
        let score = score as f32;
        let is_best = self.best.is_none_or(|(best, _)| score > best);
        if is_best {
            (self.best, self.since) = (Some((score, step)), 0);
        } else {
            self.since += 1;
        }
        is_best
    }

    /// Tells whether more steps have stopped to help.
    pub fn is_over(&self, settings: &ValidationSettings) -> bool {
        settings.patience > 0 && self.since >= settings.patience
    }

    /// Returns the best score and the step after which it was reached.
    pub fn best(&self) -> Option<(f32, u64)> {
        self.best
    }

    /// Copies everything that later decisions depend on; steps in two parts that single precision holds exactly.
    pub fn state(&self) -> Weights {
        let (score, step) = self.best.unwrap_or((-1.0, 0));
        let parts = |n: u64| [(n >> 24) as f32, (n & 0xff_ffff) as f32];
        let [[a, b], [c, d]] = [parts(step), parts(self.since)];
        let values = vec![score, a, b, c, d];
        let shape = vec![values.len()];
        let mut state = Weights::from([(STATE.to_string(), Weight { shape, values })]);
        if self.is_due {
            let (shape, values) = (vec![1], vec![1.0]);
            state.insert(DUE.to_string(), Weight { shape, values });
        }
        state
    }

    /// Goes on from a saved state.
    pub fn restore(&mut self, state: &Weights) {
        let saved: Option<[f32; 5]> = state
            .get(STATE)
            .and_then(|weight| weight.values.clone().try_into().ok());
        if let Some([score, a, b, c, d]) = saved {
            let whole = |high: f32, low: f32| ((high as u64) << 24) | low as u64;
            self.best = (score >= 0.0).then_some((score, whole(a, b)));
            self.since = whole(c, d);
            self.saved = self.best.map(|(_, step)| step);
        }
        self.is_due = state.contains_key(DUE);
    }

    /// Takes out of a state what is not the trainee's.
    pub fn strip(state: &mut Weights) {
        [STATE, DUE].iter().for_each(|name| drop(state.remove(*name)));
    }
}

/// Scores networks on held-out cases.
pub(super) struct Validator<'a> {
    cases: &'a dyn Cases,
    held_out: Vec<usize>,
    settings: HeldOutSettings,
    /// Where networks are scored.
    pub device: Device,
}

impl<'a> Validator<'a> {
    /// Takes `count` of the held-out labelled cases of a job.
    pub fn new(job: &Job<'a>, held_out: &[usize], (settings, count): (&HeldOutSettings, usize)) -> Self {
        Self {
            cases: job.cases,
            held_out: held_out.to_vec(),
            settings: HeldOutSettings {
                cases: count,
                ..settings.clone()
            },
            device: job.device.clone(),
        }
    }

    /// Scores a network; there is nothing in it where no case is held out.
    ///
    /// # Errors
    /// [`LearnError::Stopped`] where `stop` asks for it between two cases.
    pub fn score(&self, net: &dyn VoxelClassifier, stop: &dyn Fn() -> bool) -> Result<HeldOut, LearnError> {
        let exam = Examination {
            net,
            device: &self.device,
            cases: self.cases,
            held_out: &self.held_out,
            settings: &self.settings,
        };
        let scores = score_held_out(&exam, &mut |_| match stop() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        match scores {
            Err(EvaluateError::Stopped) => Err(LearnError::Stopped { step: 0 }),
            scores => Ok(scores?),
        }
    }
}

/// Returns the mean Dice over the classes, 0 for what is called where there is none, so that weights which see tumours everywhere are not
/// the best; nothing where no class is there or called.
pub(super) fn mean_dice(scores: &HeldOut) -> Option<f64> {
    let classes = scores.classes.values();
    let defined: Vec<f64> = classes.filter_map(|class| class.dice_with_false_alarms.mean).collect();
    (!defined.is_empty()).then(|| super::numbers::mean(defined))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_after_its_patience_and_a_restored_watch_counts_on() {
        let settings = ValidationSettings {
            every: 1,
            patience: 2,
            ..ValidationSettings::default()
        };
        let mut watch = Watch::default();
        let mut over = Vec::new();
        for (step, score) in [(1, 0.2), (2, 0.4), (40_000_000, 0.3), (40_000_001, 0.4)] {
            let mut restored = Watch::default();
            restored.restore(&watch.state());
            // What is read is what was saved.
            watch.saved = watch.best().map(|(_, step)| step);
            assert_eq!(restored, watch);
            watch = restored;
            watch.take(score, step);
            over.push(watch.is_over(&settings));
        }
        assert_eq!(over, [false, false, false, true]);
        assert_eq!(watch.best(), Some((0.4, 2)));
        assert!(!watch.is_over(&ValidationSettings::default()));
        assert!(watch.take(0.5, 40_000_002));
        let mut restored = Watch::default();
        restored.restore(&watch.state());
        assert_eq!(restored.best(), Some((0.5, 40_000_002)));
    }

    #[test]
    fn patience_without_scores_is_refused() {
        let check = |every, patience, keep| {
            let settings = ValidationSettings {
                every,
                patience,
                keep,
                ..ValidationSettings::default()
            };
            settings.check(&Section("critic"), 10)
        };
        assert!(
            check(0, 0, Keep::Last).is_ok() && check(10, 3, Keep::Best).is_ok() && check(11, 0, Keep::Last).is_ok()
        );
        // After the last step nobody would look at a score.
        for refused in [
            check(0, 3, Keep::Last),
            check(0, 0, Keep::Best),
            check(11, 0, Keep::Best),
        ] {
            assert!(refused.unwrap_err().to_string().contains("critic.validation.every"));
        }
    }
}
