//! The ranges of the training stages' settings, so that a typing error is refused before hours of work.

use std::collections::BTreeMap;
use std::fmt::Debug;

use super::{LearnError, OptimizerSettings, Split};
use crate::evaluate::HeldOutSettings;
use crate::volume::Plan;

/// The most resolutions of a network that sees cubes: the smallest has 16 voxels a side, which halve four times.
pub(super) const MAX_CUBE_LEVELS: usize = 5;

/// The most resamples of an interval: more change its second digit.
const MAX_RESAMPLES: u32 = 100_000;

/// A section of the configuration, by its name there.
pub(super) struct Section(pub &'static str);

impl Section {
    /// Refuses a value that is not `ok`.
    pub fn check(&self, key: &str, ok: bool, expected: &str, got: impl Debug) -> Result<(), LearnError> {
        if ok {
            return Ok(());
        }
        Err(LearnError::Config {
            key: format!("{}.{key}", self.0),
            expected: expected.into(),
            got: format!("{got:?}"),
        })
    }

    /// Checks a share or a probability.
    pub fn unit(&self, key: &str, value: f64) -> Result<(), LearnError> {
        self.check(key, (0.0..=1.0).contains(&value), "0 to 1", value)
    }

    /// Checks a count of something that there must be.
    pub fn count(&self, key: &str, value: u64) -> Result<(), LearnError> {
        self.check(key, value > 0, "at least 1", value)
    }

    /// Checks the channels at each resolution.
    pub fn widths(&self, key: &str, widths: &[usize], most: usize) -> Result<(), LearnError> {
        let ok = (1..=most).contains(&widths.len()) && widths.iter().all(|width| (1..=1024).contains(width));
        self.check(key, ok, &format!("1 to {most} numbers from 1 to 1024"), widths)
    }

    /// Checks the longest side of a cube.
    pub fn max_cube(&self, max_cube: usize) -> Result<(), LearnError> {
        let ok = (16..=96).contains(&max_cube) && max_cube.is_multiple_of(16);
        self.check("max_cube", ok, "a multiple of 16 from 16 to 96", max_cube)
    }

    /// Checks the shares of size classes, or of what else there are kinds of.
    pub fn shares<K: Debug>(&self, key: &str, shares: &BTreeMap<K, f64>) -> Result<(), LearnError> {
        let sound = shares.values().all(|share| share.is_finite() && *share >= 0.0);
        let ok = sound && shares.values().any(|share| *share > 0.0);
        self.check(key, ok, "shares of at least 0, one of them above 0", shares)
    }

    /// Checks which cases are held out.
    pub fn split(&self, split: &Split) -> Result<(), LearnError> {
        if split.file.is_some() {
            // The file says how many there are.
            return Ok(());
        }
        self.check("split.folds", split.folds > 0, "at least 1", split.folds)?;
        let expected = format!("less than split.folds = {}", split.folds);
        self.check("split.fold", split.fold < split.folds, &expected, split.fold)
    }

    /// Checks how held-out volumes are covered.
    pub fn held_out(&self, held_out: &HeldOutSettings, levels: usize) -> Result<(), LearnError> {
        let stride = 1 << levels.saturating_sub(1);
        let window = held_out.window.window;
        let ok = window.iter().all(|side| (1..=384).contains(side) && side % stride == 0);
        let expected = format!("multiples of {stride} up to 384");
        self.check("held_out.window.window", ok, &expected, window)?;
        let overlap = held_out.window.overlap;
        self.check(
            "held_out.window.overlap",
            (0.0..=0.9).contains(&overlap),
            "0 to 0.9",
            overlap,
        )?;
        if let Some((class, mm)) = held_out.tolerance.refusal() {
            self.check(&format!("held_out.tolerance ({class})"), false, "0 to 100 mm", mm)?;
        }
        let resamples = held_out.bootstrap.resamples;
        let ok = resamples <= MAX_RESAMPLES;
        self.check(
            "held_out.bootstrap.resamples",
            ok,
            &format!("at most {MAX_RESAMPLES}"),
            resamples,
        )
    }

    /// Checks that tolerances are those of classes that there are.
    pub fn tolerance(&self, held_out: &HeldOutSettings, plan: &Plan) -> Result<(), LearnError> {
        let Some(class) = held_out.tolerance.unknown(&plan.labels) else {
            return Ok(());
        };
        let known: Vec<&str> = plan.labels.iter().map(|(name, _)| name).collect();
        let key = format!("held_out.tolerance.class_mm.{class}");
        self.check(&key, false, &format!("a class of the plan, one of {known:?}"), class)
    }

    /// Checks an optimizer that is to make so many steps.
    pub fn optimizer(&self, key: &str, optimizer: &OptimizerSettings, steps: u64) -> Result<(), LearnError> {
        let above_zero = |name: &str, value: f64| {
            self.check(
                &format!("{key}.{name}"),
                value.is_finite() && value > 0.0,
                "a number above 0",
                value,
            )
        };
        above_zero("learning_rate", optimizer.learning_rate)?;
        above_zero("max_norm", optimizer.max_norm)?;
        let decays = [
            ("beta_1", optimizer.beta_1),
            ("beta_2", optimizer.beta_2),
            ("momentum", optimizer.momentum),
            ("ema", optimizer.ema),
        ];
        for (name, beta) in decays {
            self.check(
                &format!("{key}.{name}"),
                (0.0..1.0).contains(&beta),
                "0 to less than 1",
                beta,
            )?;
        }
        let accumulate = optimizer.accumulate;
        self.check(
            &format!("{key}.accumulate"),
            (1..=steps.min(1024)).contains(&accumulate),
            &format!("1 to {}, and no more than steps", steps.min(1024)),
            accumulate,
        )?;
        self.unit(&format!("{key}.final_share"), optimizer.final_share)?;
        self.unit(&format!("{key}.weight_decay"), optimizer.weight_decay)
    }
}

#[cfg(test)]
mod tests {
    use crate::learn::{CriticConfig, SegmentorConfig, SynthesizerConfig};

    #[test]
    fn defaults_are_inside_and_refusals_name_section_key_and_range() {
        CriticConfig::default().check().unwrap();
        SynthesizerConfig::default().check().unwrap();
        SegmentorConfig::default().check().unwrap();
        let refused = |change: fn(&mut CriticConfig)| {
            let mut config = CriticConfig::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert_eq!(refused(|c| c.steps = 0), "critic.steps: expected at least 1, got 0");
        assert!(refused(|c| c.widths = vec![8; 6]).starts_with("critic.widths: expected 1 to 5"));
        assert!(refused(|c| c.cube_mix.clear()).starts_with("critic.cube_mix"));
        assert!(refused(|c| c.split.fold = 5).starts_with("critic.split.fold: expected less than"));
        assert!(refused(|c| c.optimizer.learning_rate = f64::NAN).starts_with("critic.optimizer.learning_rate"));
        assert!(refused(|c| c.held_out.window.window = [12; 3]).starts_with("critic.held_out.window.window"));
        let config = SegmentorConfig {
            batch_size: 0,
            ..SegmentorConfig::default()
        };
        assert!(
            config
                .check()
                .unwrap_err()
                .to_string()
                .starts_with("segmentor.batch_size")
        );
    }
}
