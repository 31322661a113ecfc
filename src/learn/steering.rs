//! The closed loop: what the segmentor misses is asked for more often. Off by default.
//!
//! After a validation the shares of organs and sizes move towards what was missed. Each such mix is a recipe of its own, with a
//! number, a hash and the index it holds from; it is written down before its first patch is asked for, so that every patch of a
//! run is still a function of what is on the disk (promise P1), and a run that is resumed uses the mixes that it used before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use metrics::gauge;
use serde::{Deserialize, Serialize};

use super::LearnError;
use super::check::Section;
use crate::checkpoint::write_atomically;
use crate::digest::Digest;
use crate::evaluate::{HeldOut, LesionCounts};
use crate::stream::recipe::Recipe;
use crate::telemetry::metrics::{TRAINING_MIX, TRAINING_MIX_SHARE, TRAINING_SENSITIVITY};
use crate::volume::SizeClass;

/// Shares are kept to so many parts of one: their canonical form is short, and rounding moves no patch that matters.
const PARTS: f64 = 1e6;

/// How errors move the mix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SteeringSettings {
    /// Whether they do; needs `validation.every`.
    pub enabled: bool,
    /// How much: shares follow the recipe's times the share of missed lesions to this power.
    pub strength: f64,
    /// How fast: the part of the way to these shares that one validation goes.
    pub rate: f64,
    /// How far: this part of the recipe's shares stays as it is, so that none falls below it.
    pub floor: f64,
}

impl Default for SteeringSettings {
    fn default() -> Self {
        Self {
            enabled: false,
            strength: 1.0,
            rate: 0.5,
            floor: 0.25,
        }
    }
}

impl SteeringSettings {
    pub(super) fn check(&self, section: &Section, (validation_every, steps): (u64, u64)) -> Result<(), LearnError> {
        let strength = self.strength;
        section.check("steering.strength", (0.0..=4.0).contains(&strength), "0 to 4", strength)?;
        section.unit("steering.rate", self.rate)?;
        section.unit("steering.floor", self.floor)?;
        let expected = format!("1 to steps = {steps} where steering asks for scores");
        section.check(
            "validation.every",
            !self.enabled || (1..=steps).contains(&validation_every),
            &expected,
            validation_every,
        )
    }
}

/// What is streamed from a step on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mix {
    /// Counts a run's mixes from 1; the recipe as it was configured is mix 0.
    pub number: u64,
    /// The first step that learns from it.
    pub from_step: u64,
    /// The first index that is asked for by it.
    pub from_index: u64,
    /// Hash of its recipe's canonical form.
    pub recipe: Digest,
    /// Shares of the organs.
    pub organs: BTreeMap<String, f64>,
    /// Shares of the size classes.
    pub sizes: BTreeMap<SizeClass, f64>,
}

impl Mix {
    /// Returns the recipe with these shares.
    pub(super) fn over(&self, base: &Recipe) -> Recipe {
        Recipe {
            organs: Some(self.organs.clone()),
            sizes: self.sizes.clone(),
            ..base.clone()
        }
    }
}

/// Reads the mixes that an earlier part of a run has written down.
fn read_mixes(path: &Path, base: &Recipe) -> Result<Vec<Mix>, LearnError> {
    let refused = |what: String| LearnError::State {
        path: path.into(),
        what,
    };
    let text = fs_err::read_to_string(path)?;
    // A line that a crash cut off was never used.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let read = |line: &str| {
        let mix: Mix = serde_json::from_str(line).map_err(|error| refused(format!("not a mix: {error}")))?;
        match mix.recipe == mix.over(base).hash() {
            true => Ok(mix),
            false => Err(refused(format!(
                "mix {} is of another recipe; train in another folder",
                mix.number
            ))),
        }
    };
    whole.lines().map(read).collect()
}

/// A run's mixes, and where they are written down.
pub(super) struct Steering {
    settings: SteeringSettings,
    /// Complete: every organ that is streamed has its share.
    base: Recipe,
    path: PathBuf,
    mixes: Vec<Mix>,
}

impl Steering {
    /// Takes over what an earlier part of the run has written down.
    pub fn new(settings: &SteeringSettings, base: &Recipe, out: &Path, resume: bool) -> Result<Self, LearnError> {
        let path = out.join("segmentor.mixes.jsonl");
        let mixes = match resume && settings.enabled && path.exists() {
            true => read_mixes(&path, base)?,
            false => Vec::new(),
        };
        let steering = Self {
            settings: settings.clone(),
            base: base.clone(),
            path,
            mixes,
        };
        if settings.enabled {
            steering.write()?;
        }
        steering.show(steering.mixes.last());
        Ok(steering)
    }

