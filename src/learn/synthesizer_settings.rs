//! What stage 2 is told, and what it reports.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::augment::LookSettings;
use super::check::{MAX_CUBE_LEVELS, Section};
use super::choice::MAX_PARAMETERS;
use super::critic::default_cube_mix;
use super::guard::GuardSettings;
use super::painting::PaintingScore;
use super::{LearnError, Metrics, OptimizerSettings, Split};
use crate::checkpoint::{Architecture, Precision};
use crate::lesion::LesionForm;
use crate::nn::{ContrastOver, GeneratorConfig, PublishedConfig, UnetConfig};
use crate::volume::SizeClass;

/// The most lesions of a report.
const MAX_HELD_OUT_LESIONS: usize = 2000;
/// The most voxels of their cubes: all hosts are held at once, ten bytes a voxel, together 5 GB.
const MAX_HELD_OUT_VOXELS: usize = 1 << 29;

/// How the parts of the generator's loss are weighed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossWeights {
    /// The critic recognises too little of the lesion.
    pub recall: f64,
    /// The critic sees tumour around it.
    pub false_alarm: f64,
    /// The discriminator takes it for synthetic.
    pub adversarial: f64,
    /// Its texture changes from voxel to voxel.
    pub roughness: f64,
    /// Its texture is stronger or weaker than a real lesion's.
    pub texture: f64,
    /// Its outermost voxels are brighter or darker against its core than a real lesion's; 0 for no such loss.
    #[serde(skip_serializing_if = "is_zero")]
    pub edge: f64,
    /// Two noise fields give the same texture.
    pub sameness: f64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_zero(weight: &f64) -> bool {
    *weight == 0.0
}

impl LossWeights {
    /// Refuses what is out of range: a negative weight would reward what it is to prevent.
    fn check(&self, section: &Section) -> Result<(), LearnError> {
        let Self {
            recall,
            false_alarm,
            adversarial,
            roughness,
            texture,
            edge,
            sameness,
        } = *self;
        let weights = [
            ("recall", recall),
            ("false_alarm", false_alarm),
            ("adversarial", adversarial),
            ("roughness", roughness),
            ("texture", texture),
            ("edge", edge),
            ("sameness", sameness),
        ];
        weights.into_iter().try_for_each(|(name, weight)| {
            let ok = (0.0..=100.0).contains(&weight);
            section.check(&format!("loss.{name}"), ok, "0 to 100", weight)
        })
    }
}

impl Default for LossWeights {
    fn default() -> Self {
        Self {
            recall: 1.0,
            false_alarm: 0.2,
            adversarial: 0.2,
            roughness: 0.1,
            texture: 0.5,
            edge: 0.0,
            sameness: 0.5,
        }
    }
}

/// How the generator is made and taught.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Ours: the generator is told mask, organ, size and contrast, and draws noise.
    #[default]
    Conditional,
    /// The paper's networks, equation and losses.
    Published,
}

