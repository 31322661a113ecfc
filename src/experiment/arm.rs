//! What is compared: the arms, and the runs that they need.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ExperimentConfig;
use crate::sampler::{Centre, Pool};
use crate::stream::recipe::Recipe;
use crate::synth::SynthesizerKind;

/// What a segmentor may learn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The labelled patients.
    RealOnly,
    /// The labelled patients, with strong changes of intensity, noise and sharpness.
    RealAugmented,
    /// And the labelled patients' tumours, put into the unlabelled ones.
    CopyPaste,
    /// And analytic lesions in the unlabelled patients.
    Analytic,
    /// And the generator's lesions, all of them.
    Generator,
    /// And those of the generator's lesions that pass the gate.
    Gated,
    /// The labelled patients, and the unlabelled ones with their true tumours and labels: what synthesis could reach at best.
    Oracle,
}

impl Arm {
    /// Every arm, in the order of tables.
    pub const ALL: [Self; 7] = [
        Self::RealOnly,
        Self::RealAugmented,
        Self::CopyPaste,
        Self::Analytic,
        Self::Generator,
        Self::Gated,
        Self::Oracle,
    ];

    /// Returns the name used in configuration and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::RealOnly => "real_only",
            Self::RealAugmented => "real_augmented",
            Self::CopyPaste => "copy_paste",
            Self::Analytic => "analytic",
            Self::Generator => "generator",
            Self::Gated => "gated",
            Self::Oracle => "oracle",
        }
    }

    /// Tells whether it learns from the labelled patients alone.
    pub fn is_real(self) -> bool {
        matches!(self, Self::RealOnly | Self::RealAugmented)
    }

    /// Tells whether it needs critic, generator and discriminator.
    pub fn needs_models(self) -> bool {
        matches!(self, Self::Generator | Self::Gated)
    }

    /// Returns the recipe of its stream: the base, with the arm's pools, synthesizer and gate.
    pub(super) fn recipe(self, base: &Recipe, config: &ExperimentConfig, unlabelled: usize) -> Recipe {
        let mut recipe = base.clone();
        let host = if unlabelled > 0 {
            Pool::UnlabelledHost
        } else {
            Pool::LabelledHost
        };
        let synthetic = config.synthetic_share;
        recipe.pools = Some(match self {
            Self::RealOnly | Self::RealAugmented | Self::Oracle => BTreeMap::from([(Pool::LabelledReal, 1.0)]),
            Self::CopyPaste | Self::Analytic | Self::Generator | Self::Gated => {
                recipe.centres = centres_beside(&base.centres, synthetic);
                BTreeMap::from([(Pool::LabelledReal, 1.0 - synthetic), (host, synthetic)])
            }
        });
        recipe.synthesizer = Some(match self {
            Self::Generator | Self::Gated => SynthesizerKind::Conditional,
            Self::CopyPaste => SynthesizerKind::CopyPaste,
            Self::RealOnly | Self::RealAugmented | Self::Analytic | Self::Oracle => SynthesizerKind::Analytic,
        });
        recipe.gate.enabled = self == Self::Gated;
        if self == Self::RealAugmented {
            recipe.augment = config.strong.clone();
        }
        recipe
    }
}

/// Returns what real patches show beside a share of synthetic ones, which show the organ with a lesion each: all arms see the
/// rest of the body equally often, or those that synthesize would know less of what is no organ.
fn centres_beside(base: &BTreeMap<Centre, f64>, synthetic: f64) -> BTreeMap<Centre, f64> {
    let total: f64 = base.values().sum();
    let anywhere = base.get(&Centre::Anywhere).copied().unwrap_or(0.0) / total;
    let wanted = (anywhere / (1.0 - synthetic)).min(1.0);
    let left = (1.0 - wanted) / (1.0 - anywhere).max(f64::MIN_POSITIVE);
    let share = |(centre, share): (&Centre, &f64)| match centre {
        Centre::Anywhere => (*centre, wanted),
        Centre::Tumour | Centre::Organ => (*centre, share / total * left),
    };
    base.iter().map(share).collect()
}

/// One training run of the segmentor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunKey {
    /// What it learns from.
    pub arm: Arm,
    /// Labelled patients.
    pub labelled: usize,
    /// Unlabelled patients; 0 for arms that use none.
    pub unlabelled: usize,
    /// The seed of patients, weights and choices.
    pub seed: u64,
}

impl RunKey {
    /// Makes a key; arms that use no unlabelled patients have one key whatever their number.
    pub fn new(arm: Arm, labelled: usize, unlabelled: usize, seed: u64) -> Self {
        Self {
            arm,
            labelled,
            unlabelled: if arm.is_real() { 0 } else { unlabelled },
            seed,
        }
    }

    /// Returns the name of the run's folder.
    pub fn name(&self) -> String {
        let Self {
            arm,
            labelled,
            unlabelled,
            seed,
        } = self;
        format!("{}-l{labelled}-u{unlabelled}-s{seed}", arm.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_arm_sees_the_rest_of_the_body_equally_often() {
        let base = BTreeMap::from([(Centre::Tumour, 0.8), (Centre::Organ, 0.4), (Centre::Anywhere, 0.8)]);
        let beside = centres_beside(&base, 0.5);
        let near = |centre, share: f64| assert!((beside[&centre] - share).abs() < 1e-12, "{beside:?}");
        near(Centre::Anywhere, 0.8);
        near(Centre::Tumour, 0.4 / 3.0);
        near(Centre::Organ, 0.2 / 3.0);
        let alone = centres_beside(&BTreeMap::from([(Centre::Anywhere, 2.0)]), 0.5);
        assert_eq!(alone, BTreeMap::from([(Centre::Anywhere, 1.0)]));
        let none = centres_beside(&BTreeMap::from([(Centre::Tumour, 1.0)]), 0.5);
        assert_eq!(none, BTreeMap::from([(Centre::Tumour, 1.0)]));
    }
}