    /// Returns the mix that a step learns from; nothing for the recipe as it was configured.
    pub fn at(&self, step: u64) -> Option<&Mix> {
        self.mixes.iter().rfind(|mix| mix.from_step <= step)
    }

    /// Returns every mix.
    pub fn mixes(&self) -> &[Mix] {
        &self.mixes
    }

    /// Takes note of what was missed after a number of steps, and writes down the mix of those that follow. A mix that was
    /// written down for this step before is used again, whatever was missed now.
    pub fn take(&mut self, scores: &HeldOut, steps: u64, batch_size: u32) -> Result<(), LearnError> {
        tell(scores);
        if !self.settings.enabled {
            return Ok(());
        }
        if self.mixes.iter().all(|mix| mix.from_step < steps) {
            let mix = self.next(scores, steps, batch_size);
            self.mixes.push(mix);
            self.write()?;
        }
        self.show(self.at(steps));
        Ok(())
    }

    /// Sets the metrics that tell which mix is learnt from; nothing for the recipe as it was configured.
    fn show(&self, mix: Option<&Mix>) {
        gauge!(TRAINING_MIX).set(mix.map_or(0.0, |mix| mix.number as f64));
        let base = self.base.organs.clone().unwrap_or_default();
        for (organ, share) in mix.map_or(&base, |mix| &mix.organs) {
            gauge!(TRAINING_MIX_SHARE, "of" => "organ", "name" => organ.clone()).set(*share);
        }
        for (size, share) in mix.map_or(&self.base.sizes, |mix| &mix.sizes) {
            gauge!(TRAINING_MIX_SHARE, "of" => "size", "name" => size.name()).set(*share);
        }
    }

    fn next(&self, scores: &HeldOut, steps: u64, batch_size: u32) -> Mix {
        let before = self.mixes.last();
        let organs = self.base.organs.clone().unwrap_or_default();
        let sizes = &self.base.sizes;
        let of_organ = |organ: &String| scores.lesions.get(organ).map(|lesions| lesions.all.counts);
        let of_size = |size: &SizeClass| {
            let all = scores.lesions.values().filter_map(|lesions| lesions.by_size.get(size));
            Some(LesionCounts::sum(all.map(|rates| &rates.counts)))
        };
        let mut mix = Mix {
            number: self.mixes.len() as u64 + 1,
            from_step: steps,
            from_index: steps * u64::from(batch_size),
            recipe: Digest::default(),
            organs: self.settings.moved(&organs, before.map(|mix| &mix.organs), of_organ),
            sizes: self.settings.moved(sizes, before.map(|mix| &mix.sizes), of_size),
        };
        mix.recipe = mix.over(&self.base).hash();
        mix
    }

    /// Writes every mix, the new one last: on the disk before this returns.
    fn write(&self) -> Result<(), LearnError> {
        let line = |mix: &Mix| serde_json::to_string(mix).expect("finite numbers are representable in JSON") + "\n";
        let lines: String = self.mixes.iter().map(line).collect();
        Ok(write_atomically(&self.path, lines.as_bytes())?)
    }
}

impl SteeringSettings {
    /// Moves shares towards the base's times what was missed; what was not looked for counts as half missed.
    fn moved<K: Ord + Clone>(
        &self,
        base: &BTreeMap<K, f64>,
        before: Option<&BTreeMap<K, f64>>,
        counts: impl Fn(&K) -> Option<LesionCounts>,
    ) -> BTreeMap<K, f64> {
        let base = normalised(base.clone());
        let missed = |key: &K| {
            let LesionCounts { truths, matched, .. } = counts(key).unwrap_or_default();
            // One lesion found and one missed are added: a class of few lesions does not swing the mix.
            f64::from(truths - matched + 1) / f64::from(truths + 2)
        };
        let wanted = base
            .iter()
            .map(|(key, share)| (key.clone(), share * libm::pow(missed(key), self.strength)));
        let wanted = normalised(wanted.collect());
        let moved = base.iter().map(|(key, share)| {
            let from = before.and_then(|before| before.get(key)).unwrap_or(share);
            let to = self.floor * share + (1.0 - self.floor) * wanted[key];
            let moved = from + self.rate * (to - from);
            (key.clone(), libm::round(moved * PARTS) / PARTS)
        });
        moved.collect()
    }
}

fn normalised<K: Ord>(mut shares: BTreeMap<K, f64>) -> BTreeMap<K, f64> {
    let total: f64 = shares.values().sum();
    if total > 0.0 {
        shares.values_mut().for_each(|share| *share /= total);
    }
    shares
}

