//! Stops stage 2 where it has stopped to make sense: the discriminator tells everything or nothing, or noise changes nothing.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::check::Section;
use super::numbers::metrics;
use super::{LearnError, Metrics};
use crate::checkpoint::{Weight, Weights};

/// Lesions of each kind over which the area is taken.
const LESIONS: usize = 200;

/// When stage 2 is stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSettings {
    /// Steps for which a bound must be crossed without a break; 0 never stops.
    pub steps: u64,
    /// Least area under the discriminator's curve, real against painted lesions: below it, it has learnt nothing to teach.
    pub least_auc: f64,
    /// Largest area: above it, the generator has nothing to learn from it.
    pub most_auc: f64,
    /// Least change that another noise field makes, as a share of the wanted texture's strength.
    pub least_diversity: f64,
}

impl Default for GuardSettings {
    fn default() -> Self {
        Self {
            steps: 500,
            least_auc: 0.55,
            most_auc: 0.95,
            least_diversity: 0.1,
        }
    }
}

impl GuardSettings {
    /// Checks the bounds.
    pub(super) fn check(&self, section: &Section) -> Result<(), LearnError> {
        section.unit("guard.least_auc", self.least_auc)?;
        section.unit("guard.most_auc", self.most_auc)?;
        section.unit("guard.least_diversity", self.least_diversity)
    }
}

/// What a step saw of the discriminator and of the texture.
pub(super) struct Seen {
    /// Log odds of real over painted, one per real lesion.
    pub real: Vec<f32>,
    /// The same of painted ones.
    pub painted: Vec<f32>,
    /// Change by another noise field over the wanted strength; nothing where the step had no pair.
    pub diversity: Option<f64>,
}

/// Watches the last lesions; part of the training's state, so that a resumed run stops at the same step.
pub(super) struct Guard {
    settings: GuardSettings,
    real: VecDeque<f32>,
    painted: VecDeque<f32>,
    diversity: f32,
    /// Steps since each bound was last kept: too little told, too much told, too alike.
    outside: [u64; 3],
}

/// What is wrong and what may help, in the order of [`Guard::outside`].
const CAUSES: [(&str, &str); 3] = [
    (
        "the discriminator cannot tell real from painted lesions",
        "raise discriminator_optimizer.learning_rate or discriminator_widths",
    ),
    (
        "the discriminator tells real from painted lesions every time",
        "lower discriminator_optimizer.learning_rate, or raise loss.adversarial or r1",
    ),
    (
        "other noise gives the same texture",
        "raise loss.sameness, or lower loss.roughness",
    ),
];

impl Guard {
    pub fn new(settings: GuardSettings) -> Self {
        Self {
            settings,
            real: VecDeque::new(),
            painted: VecDeque::new(),
            diversity: 1.0,
            outside: [0; 3],
        }
    }

    /// Takes a step's lesions; returns what the watcher measures.
    ///
    /// # Errors
    /// [`LearnError::Guard`] at the step at which a bound has been crossed for long enough.
    pub fn observe(&mut self, step: u64, seen: &Seen) -> Result<Metrics, LearnError> {
        for (kept, new) in [(&mut self.real, &seen.real), (&mut self.painted, &seen.painted)] {
            kept.extend(new);
            kept.drain(..kept.len().saturating_sub(LESIONS));
        }
        if let Some(share) = seen.diversity {
            // A mean over some twenty pairs: single ones vary with the lesion's size.
            self.diversity += 0.05 * (share as f32 - self.diversity);
        }
        let auc = area(self.real.make_contiguous(), self.painted.make_contiguous());
        let diversity = f64::from(self.diversity);
        let GuardSettings {
            steps,
            least_auc,
            most_auc,
            least_diversity,
        } = self.settings;
        let is_full = self.real.len().min(self.painted.len()) >= LESIONS / 2;
        let crossed = [
            is_full && auc < least_auc,
            is_full && auc > most_auc,
            diversity < least_diversity,
        ];
        let bounds = [(auc, least_auc), (auc, most_auc), (diversity, least_diversity)];
        for (i, crossed) in crossed.into_iter().enumerate() {
            self.outside[i] = if crossed { self.outside[i] + 1 } else { 0 };
            if steps > 0 && self.outside[i] >= steps {
                let (cause, advice) = CAUSES[i];
                let (value, bound) = bounds[i];
                return Err(LearnError::Guard {
                    step,
                    cause,
                    value,
                    bound,
                    steps,
                    advice,
                });
            }
        }
        Ok(metrics([("discriminator_auc", auc), ("diversity", diversity)]))
    }

