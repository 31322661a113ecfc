//! What an experiment is told.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Arm, ExperimentError, RunKey};
use crate::digest::Digest;
use crate::learn::{CriticConfig, Method, SegmentorConfig, SynthesizerConfig};
use crate::phantom::PhantomSettings;
use crate::sampler::Augmentation;
use crate::stream::recipe::Recipe;
use crate::volume::Plan;

/// Raised whenever the same configuration would mean other arms: runs of before do not count then.
const EXPERIMENT_REVISION: u32 = 7;
/// Revisions before, whose runs without models are this one's: their critics were calibrated otherwise.
const REVISIONS_BEFORE: [u32; 2] = [6, 5];
/// The stream's revision at which arms last changed. 6 changed bundles with inner folds alone, which no experiment had then; 7 copied tumours that
/// are larger than their box, or judged by the gate, which no arm's are; 8 rounds a network's first convolution once: the same arms, as on another
/// processor.
const STREAM_REVISION: u32 = 5;
/// The most patients of one kind.
const MAX_PATIENTS: usize = 9_000;

/// Which runs an experiment consists of. The stages' own sections say how each of them is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExperimentConfig {
    /// The organ whose tumours are scored.
    pub organ: String,
    /// The seed of the test patients; those of run seed `s` are of the cohort `cohort_seed + 1 + s`.
    pub cohort_seed: u64,
    /// Labelled patients (scanners A and B).
    pub labelled: usize,
    /// Unlabelled patients (scanners C and D).
    pub unlabelled: usize,
    /// Whether the unlabelled patients have tumours that nobody labelled: those that the oracle learns from. The arms `screened` and
    /// `gated` leave out what may be one by the critic's look, `ignoring` all tissue of the organ; the others take them for healthy tissue.
    pub hidden: bool,
    /// Test patients (scanners C, D and E in turn).
    pub test: usize,
    /// Share of patches with a synthetic tumour in arms that synthesize. Where the gate accepts none in some hosts, more are
    /// asked for, up to all patches; a real patch takes a refused lesion's place.
    pub synthetic_share: f64,
    /// What the arm `real_augmented` does to its patches.
    pub strong: Augmentation,
    /// Stage 2 of the arms `published` and `published_ungated`; its critic is that of the other arms.
    pub published: SynthesizerConfig,
    /// The arms; `ignoring` and `screened` only where tumours are hidden.
    pub arms: Vec<Arm>,
    /// Seeds of every arm: 0, 1, ...
    pub seeds: u64,
    /// Numbers of labelled patients of the curve over them.
    pub labelled_counts: Vec<usize>,
    /// Numbers of unlabelled patients of the curve over them.
    pub unlabelled_counts: Vec<usize>,
    /// Seeds of the curves.
    pub curve_seeds: u64,
}

impl Default for ExperimentConfig {
    fn default() -> Self {
        Self {
            organ: "liver".into(),
            cohort_seed: 1000,
            labelled: 8,
            unlabelled: 64,
            hidden: false,
            test: 45,
            synthetic_share: 0.5,
            strong: Augmentation::default(),
            published: SynthesizerConfig {
                method: Method::Published,
                ..SynthesizerConfig::default()
            },
            arms: Arm::ALL.into_iter().filter(|arm| !arm.expects_hidden()).collect(),
            seeds: 5,
            labelled_counts: vec![4, 8, 16, 32],
            unlabelled_counts: vec![0, 8, 32, 128],
            curve_seeds: 3,
        }
    }
}