/// Shows who scrapes the metrics what was found, by organ and size class.
fn tell(scores: &HeldOut) {
    for (organ, lesions) in &scores.lesions {
        for (size, rates) in &lesions.by_size {
            if let Some(sensitivity) = rates.counts.sensitivity() {
                gauge!(TRAINING_SENSITIVITY, "organ" => organ.clone(), "size" => size.name()).set(sensitivity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::{LesionRates, OrganLesions};

    /// Scores in which so many of ten small and ten medium lesions of the liver were found.
    fn scores(small: u32, medium: u32) -> HeldOut {
        let rates = |matched| LesionRates {
            counts: LesionCounts {
                truths: 10,
                matched,
                ..LesionCounts::default()
            },
            ..LesionRates::default()
        };
        let mut liver = OrganLesions {
            by_size: BTreeMap::from([(SizeClass::Small, rates(small)), (SizeClass::Medium, rates(medium))]),
            ..OrganLesions::default()
        };
        liver.all.counts = LesionCounts::sum(liver.by_size.values().map(|rates| &rates.counts));
        HeldOut {
            lesions: BTreeMap::from([("liver".to_owned(), liver)]),
            ..HeldOut::default()
        }
    }

    fn base() -> Recipe {
        Recipe {
            organs: Some(BTreeMap::from([("liver".to_owned(), 1.0)])),
            sizes: BTreeMap::from([(SizeClass::Small, 0.5), (SizeClass::Medium, 0.5)]),
            ..Recipe::default()
        }
    }

    fn enabled() -> SteeringSettings {
        SteeringSettings {
            enabled: true,
            ..SteeringSettings::default()
        }
    }

    #[test]
    fn what_is_missed_is_asked_for_more_often() {
        let folder = tempfile::tempdir().unwrap();
        let mut steering = Steering::new(&enabled(), &base(), folder.path(), false).unwrap();
        assert!(steering.at(100).is_none());
        // Missed: (8 + 1) / 12 of the small, (2 + 1) / 12 of the medium ones: 3 to 1. A quarter stays half to half, which
        // makes 0.6875 of 0.75; half of the way there.
        steering.take(&scores(2, 8), 10, 4).unwrap();
        let first = steering.at(10).unwrap().clone();
        assert_eq!((first.number, first.from_step, first.from_index), (1, 10, 40));
        assert_eq!(
            first.sizes,
            BTreeMap::from([(SizeClass::Small, 0.59375), (SizeClass::Medium, 0.40625)])
        );
        assert_eq!(first.organs["liver"], 1.0);
        assert_eq!(first.recipe, first.over(&base()).hash());
        assert!(steering.at(9).is_none(), "steps before keep what they had");
        // Nothing small is missed any more: 1 / 12 is left, and what stays as it is.
        for step in 2..40 {
            steering.take(&scores(10, 0), step * 10, 4).unwrap();
        }
        let last = steering.at(1000).unwrap();
        let expected = 0.25 * 0.5 + 0.75 / 12.0;
        assert!((last.sizes[&SizeClass::Small] - expected).abs() < 1e-5, "{last:?}");
    }

    #[test]
    fn a_resumed_run_uses_the_mixes_that_were_written_down() {
        let folder = tempfile::tempdir().unwrap();
        let mut steering = Steering::new(&enabled(), &base(), folder.path(), false).unwrap();
        for step in [10, 20] {
            steering.take(&scores(2, 8), step, 4).unwrap();
        }
        let mixes = steering.mixes().to_vec();
        let path = folder.path().join("segmentor.mixes.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{{\"number\": 3, \"fro")).unwrap();
        let mut resumed = Steering::new(&enabled(), &base(), folder.path(), true).unwrap();
        assert_eq!(resumed.mixes(), mixes);
        // Its last checkpoint lay before step 20: another score there changes nothing.
        resumed.take(&scores(9, 1), 20, 4).unwrap();
        assert_eq!(resumed.mixes(), mixes);
        resumed.take(&scores(9, 1), 30, 4).unwrap();
        assert_eq!(resumed.at(30).unwrap().number, 3);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
        let fresh = Steering::new(&enabled(), &base(), folder.path(), false).unwrap();
        assert!(fresh.mixes().is_empty() && std::fs::read_to_string(&path).unwrap().is_empty());
        std::fs::write(&path, "x\n").unwrap();
        let refused = Steering::new(&enabled(), &base(), folder.path(), true).err().unwrap();
        assert!(refused.to_string().contains("segmentor.mixes.jsonl"), "{refused}");
    }
}
