//! Stage 2: the generator against the frozen critic (would the lesion be recognised?) and a voxel-wise discriminator
//! (does it look real?).

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;

use super::cubes::Catalogue;
use super::fit::{FitSettings, Fitted, Job, Progress};
use super::models::{copy_critic, save_beside, training_of, write_report};
use super::painting::Painter;
use super::synthesizer_settings::{Method, SynthesizerConfig, SynthesizerReport};
use super::texture::Textures;
use super::{LearnError, PaintingScore, ValidationSettings};
use crate::checkpoint::{Architecture, Bundle, ModelManifest, Provenance, Realism, Role, Weights, load_manifest};
use crate::digest::Digest;
use crate::kernel::ComputeDtype;
use crate::store::Cases;
use crate::stream::seen_cases;
use crate::volume::SizeClass;

/// Trains generator and discriminator against the critic of a folder, measures the generator on held-out hosts, and
/// writes a complete bundle (the critic is copied) and `synthesizer.report.json`.
///
/// # Errors
/// [`LearnError`] names the key, the case or the file.
pub fn train_synthesizer(
    config: &SynthesizerConfig,
    critic_folder: &Path,
    job: &mut Job,
) -> Result<SynthesizerReport, LearnError> {
    config.check()?;
    let critic_manifest = load_manifest(critic_folder, Role::Critic)?;
    let critic = Bundle::load_critic(critic_folder, job.device)?.with_compute_dtype(job.dtype);
    critic.check_companion(job.cases.plan(), config.max_cube)?;
    let (training, held_out) = config.split.divide(job.cases)?;
    let stage = StageTwo {
        config,
        critic: &critic,
        training: &training,
        hosts: if held_out.is_empty() { &training } else { &held_out },
        cases: job.cases,
        out: job.out,
        resume: job.resume,
        device: job.device,
        dtype: job.dtype,
        validation: ValidationSettings::default(),
    };
    let made = match config.method {
        Method::Conditional => stage.conditional(job.progress)?,
        Method::Published => stage.published(job.progress)?,
    };
    let report = SynthesizerReport {
        steps: config.steps,
        parameters: made.parameters,
        training_cases: training.len(),
        hosts_held_out: are_unseen(&held_out, job.cases, &critic_manifest),
        trained: made.trained,
        untrained: made.untrained,
        step_seconds: made.fitted.step_seconds,
        data_wait: made.fitted.data_wait,
        last_step: made.fitted.last_step,
    };
    let run = (config.steps, config.seed);
    let record = training_of(job.cases, &training, config, run, report.trained.metrics());
    save_beside(config, &critic_manifest, (made.models, made.realism, record), job.out)?;
    copy_critic(critic_folder, job.out)?;
    write_report(job.out, "synthesizer", &report)?;
    Ok(report)
}

/// Tells whether there are held-out cases, and the critic has seen none of them either: its split may be another.
fn are_unseen(held_out: &[usize], cases: &dyn Cases, critic: &ModelManifest) -> bool {
    let seen = seen_cases(cases, &Provenance::of(&[critic]));
    !held_out.is_empty() && held_out.iter().all(|case| !seen[*case])
}

/// What stage 2 works with.
pub(super) struct StageTwo<'a> {
    pub config: &'a SynthesizerConfig,
    pub critic: &'a Bundle,
    /// Cases that it learns from.
    pub training: &'a [usize],
    /// Cases whose organs the report's lesions are painted into.
    pub hosts: &'a [usize],
    pub cases: &'a dyn Cases,
    pub out: &'a Path,
    pub resume: bool,
    pub device: &'a Device,
    pub dtype: ComputeDtype,
    /// The guards watch this stage; what its lesions are worth is measured at the end.
    pub validation: ValidationSettings,
}

/// What a method ends with.
pub(super) struct Made {
    pub models: Vec<(Role, Architecture, Weights)>,
    /// Parameters of generator and discriminator.
    pub parameters: [u64; 2],
    /// How real the discriminator finds real lesions that it did not learn from.
    pub realism: Option<Realism>,
    pub trained: PaintingScore,
    pub untrained: PaintingScore,
    /// The run; its model is among `models`.
    pub fitted: Fitted,
}

impl StageTwo<'_> {
    /// Returns what measures lesions in the hosts of the report.
    pub fn painter<'a>(&'a self, progress: &'a mut dyn Progress) -> Result<Painter<'a>, LearnError> {
        progress.on_note("painting lesions to measure them");
        let catalogue = Catalogue::new(self.cases, self.hosts);
        Ok(Painter {
            config: self.config,
            textures: Textures::measure(&catalogue, self.config.max_cube, self.device)?,
            catalogue,
            bundle: self.critic,
            device: self.device,
            progress,
        })
    }

    /// Says which sizes are asked for that no real tumour of an organ has.
    pub fn note_sizes(&self, catalogue: &Catalogue, progress: &mut dyn Progress) {
        let mut sizes = BTreeMap::<usize, Vec<SizeClass>>::new();
        for (_, organ, tumour) in catalogue.all_tumours() {
            let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
            sizes.entry(organ).or_default().push(size);
        }
        let is_asked = |size: &&SizeClass| self.config.cube_mix.get(size).is_some_and(|share| *share > 0.0);
        let asked: Vec<&SizeClass> = SizeClass::ALL.iter().filter(is_asked).collect();
        let absent: Vec<String> = sizes
            .iter()
            .flat_map(|(organ, sizes)| {
                let absent = asked.iter().filter(|size| !sizes.contains(size));
                absent.map(|size| format!("{} ({})", size.name(), catalogue.organs[*organ].name))
            })
            .collect();
        if !absent.is_empty() {
            progress.on_note(&format!(
                "no real tumour that is learnt from is {}: in steps of that size the discriminator sees larger or smaller ones instead, and may go by \
                 size; synthesizer.cube_mix without it asks for no such steps",
                absent.join(" or ")
            ));
        }
    }

    /// Tells whether the hosts of the report, and their real lesions, are none that it learns from.
    pub fn hosts_are_held_out(&self) -> bool {
        !self.hosts.iter().any(|case| self.training.contains(case))
    }

    /// Returns how a run of this stage is saved and resumed.
    pub fn fit_settings(&self) -> FitSettings<'_> {
        let identity = (
            "synthesizer",
            self.config,
            self.cases.snapshot(),
            self.critic.hash,
            self.training,
            self.dtype,
        );
        FitSettings {
            stage: "synthesizer",
            steps: self.config.steps,
            checkpoint_every: self.config.checkpoint_every,
            identity: Digest::of_json(&identity),
            out: self.out,
            resume: self.resume,
            validation: &self.validation,
        }
    }
}