impl ExperimentConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`ExperimentError::Config`] names the key and its range.
    pub fn check(&self) -> Result<(), ExperimentError> {
        let check = |key, ok: bool, expected, got: String| {
            let refused = ExperimentError::Config { key, expected, got };
            if ok { Ok(()) } else { Err(refused) }
        };
        let some = |count: &usize| (1..=MAX_PATIENTS).contains(count);
        let (labelled, unlabelled) = (self.labelled, self.unlabelled);
        check("labelled", some(&labelled), "1 to 9000", labelled.to_string())?;
        check("unlabelled", some(&unlabelled), "1 to 9000", unlabelled.to_string())?;
        check("test", some(&self.test), "1 to 9000", self.test.to_string())?;
        let share = self.synthetic_share;
        check(
            "synthetic_share",
            (0.0..1.0).contains(&share),
            "0 to below 1",
            share.to_string(),
        )?;
        let counts = &self.labelled_counts;
        check(
            "labelled_counts",
            counts.iter().all(some),
            "counts of 1 to 9000",
            format!("{counts:?}"),
        )?;
        let counts = &self.unlabelled_counts;
        let few = counts.iter().all(|count| *count <= MAX_PATIENTS);
        check("unlabelled_counts", few, "counts of 0 to 9000", format!("{counts:?}"))?;
        check(
            "seeds",
            (1..=1000).contains(&self.seeds),
            "1 to 1000",
            self.seeds.to_string(),
        )?;
        let careful = self.arms.iter().find(|arm| arm.expects_hidden() && !self.hidden);
        check(
            "arms",
            careful.is_none(),
            "ignoring and screened only with hidden = true",
            careful.map_or("", |arm| arm.name()).into(),
        )?;
        let method = self.published.method;
        check(
            "published.method",
            method == Method::Published,
            "published",
            format!("{method:?}"),
        )?;
        if let Err(error) = self.published.check() {
            check("published", false, "a stage 2 of valid values", error.to_string())?;
        }
        let strong = Recipe {
            augment: self.strong.clone(),
            ..Recipe::default()
        };
        if let Err(error) = strong.validate() {
            check("strong", false, "an augmentation of valid values", error.to_string())?;
        }
        let curve = self.curve_seeds;
        check("curve_seeds", curve <= 1000, "0 to 1000", curve.to_string())
    }

    /// Returns the key of an arm's run.
    pub fn arm_key(&self, arm: Arm, seed: u64) -> RunKey {
        RunKey::new(arm, self.labelled, self.unlabelled, seed)
    }

    /// Lists the pairs of arms that are compared: `gated` with every other, and those that differ in one thing.
    pub fn pairs(&self) -> Vec<[Arm; 2]> {
        let others = self.arms.iter().filter(|arm| **arm != Arm::Gated);
        let pairs = others.map(|arm| [Arm::Gated, *arm]);
        let mut further = vec![[Arm::Published, Arm::PublishedUngated], [Arm::Oracle, Arm::RealOnly]];
        if self.arms.contains(&Arm::Screened) {
            further.insert(0, [Arm::Screened, Arm::Generator]);
            if self.arms.contains(&Arm::Ignoring) {
                further.insert(1, [Arm::Screened, Arm::Ignoring]);
            }
        }
        pairs.chain(further).collect()
    }

    /// Lists all runs: seed by seed, so that what is done can be compared pair by pair; the arms first, then the curves.
    pub fn runs(&self) -> Vec<RunKey> {
        let arms = (0..self.seeds).flat_map(|seed| self.arms.iter().map(move |arm| self.arm_key(*arm, seed)));
        let curves = (0..self.curve_seeds).flat_map(|seed| {
            let labelled = self.labelled_counts.iter().flat_map(move |count| {
                [Arm::RealOnly, Arm::Gated].map(|arm| RunKey::new(arm, *count, self.unlabelled, seed))
            });
            let unlabelled = self.unlabelled_counts.iter();
            labelled.chain(unlabelled.map(move |count| RunKey::new(Arm::Gated, self.labelled, *count, seed)))
        });
        let mut runs: Vec<RunKey> = Vec::new();
        for key in arms.chain(curves) {
            if !runs.contains(&key) {
                runs.push(key);
            }
        }
        runs
    }
}

/// Everything that decides what comes out of a run.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// Grid, labels and window.
    pub plan: &'a Plan,
    /// The patients.
    pub phantom: &'a PhantomSettings,
    /// Stage 1.
    pub critic: &'a CriticConfig,
    /// Stage 2.
    pub synthesizer: &'a SynthesizerConfig,
    /// Stage 3.
    pub segmentor: &'a SegmentorConfig,
    /// The runs.
    pub experiment: &'a ExperimentConfig,
}

