//! What is compared: the arms, and the runs that they need.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ExperimentConfig;
use crate::sampler::{Centre, Pool};
use crate::stream::negatives::UnlabelledNegatives;
use crate::stream::recipe::{Fallback, Recipe};
use crate::synth::{GateRule, SynthesizerKind};

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
    /// The same; what else there is of the hosts' organs, more than 6 mm away from the lesion, is *ignore*.
    Ignoring,
    /// The same, without the hosts' tissue that may be tumour by the critic's look: there the label is *ignore*.
    Screened,
    /// And those of the generator's lesions that pass the gate; where hosts may hide tumours, without the tissue that may be one by the critic's look.
    Gated,
    /// And those of the published generator's lesions that pass the published gate.
    Published,
    /// And the published generator's lesions, all of them.
    PublishedUngated,
    /// The labelled patients, and the unlabelled ones with their true tumours and labels: what synthesis could reach at best.
    Oracle,
}

impl Arm {
    /// Every arm, in the order of tables.
    pub const ALL: [Self; 11] = [
        Self::RealOnly,
        Self::RealAugmented,
        Self::CopyPaste,
        Self::Analytic,
        Self::Generator,
        Self::Ignoring,
        Self::Screened,
        Self::Gated,
        Self::Published,
        Self::PublishedUngated,
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
            Self::Ignoring => "ignoring",
            Self::Screened => "screened",
            Self::Gated => "gated",
            Self::Published => "published",
            Self::PublishedUngated => "published_ungated",
            Self::Oracle => "oracle",
        }
    }

    /// Tells whether it learns from the labelled patients alone.
    pub fn is_real(self) -> bool {
        matches!(self, Self::RealOnly | Self::RealAugmented)
    }

    /// Tells whether it needs a critic and a generator.
    pub fn needs_models(self) -> bool {
        self.is_published() || matches!(self, Self::Generator | Self::Ignoring | Self::Screened | Self::Gated)
    }

    /// Tells whether its lesions are the published generator's.
    pub fn is_published(self) -> bool {
        matches!(self, Self::Published | Self::PublishedUngated)
    }

    /// Tells whether some of its lesions are refused.
    pub fn is_gated(self) -> bool {
        matches!(self, Self::Gated | Self::Published)
    }

    /// Tells whether it is of use only where unlabelled patients may have hidden tumours.
    pub fn expects_hidden(self) -> bool {
        matches!(self, Self::Ignoring | Self::Screened)
    }

    /// Tells whether it puts tumours into healthy patients.
    pub fn synthesizes(self) -> bool {
        !self.is_real() && self != Self::Oracle
    }

    /// Returns the recipe of its stream: the base, with the arm's pools, synthesizer and gate.
    pub(super) fn recipe(self, base: &Recipe, config: &ExperimentConfig, hosts: Hosts) -> Recipe {
        let mut recipe = base.clone();
        recipe.pools = Some(BTreeMap::from([(Pool::LabelledReal, 1.0)]));
        if self.synthesizes() {
            recipe.centres = centres_beside(&base.centres, hosts.synthetic);
            recipe.pools = Some(BTreeMap::from([
                (Pool::LabelledReal, 1.0 - hosts.share),
                (hosts.pool, hosts.share),
            ]));
        }
        recipe.synthesizer = Some(match self {
            Self::Generator | Self::Ignoring | Self::Screened | Self::Gated => SynthesizerKind::Conditional,
            Self::Published | Self::PublishedUngated => SynthesizerKind::Published,
            Self::CopyPaste => SynthesizerKind::CopyPaste,
            Self::RealOnly | Self::RealAugmented | Self::Analytic | Self::Oracle => SynthesizerKind::Analytic,
        });
        recipe.gate.enabled = self.is_gated();
        recipe.unlabelled_negatives = Some(match self {
            Self::Ignoring if config.hidden => UnlabelledNegatives::Ignore,
            Self::Screened | Self::Gated if config.hidden => UnlabelledNegatives::Critic,
            // The same for all, whether their service has a critic or not.
            _ => recipe.unlabelled_negatives.unwrap_or(UnlabelledNegatives::Trust),
        });
        if self.is_published() {
            recipe.gate.rule = GateRule::Published;
            recipe.gate.realism = 0.0;
        }
        recipe.fallback = Fallback::Real;
        if self == Self::RealAugmented {
            recipe.augment = config.strong.clone();
        }
        recipe
    }
}