impl Method {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What the published method is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishedSettings {
    /// Channels of the first convolution of generator and discriminator, from which all others follow.
    pub width: usize,
    /// Weight of the adversarial loss beside the critic's: 0.1 for the abdomen, 0.5 for the chest.
    pub adversarial: f64,
}

impl Default for PublishedSettings {
    fn default() -> Self {
        Self {
            width: PublishedConfig::PUBLISHED_WIDTH,
            adversarial: 0.1,
        }
    }
}

impl PublishedSettings {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Stage 2's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SynthesizerConfig {
    /// How the generator is made and taught; widths, spread, contrasts, `contrast_over`, `loss`, recall, diversity and `r1` are those of
    /// `conditional` alone.
    #[serde(skip_serializing_if = "Method::is_default")]
    pub method: Method,
    /// What `published` is told.
    #[serde(skip_serializing_if = "PublishedSettings::is_default")]
    pub published: PublishedSettings,
    /// The generator's channels at each resolution, finest first.
    pub widths: Vec<usize>,
    /// The discriminator's.
    pub discriminator_widths: Vec<usize>,
    /// Largest deviation of the texture from its mean, in HU.
    pub spread_hu: f64,
    /// Over what the mean contrast is the requested one: the `lesion`, or the `full_mask` as before there was a choice.
    pub contrast_over: ContrastOver,
    /// Optimizer steps, each of generator and discriminator.
    pub steps: u64,
    /// Voxels of a step: as many pairs of hosts as fit, 1 to 16; the two share a lesion and differ in noise.
    pub voxels_per_step: usize,
    /// Shares of the size classes.
    pub cube_mix: BTreeMap<SizeClass, f64>,
    /// Longest side of a cube in voxels, a multiple of 16.
    pub max_cube: usize,
    /// The seed of weights and choices.
    pub seed: u64,
    /// Which cases are held out; the critic's.
    pub split: Split,
    /// The generator's optimizer.
    pub optimizer: OptimizerSettings,
    /// The discriminator's optimizer.
    pub discriminator_optimizer: OptimizerSettings,
    /// How looks vary, of hosts and real tumours alike.
    pub look: LookSettings,
    /// The lesions' form.
    pub form: LesionForm,
    /// Share of contrasts drawn evenly from -80 to 60 HU instead of near a real tumour's.
    pub broad_contrast: f64,
    /// Weights of the generator's losses.
    pub loss: LossWeights,
    /// Added to the calibrated recall that the critic shall reach, up to 0.95.
    pub recall_margin: f64,
    /// Least recall that the critic shall reach, whatever the calibrated one.
    pub least_recall: f64,
    /// The difference that two noise fields shall make, over the strength of a real lesion's texture.
    pub diversity: f64,
    /// Weight of the discriminator's steadiness under noise (approximated R1); 0 for none.
    pub r1: f64,
    /// When the run is stopped as senseless.
    pub guard: GuardSettings,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// How the final weights are stored.
    pub precision: Precision,
    /// Lesions painted on held-out hosts for the report, 1 to 2000.
    pub held_out_lesions: usize,
}

impl Default for SynthesizerConfig {
    fn default() -> Self {
        let adversarial = OptimizerSettings {
            learning_rate: 5e-4,
            beta_1: 0.5,
            ..OptimizerSettings::default()
        };
        Self {
            method: Method::default(),
            published: PublishedSettings::default(),
            widths: vec![16, 32, 64],
            discriminator_widths: vec![16, 32, 64],
            spread_hu: 30.0,
            contrast_over: ContrastOver::Lesion,
            steps: 1500,
            voxels_per_step: 2 * 48 * 48 * 48,
            cube_mix: default_cube_mix(),
            max_cube: 96,
            seed: 2,
            split: Split::default(),
            optimizer: adversarial.clone(),
            discriminator_optimizer: adversarial,
            look: LookSettings {
                noise_hu: 0.0,
                blur: 0.0,
                ..LookSettings::default()
            },
            form: LesionForm::default(),
            broad_contrast: 0.25,
            loss: LossWeights::default(),
            recall_margin: 0.15,
            least_recall: 0.5,
            diversity: 0.75,
            r1: 1.0,
            guard: GuardSettings::default(),
            checkpoint_every: 100,
            precision: Precision::default(),
            held_out_lesions: 48,
        }
    }
}

impl SynthesizerConfig {
    /// Returns the shapes of generator and discriminator.
    pub(super) fn networks(&self, organs: usize) -> (GeneratorConfig, UnetConfig) {
        let generator = GeneratorConfig {
            widths: self.widths.clone(),
            organs,
            spread_hu: self.spread_hu,
            contrast_over: self.contrast_over,
        };
        let discriminator = UnetConfig {
            in_channels: 1,
            out_channels: 3,
            widths: self.discriminator_widths.clone(),
            condition: 0,
        };
        (generator, discriminator)
    }