impl Setting<'_> {
    /// Returns the digests of what decides the runs of one arm alone.
    pub fn own_digests(&self) -> BTreeMap<Arm, Digest> {
        let published = Digest::of_json(&digested(&self.experiment.published));
        let arms = Arm::ALL.into_iter().filter(|arm| arm.is_published());
        arms.map(|arm| (arm, published)).collect()
    }

    /// Returns the digest that results are kept under: of everything but which of the runs are asked for and what one arm alone
    /// is told.
    pub fn digest(&self) -> Digest {
        self.digest_of(EXPERIMENT_REVISION)
    }

    /// Returns the digests by revisions before, see [`Results::take_over`](super::Results::take_over).
    pub fn digests_before(&self) -> Vec<Digest> {
        REVISIONS_BEFORE.map(|revision| self.digest_of(revision)).to_vec()
    }

    fn digest_of(&self, revision: u32) -> Digest {
        let ExperimentConfig {
            organ,
            cohort_seed,
            test,
            synthetic_share,
            strong,
            ..
        } = self.experiment;
        let everything = Digest::of_json(&(
            ("experiment", revision, env!("CARGO_PKG_VERSION"), STREAM_REVISION),
            (self.plan, self.phantom),
            (self.critic, digested(self.synthesizer), self.segmentor),
            (organ, cohort_seed, test, synthetic_share, strong),
        ));
        let everything = match self.segmentor.recipe.unlabelled_negatives {
            Some(_) => everything,
            // Arms with a critic took what hides from it for healthy once, now all arms take all tissue for it.
            None => Digest::of_json(&(everything, "trust")),
        };
        match self.experiment.hidden {
            // Experiments of before there was a choice keep their digest.
            false => everything,
            true => Digest::of_json(&(everything, "hidden")),
        }
    }
}

/// Returns a stage 2 as digests know it: those of before there was a choice of `contrast_over` keep theirs.
fn digested(config: &SynthesizerConfig) -> serde_json::Value {
    let mut value = serde_json::to_value(config).expect("a configuration is representable in JSON");
    if (config.contrast_over.is_full_mask() || config.method == Method::Published)
        && let Some(table) = value.as_object_mut()
    {
        table.remove("contrast_over");
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::ContrastOver;
    use crate::stream::negatives::UnlabelledNegatives;

    #[test]
    fn digests_of_before_know_of_no_choice_of_contrast() {
        let said = |contrast_over, method| {
            let config = SynthesizerConfig {
                contrast_over,
                method,
                ..SynthesizerConfig::default()
            };
            digested(&config).get("contrast_over").cloned()
        };
        assert_eq!(said(ContrastOver::FullMask, Method::Conditional), None);
        assert_eq!(said(ContrastOver::Lesion, Method::Published), None);
        assert_eq!(said(ContrastOver::Lesion, Method::Conditional), Some("lesion".into()));
    }

    #[test]
    fn a_recipe_that_leaves_hidden_tumours_open_has_a_digest_of_its_own() {
        let digest = |negatives| {
            let mut segmentor = SegmentorConfig::default();
            segmentor.recipe.unlabelled_negatives = negatives;
            let setting = Setting {
                plan: &Plan::default(),
                phantom: &PhantomSettings::default(),
                critic: &CriticConfig::default(),
                synthesizer: &SynthesizerConfig::default(),
                segmentor: &segmentor,
                experiment: &ExperimentConfig::default(),
            };
            setting.digest()
        };
        assert_ne!(digest(None), digest(Some(UnlabelledNegatives::Trust)));
    }

    #[test]
    fn runs_are_listed_once_and_the_arms_come_first() {
        let config = ExperimentConfig::default();
        config.check().unwrap();
        let runs = config.runs();
        let arms = 9 * 5;
        // Of the curves, 8 labelled patients are among the arms; the scaling curve has four counts of its own.
        let curves = 3 * (2 * 3 + 4);
        assert_eq!(runs.len(), arms + curves);
        assert!(runs[..arms].iter().all(|key| key.labelled == 8));
        assert_eq!(runs[0].name(), "real_only-l8-u0-s0");
        assert_eq!(runs[5].name(), "gated-l8-u64-s0");
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        let refused = |change: &dyn Fn(&mut ExperimentConfig)| {
            let mut config = ExperimentConfig::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(refused(&|config| config.labelled = 0).contains("experiment.labelled"));
        assert!(refused(&|config| config.synthetic_share = 1.0).contains("experiment.synthetic_share"));
        assert!(refused(&|config| config.labelled_counts = vec![0]).contains("experiment.labelled_counts"));
        assert!(refused(&|config| config.seeds = 0).contains("experiment.seeds"));
        let arms = refused(&|config| config.arms.push(Arm::Screened));
        assert!(
            arms.contains("experiment.arms") && arms.contains("hidden = true"),
            "{arms}"
        );
    }
}