/// What an arm takes of the healthy patients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Hosts {
    /// Whose.
    pub pool: Pool,
    /// Share of the indices that ask for a lesion in one of them. Where the gate accepts none, a real patch takes the place.
    pub share: f64,
    /// Share of the patches that then have a lesion.
    pub synthetic: f64,
}

impl Hosts {
    /// Returns what an arm takes so that a share of its patches has an accepted lesion, as far as all indices go.
    pub fn new(pool: Pool, synthetic: f64, accepted: f64) -> Self {
        Self {
            pool,
            share: (synthetic / accepted.max(f64::MIN_POSITIVE)).min(1.0),
            synthetic: synthetic.min(accepted),
        }
    }
}

/// Returns what real patches show beside a share of synthetic ones. All arms see as many patches cut anywhere: a host's patch shows
/// a lesion, so that more of the real ones are.
fn centres_beside(base: &BTreeMap<Centre, f64>, synthetic: f64) -> BTreeMap<Centre, f64> {
    let total: f64 = base.values().sum();
    let anywhere = base.get(&Centre::Anywhere).copied().unwrap_or(0.0) / total;
    let wanted = (anywhere / (1.0 - synthetic)).clamp(0.0, 1.0);
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

    fn base() -> BTreeMap<Centre, f64> {
        BTreeMap::from([(Centre::Tumour, 0.8), (Centre::Organ, 0.4), (Centre::Anywhere, 0.8)])
    }

    /// Shares of the whole stream: synthetic, real tumour, organ, anywhere.
    fn mix(accepted: f64) -> [f64; 4] {
        let hosts = Hosts::new(Pool::UnlabelledHost, 0.4, accepted);
        let beside = centres_beside(&base(), hosts.synthetic);
        assert!((beside.values().sum::<f64>() - 1.0).abs() < 1e-12, "{beside:?}");
        // A refused host's place is a real patch's.
        let synthetic = hosts.share * accepted;
        let real = |centre| (1.0 - synthetic) * beside[&centre];
        [
            synthetic,
            real(Centre::Tumour),
            real(Centre::Organ),
            real(Centre::Anywhere),
        ]
    }

    #[test]
    fn arms_see_as_many_tumours_and_as_much_of_the_rest_whatever_the_gate_accepts() {
        for accepted in [1.0, 0.75, 0.4] {
            let wanted = [0.4, 0.4 / 3.0, 0.2 / 3.0, 0.4];
            let got = mix(accepted);
            let apart = got.iter().zip(wanted).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f64::max) < 1e-12, "{accepted}: {got:?}");
        }
        // Every index asks for a lesion, and there are fewer: real tumours take the place of some.
        let (wanted, got) = ([0.25, 0.7 / 3.0, 0.35 / 3.0, 0.4], mix(0.25));
        let apart = got.iter().zip(wanted).map(|(a, b)| (a - b).abs());
        assert!(apart.fold(0.0, f64::max) < 1e-12, "{got:?}");
        assert_eq!(Hosts::new(Pool::UnlabelledHost, 0.4, 0.0).share, 1.0);
    }

    #[test]
    fn what_hidden_tumours_mean_is_the_arms() {
        let meaning = |arm: Arm, hidden| {
            // The recipe leaves it open; where a stream says what it means depends on whether there is a critic.
            let base = Recipe::default();
            assert_eq!(base.unlabelled_negatives, None);
            let config = ExperimentConfig {
                hidden,
                ..ExperimentConfig::default()
            };
            let hosts = Hosts::new(Pool::UnlabelledHost, 0.4, 1.0);
            arm.recipe(&base, &config, hosts).unlabelled_negatives.unwrap()
        };
        for arm in Arm::ALL {
            let expected = match arm {
                Arm::Ignoring => UnlabelledNegatives::Ignore,
                Arm::Screened | Arm::Gated => UnlabelledNegatives::Critic,
                _ => UnlabelledNegatives::Trust,
            };
            assert_eq!(meaning(arm, true), expected, "{}", arm.name());
            assert_eq!(meaning(arm, false), UnlabelledNegatives::Trust, "{}", arm.name());
        }
    }

    #[test]
    fn centres_may_be_of_one_kind() {
        for centre in [Centre::Tumour, Centre::Anywhere] {
            let base = BTreeMap::from([(centre, 2.0)]);
            assert_eq!(centres_beside(&base, 0.5), BTreeMap::from([(centre, 1.0)]));
        }
    }
}