    pub fn state(&self) -> Weights {
        let array = |values: Vec<f32>| Weight {
            shape: vec![values.len()],
            values,
        };
        let counts = self.outside.map(|steps| steps as f32);
        Weights::from([
            ("guard.real".into(), array(self.real.iter().copied().collect())),
            ("guard.painted".into(), array(self.painted.iter().copied().collect())),
            (
                "guard.counts".into(),
                array(vec![counts[0], counts[1], counts[2], self.diversity]),
            ),
        ])
    }

    pub fn restore(&mut self, state: &Weights) {
        let values = |name: &str| state.get(name).map(|weight| weight.values.clone()).unwrap_or_default();
        self.real = values("guard.real").into();
        self.painted = values("guard.painted").into();
        if let [a, b, c, diversity] = values("guard.counts")[..] {
            self.outside = [a, b, c].map(|steps| steps as u64);
            self.diversity = diversity;
        }
    }
}

/// Returns the area under the curve: the share of pairs in which the real lesion scores higher, ties counting half; a half
/// where there is no pair.
pub(super) fn area(real: &[f32], painted: &[f32]) -> f64 {
    if real.is_empty() || painted.is_empty() {
        return 0.5;
    }
    let of_pair = |r: &f32, p: &f32| match r.total_cmp(p) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Less => 0.0,
    };
    let sum: f64 = real
        .iter()
        .flat_map(|r| painted.iter().map(move |p| of_pair(r, p)))
        .sum();
    sum / (real.len() * painted.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(real: f32, painted: f32, diversity: f64) -> Seen {
        Seen {
            real: vec![real; 2],
            painted: vec![painted, painted + 0.25],
            diversity: Some(diversity),
        }
    }

    fn guard(steps: u64) -> Guard {
        Guard::new(GuardSettings {
            steps,
            ..GuardSettings::default()
        })
    }

    /// Runs until the guard stops; returns step and message.
    fn run(guard: &mut Guard, from: u64, seen: impl Fn(u64) -> Seen) -> Option<(u64, String)> {
        (from..1000).find_map(|step| Some((step, guard.observe(step, &seen(step)).err()?.to_string())))
    }

    #[test]
    fn an_area_is_the_share_of_pairs() {
        assert_eq!(area(&[2.0, 0.0], &[1.0, 1.0]), 0.5);
        assert_eq!(area(&[2.0, 1.0], &[1.0, 0.0]), 0.875);
        assert_eq!(area(&[], &[1.0]), 0.5);
    }

    #[test]
    fn each_cause_stops_after_its_steps_and_is_named() {
        let all = run(&mut guard(20), 0, |_| seen(5.0, -5.0, 1.0)).unwrap();
        // A hundred lesions of each kind are fifty steps; the fiftieth is the first that counts.
        assert_eq!(all.0, 68, "{all:?}");
        assert!(
            all.1.contains("every time") && all.1.contains("1.000 against 0.95 for 20 steps"),
            "{}",
            all.1
        );
        let nothing = run(&mut guard(20), 0, |_| seen(0.1, 0.0, 1.0)).unwrap();
        assert!(nothing.1.contains("cannot tell"), "{nothing:?}");
        let alike = run(&mut guard(20), 0, |step| seen((step % 2) as f32, 0.3, 0.0)).unwrap();
        assert!(alike.1.contains("the same texture"), "{alike:?}");
    }

    #[test]
    fn what_is_within_bounds_goes_on_and_a_break_starts_the_count_anew() {
        // A real lesion scores 1 or 0 in turns: half of the pairs, and all of them, are told.
        assert_eq!(run(&mut guard(20), 0, |step| seen((step % 3) as f32, 0.3, 1.0)), None);
        // Everything is told for 57 counted steps, then not.
        let broken = |step: u64| seen(if step < 106 { 5.0 } else { (step % 3) as f32 }, 0.3, 1.0);
        assert_eq!(run(&mut guard(80), 0, broken), None);
        assert!(guard(0).observe(0, &seen(1.0, 0.0, 0.0)).is_ok());
    }

    #[test]
    fn a_restored_guard_stops_at_the_same_step() {
        let whole = run(&mut guard(30), 0, |_| seen(5.0, -5.0, 1.0)).unwrap();
        let mut first = guard(30);
        for step in 0..60 {
            first.observe(step, &seen(5.0, -5.0, 1.0)).unwrap();
        }
        let mut second = guard(30);
        second.restore(&first.state());
        assert_eq!(run(&mut second, 60, |_| seen(5.0, -5.0, 1.0)).unwrap(), whole);
    }
}