    /// Checks every value that can be checked without a store.
    ///
    /// # Errors
    /// [`LearnError::Config`] names the key and its range.
    pub fn check(&self) -> Result<(), LearnError> {
        let section = Section("synthesizer");
        let PublishedSettings { width, adversarial } = self.published;
        section.check("published.width", (1..=64).contains(&width), "1 to 64", width)?;
        section.check(
            "published.adversarial",
            (0.0..=100.0).contains(&adversarial),
            "0 to 100",
            adversarial,
        )?;
        section.widths("widths", &self.widths, MAX_CUBE_LEVELS)?;
        section.widths("discriminator_widths", &self.discriminator_widths, MAX_CUBE_LEVELS)?;
        let (generator, discriminator) = self.networks(1);
        for (key, shape) in [
            ("widths", Architecture::Generator(generator)),
            ("discriminator_widths", Architecture::Unet(discriminator)),
        ] {
            let parameters = shape.parameters();
            let expected = format!("a network of at most {MAX_PARAMETERS} parameters");
            section.check(key, parameters <= MAX_PARAMETERS, &expected, parameters)?;
        }
        section.max_cube(self.max_cube)?;
        section.count("steps", self.steps)?;
        section.count("checkpoint_every", self.checkpoint_every)?;
        let lesions = self.held_out_lesions;
        let most = MAX_HELD_OUT_LESIONS.min(MAX_HELD_OUT_VOXELS / self.max_cube.pow(3));
        let expected = format!("1 to {most} with cubes of up to {} voxels a side", self.max_cube);
        section.check("held_out_lesions", (1..=most).contains(&lesions), &expected, lesions)?;
        section.shares("cube_mix", &self.cube_mix)?;
        section.split(&self.split)?;
        section.optimizer("optimizer", &self.optimizer, self.steps)?;
        section.optimizer("discriminator_optimizer", &self.discriminator_optimizer, self.steps)?;
        section.unit("broad_contrast", self.broad_contrast)?;
        section.unit("recall_margin", self.recall_margin)?;
        section.check(
            "least_recall",
            (0.05..=0.95).contains(&self.least_recall),
            "0.05 to 0.95",
            self.least_recall,
        )?;
        section.check(
            "diversity",
            (0.0..=2.0).contains(&self.diversity),
            "0 to 2",
            self.diversity,
        )?;
        section.check("r1", (0.0..=1000.0).contains(&self.r1), "0 to 1000", self.r1)?;
        self.guard.check(&section)?;
        self.look.check(&section)?;
        self.loss.check(&section)?;
        for (field, ok, expected, got) in self.form.ranges() {
            section.check(&format!("form.{field}"), ok, expected, got)?;
        }
        let spread = self.spread_hu;
        section.check("spread_hu", (0.0..=1000.0).contains(&spread), "0 to 1000", spread)
    }
}

/// What stage 2 ended with.
#[derive(Clone, Debug, Serialize)]
pub struct SynthesizerReport {
    /// Optimizer steps.
    pub steps: u64,
    /// Mean wall time of a step in s; absent where an earlier run made them all.
    pub step_seconds: Option<f64>,
    /// Share of that time in which a step waited for its data; absent likewise.
    pub data_wait: Option<f64>,
    /// Parameters of generator and discriminator.
    pub parameters: [u64; 2],
    /// Training cases.
    pub training_cases: usize,
    /// Whether hosts for the figures were held out; where the split holds nothing out, training hosts stand in.
    pub hosts_held_out: bool,
    /// Lesions of the trained generator.
    pub trained: PaintingScore,
    /// The same lesions by the generator before training.
    pub untrained: PaintingScore,
    /// Measures of the last step.
    pub last_step: Metrics,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let refused = |key: &str, change: &dyn Fn(&mut SynthesizerConfig)| {
            let mut config = SynthesizerConfig::default();
            change(&mut config);
            let error = config.check().unwrap_err().to_string();
            assert!(error.starts_with(key), "{key}: {error}");
        };
        SynthesizerConfig::default().check().unwrap();
        refused("synthesizer.loss.recall", &|config| config.loss.recall = -1.0);
        refused("synthesizer.look.noise_hu", &|config| config.look.noise_hu = -12.0);
        refused("synthesizer.look.flip", &|config| config.look.flip = [0.0, 2.0, 0.0]);
        refused("synthesizer.form.edge_mm", &|config| config.form.edge_mm = f64::NAN);
    }
}
