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

    /// Tells whether it puts tumours into healthy patients.
    pub fn synthesizes(self) -> bool {
        matches!(self, Self::CopyPaste | Self::Analytic | Self::Generator | Self::Gated)
    }

    /// Returns the recipe of its stream: the base, with the arm's pools, synthesizer and gate.
    pub(super) fn recipe(self, base: &Recipe, config: &ExperimentConfig, hosts: Hosts) -> Recipe {
        let mut recipe = base.clone();
        recipe.pools = Some(BTreeMap::from([(Pool::LabelledReal, 1.0)]));
        if self.synthesizes() {
            recipe.centres = hosts.centres_beside(&base.centres);
            recipe.pools = Some(BTreeMap::from([
                (Pool::LabelledReal, 1.0 - hosts.share),
                (hosts.pool, hosts.share),
            ]));
        }
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

/// What an arm takes of the healthy patients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Hosts {
    /// Whose.
    pub pool: Pool,
    /// Share of their patches.
    pub share: f64,
    /// Share of those that stay without a tumour, because the gate accepts none.
    pub healthy: f64,
}

impl Hosts {
    /// Returns what an arm takes so that a share of its patches has an accepted lesion, as far as its patches without tumour, which
    /// those that stay healthy replace, go.
    pub fn new(pool: Pool, (synthetic, accepted): (f64, f64), centres: &BTreeMap<Centre, f64>) -> Self {
        let most = synthetic + anywhere(centres);
        let share = (synthetic / accepted.max(f64::MIN_POSITIVE)).min(most);
        Self {
            pool,
            share,
            healthy: share * (1.0 - accepted),
        }
    }

    /// Returns what real patches show beside. All arms see as much of what is no tumour: a host's patch shows a lesion, so that
    /// more real ones are cut anywhere; one that stays healthy takes the place of one of these.
    fn centres_beside(&self, base: &BTreeMap<Centre, f64>) -> BTreeMap<Centre, f64> {
        let (total, anywhere): (f64, f64) = (base.values().sum(), anywhere(base));
        let wanted = ((anywhere - self.healthy) / (1.0 - self.share)).clamp(0.0, 1.0);
        let left = (1.0 - wanted) / (1.0 - anywhere).max(f64::MIN_POSITIVE);
        let share = |(centre, share): (&Centre, &f64)| match centre {
            Centre::Anywhere => (*centre, wanted),
            Centre::Tumour | Centre::Organ => (*centre, share / total * left),
        };
        base.iter().map(share).collect()
    }
}

/// Returns the share of patches that are cut anywhere.
fn anywhere(centres: &BTreeMap<Centre, f64>) -> f64 {
    centres.get(&Centre::Anywhere).copied().unwrap_or(0.0) / centres.values().sum::<f64>()
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

    /// Shares of the whole stream: synthetic, real tumour, organ, without tumour.
    fn mix(accepted: f64) -> [f64; 4] {
        let hosts = Hosts::new(Pool::UnlabelledHost, (0.4, accepted), &base());
        let beside = hosts.centres_beside(&base());
        assert!((beside.values().sum::<f64>() - 1.0).abs() < 1e-12, "{beside:?}");
        let real = 1.0 - hosts.share;
        [
            hosts.share - hosts.healthy,
            real * beside[&Centre::Tumour],
            real * beside[&Centre::Organ],
            real * beside[&Centre::Anywhere] + hosts.healthy,
        ]
    }

    #[test]
    fn arms_see_as_many_tumours_and_as_much_of_the_rest_whatever_the_gate_accepts() {
        for accepted in [1.0, 0.75, 0.5] {
            let wanted = [0.4, 0.4 / 3.0, 0.2 / 3.0, 0.4];
            let got = mix(accepted);
            let apart = got.iter().zip(wanted).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f64::max) < 1e-12, "{accepted}: {got:?}");
        }
        // Fewer than half: there is nothing left that healthy hosts could replace.
        let few = mix(0.25);
        assert!((few[0] - 0.2).abs() < 1e-12 && (few[3] - 0.6).abs() < 1e-12, "{few:?}");
        assert_eq!(mix(0.0)[0], 0.0);
    }

    #[test]
    fn centres_may_be_of_one_kind() {
        for centre in [Centre::Tumour, Centre::Anywhere] {
            let base = BTreeMap::from([(centre, 2.0)]);
            let hosts = Hosts::new(Pool::LabelledHost, (0.5, 1.0), &base);
            assert_eq!(hosts.centres_beside(&base), BTreeMap::from([(centre, 1.0)]));
        }
    }
}
