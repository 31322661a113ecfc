//! Stage 1: the critic, a segmentor on lesion-centred cubes whose scores on held-out real lesions calibrate the gate.

use std::collections::BTreeMap;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::augment::{Look, LookSettings};
use super::calibrate::{calibrate, judge_real};
use super::check::{MAX_CUBE_LEVELS, Section};
use super::cubes::{Catalogue, Cube, normalise, read_cube, side_of, stack, targets};
use super::fit::{FitSettings, Job, Metrics, Trainee, fit};
use super::models::{check_finite, dice_metrics, held_out_scores, training_of, write_report};
use super::{LearnError, Optimizer, OptimizerSettings, Split};
use crate::checkpoint::{
    Architecture, Calibration, FORMAT_VERSION, ModelManifest, Precision, Role, Weights, WeightsFile, collect, fill,
    save_model,
};
use crate::digest::Digest;
use crate::evaluate::{HeldOut, HeldOutSettings};
use crate::nn::{Adapter, LossForm, Unet, UnetConfig, marginal_loss};
use crate::rng::{Purpose, Rng};
use crate::store::CaseKind;
use crate::volume::{Plan, SizeClass};

/// Stage 1's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CriticConfig {
    /// Channels at each resolution, finest first.
    pub widths: Vec<usize>,
    /// Optimizer steps.
    pub steps: u64,
    /// Voxels of a step: as many cubes as fit, at least one.
    pub voxels_per_step: usize,
    /// Shares of the size classes whose cubes a step uses.
    pub cube_mix: BTreeMap<SizeClass, f64>,
    /// Longest side of a cube in voxels, a multiple of 16.
    pub max_cube: usize,
    /// The seed of weights and choices.
    pub seed: u64,
    /// Which cases are held out.
    pub split: Split,
    /// What is minimised.
    pub loss: LossForm,
    /// The optimizer.
    pub optimizer: OptimizerSettings,
    /// How looks vary.
    pub look: LookSettings,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// How the final weights are stored.
    pub precision: Precision,
    /// How held-out cases are scored.
    pub held_out: HeldOutSettings,
}

impl Default for CriticConfig {
    fn default() -> Self {
        Self {
            widths: vec![16, 32, 64, 128],
            steps: 2000,
            voxels_per_step: 2 * 48 * 48 * 48,
            cube_mix: default_cube_mix(),
            max_cube: 96,
            seed: 1,
            split: Split::default(),
            loss: LossForm::default(),
            optimizer: OptimizerSettings::default(),
            look: LookSettings::default(),
            checkpoint_every: 100,
            precision: Precision::default(),
            held_out: HeldOutSettings::default(),
        }
    }
}

/// Returns the shares of the size classes where a configuration does not say.
pub(super) fn default_cube_mix() -> BTreeMap<SizeClass, f64> {
    let shares = [0.3, 0.4, 0.25, 0.05];
    SizeClass::ALL.into_iter().zip(shares).collect()
}

impl CriticConfig {
    /// Checks every value that can be checked without a store.
    ///
    /// # Errors
    /// [`LearnError::Config`] names the key and its range.
    pub fn check(&self) -> Result<(), LearnError> {
        let section = Section("critic");
        section.widths("widths", &self.widths, MAX_CUBE_LEVELS)?;
        section.max_cube(self.max_cube)?;
        section.count("steps", self.steps)?;
        section.count("checkpoint_every", self.checkpoint_every)?;
        section.shares("cube_mix", &self.cube_mix)?;
        section.split(&self.split)?;
        section.unit("loss.balance", self.loss.balance)?;
        section.optimizer("optimizer", &self.optimizer)?;
        section.held_out(&self.held_out, self.widths.len())
    }
}

/// What stage 1 ended with.
#[derive(Clone, Debug, Serialize)]
pub struct CriticReport {
    /// Optimizer steps.
    pub steps: u64,
    /// Number of parameters.
    pub parameters: u64,
    /// Training cases.
    pub training_cases: usize,
    /// Scores of the held-out cases.
    pub held_out: HeldOut,
    /// Held-out real lesions that calibrated the gate.
    pub calibration_lesions: usize,
    /// The gate's thresholds.
    pub calibration: Calibration,
    /// Measures of the last step.
    pub last_step: Metrics,
}

struct CriticTrainee<'a> {
    config: &'a CriticConfig,
    catalogue: Catalogue<'a>,
    labelled: Vec<usize>,
    plan: Plan,
    /// With gradients.
    device: Device,
    net: Unet,
    optimizer: Optimizer,
    last: Metrics,
}

impl CriticTrainee<'_> {
    /// Returns a step's cubes: about half on real tumours, a quarter on healthy organ, the rest anywhere.
    fn batch(&self, step: u64) -> Result<Vec<Cube>, LearnError> {
        let mut rng = Rng::keyed(self.config.seed, step, 0, Purpose::Training);
        let shares: Vec<f64> = SizeClass::ALL
            .iter()
            .map(|size| self.config.cube_mix.get(size).copied().unwrap_or(0.0))
            .collect();
        let size = SizeClass::ALL[rng.weighted(&shares).unwrap_or(0)];
        let side = side_of(size, self.config.max_cube);
        let count = (self.config.voxels_per_step / side.pow(3)).clamp(1, 64);
        // The kinds take turns from a random start, so that even batches of one see all of them.
        let turn = rng.below(4);
        (0..count)
            .map(|slot| {
                let mut rng = Rng::keyed(self.config.seed, step, slot as u64 + 1, Purpose::Training);
                self.cube(&mut rng, (slot + turn) % 4, size, side)
            })
            .collect()
    }

    fn cube(&self, rng: &mut Rng, kind: usize, size: SizeClass, side: usize) -> Result<Cube, LearnError> {
        let anywhere = |rng: &mut Rng| {
            let case = self.labelled[rng.below(self.labelled.len())];
            let shape = self.catalogue.record(case).grid.shape;
            (case, shape.map(|n| rng.below(n.max(1)) as i64))
        };
        let (case, centre) = match kind {
            0 | 1 => self
                .catalogue
                .draw_tumour(rng, &[size])
                .map(|(case, _, t)| (case, t.centre)),
            2 => match self.catalogue.draw_host(rng, true) {
                Some((case, organ)) => {
                    let place = self.catalogue.draw_place(rng, case, organ, 0.0)?;
                    place.map(|centre| (case, centre))
                }
                None => None,
            },
            _ => None,
        }
        .unwrap_or_else(|| anywhere(rng));
        let reach = side as f64 / 6.0;
        let centre = centre.map(|v| v + libm::round(rng.range(-reach, reach)) as i64);
        let look = Look::draw(rng, &self.config.look);
        read_cube(self.catalogue.cases, case, centre, side, &look)
    }
}

impl Trainee for CriticTrainee<'_> {
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError> {
        let cubes = self.batch(step)?;
        let images = stack(cubes.iter().map(|cube| &cube.image), &self.device);
        let targets = targets(self.catalogue.cases, &cubes)?;
        let loss = marginal_loss(
            self.net.forward(normalise(images, &self.plan.window_hu), None),
            &targets,
            self.config.loss,
        );
        let value = f64::from(loss.clone().into_scalar::<f32>());
        check_finite(step, "loss", value)?;
        let rate = self.config.optimizer.rate(step, self.config.steps);
        let (net, norm) = self.optimizer.step(self.net.clone(), &loss.backward(), rate);
        check_finite(step, "gradient_norm", norm)?;
        self.net = net;
        self.last = Metrics::from([
            ("loss".into(), value),
            ("gradient_norm".into(), norm),
            ("learning_rate".into(), rate),
        ]);
        Ok(self.last.clone())
    }

    fn state(&self) -> Weights {
        let mut state = self.optimizer.state("optimizer");
        state.extend(
            collect(&self.net)
                .into_iter()
                .map(|(name, w)| (format!("net/{name}"), w)),
        );
        state
    }

    fn restore(&mut self, state: Weights, steps: u64) -> Result<(), LearnError> {
        self.optimizer.restore("optimizer", &state, steps, &self.device);
        self.net = fill(self.net.clone(), super::models::under(&state, "net/"))?;
        Ok(())
    }
}

/// Trains the critic, scores it on held-out cases, calibrates the gate and writes `critic.safetensors`, `critic.json`
/// and `critic.report.json`.
///
/// # Errors
/// [`LearnError`] names the key, the case or the file.
pub fn train_critic(config: &CriticConfig, job: &mut Job) -> Result<CriticReport, LearnError> {
    config.check()?;
    let (training, held_out) = config.split.divide(job.cases)?;
    let labelled: Vec<usize> = training
        .into_iter()
        .filter(|case| job.cases.records()[*case].kind == CaseKind::Labelled)
        .collect();
    if labelled.is_empty() {
        return Err(LearnError::Data(
            "the critic needs labelled cases that are not held out".into(),
        ));
    }
    let plan = job.cases.plan().clone();
    let unet = UnetConfig {
        in_channels: 1,
        out_channels: plan.labels.class_count(),
        widths: config.widths.clone(),
        condition: 0,
    };
    let device = job.device.clone().autodiff();
    let mut trainee = CriticTrainee {
        config,
        catalogue: Catalogue::new(job.cases, &labelled),
        labelled: labelled.clone(),
        plan: plan.clone(),
        net: unet.init(&device, config.seed).with_compute_dtype(job.dtype),
        optimizer: Optimizer::new(config.optimizer.clone()),
        device,
        last: Metrics::new(),
    };
    let settings = FitSettings {
        stage: "critic",
        steps: config.steps,
        checkpoint_every: config.checkpoint_every,
        identity: Digest::of_json(&("critic", config, job.cases.snapshot(), &labelled, job.dtype)),
        out: job.out,
        resume: job.resume,
    };
    fit(&mut trainee, &settings, job.progress)?;
    let last_step = trainee.last;
    let weights = config
        .precision
        .rounded(collect(&trainee.optimizer.averaged(trainee.net)));
    let net = fill(unet.init(job.device, 0), weights.clone())?.with_compute_dtype(job.dtype);

    job.progress.on_note("scoring held-out cases");
    let scores = judge_real(&net, &Catalogue::new(job.cases, &held_out), config.max_cube, job.device)?;
    let calibration = calibrate(&scores);
    let report = CriticReport {
        steps: config.steps,
        parameters: Architecture::Unet(unet.clone()).parameters(),
        training_cases: labelled.len(),
        held_out: held_out_scores(&net, job, &held_out, &config.held_out)?,
        calibration_lesions: scores.len(),
        calibration: calibration.clone(),
        last_step,
    };
    let manifest = ModelManifest {
        format_version: FORMAT_VERSION,
        role: Role::Critic,
        architecture: Architecture::Unet(unet),
        plan,
        cubes: SizeClass::ALL.map(|size| side_of(size, config.max_cube)).to_vec(),
        provenance_known: true,
        training: Some(training_of(
            job.cases,
            &labelled,
            config,
            (config.steps, config.seed),
            dice_metrics(&report.held_out),
        )),
        calibration: Some(calibration),
        adapter: Adapter::default(),
        imported: None,
        weights: WeightsFile::default(),
    };
    save_model(job.out, manifest, &weights, config.precision)?;
    write_report(job.out, "critic", &report)?;
    Ok(report)
}
