//! Stage 1: the critic, a segmentor on lesion-centred cubes whose scores on held-out real lesions calibrate the gate.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::augment::{Look, LookSettings};
use super::calibrate::{LEAST_LESIONS, RealScore, calibrate, judge_real};
use super::check::{MAX_CUBE_LEVELS, Section};
use super::choice::{NetworkChoice, architecture, check_sides, fresh};
use super::cubes::{Catalogue, Cube, normalise, read_cube, side_of, stack, targets};
use super::fit::{FitSettings, Fitted, Job, Metrics, Trainee, fit, forget_report, remove_if_there};
use super::held_out::{dice_metrics, held_out_scores};
use super::inner::{forget_inner, inner_folds, train_inner};
use super::learner::{Course, Learner};
use super::models::{training_of, write_report};
use super::validation::{ValidationSettings, Validator, mean_dice};
use super::{LearnError, OptimizerSettings, Split};
use crate::checkpoint::{
    Architecture, Calibration, FORMAT_VERSION, ModelManifest, Precision, Role, Weights, WeightsFile, fill_network,
    inner_folder, save_model,
};
use crate::digest::Digest;
use crate::evaluate::{HeldOut, HeldOutSettings};
use crate::nn::{Adapter, CubeSides, LossForm, Network, deep_supervision_loss};
use crate::rng::{Purpose, Rng};
use crate::sampler::Centre;
use crate::store::CaseKind;
use crate::volume::{Plan, SizeClass};

/// Stage 1's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CriticConfig {
    /// Channels of the plain U-Net at each resolution, finest first.
    pub widths: Vec<usize>,
    /// Another network instead.
    pub network: Option<NetworkChoice>,
    /// Optimizer steps.
    pub steps: u64,
    /// Voxels of a step: as many cubes as fit, 1 to 64.
    pub voxels_per_step: usize,
    /// Shares of the size classes whose cubes a step uses.
    pub cube_mix: BTreeMap<SizeClass, f64>,
    /// Shares of what a step's cubes are centred on.
    pub centres: BTreeMap<Centre, f64>,
    /// Longest side of a cube in voxels, a multiple of 16.
    pub max_cube: usize,
    /// The seed of weights and choices.
    pub seed: u64,
    /// Which cases are held out.
    pub split: Split,
    /// Folds of the training cases for which another critic is trained on the others, so that the gate has one for every host that
    /// did not see it, and thresholds from all of their lesions; 0 for none, and each costs as much as the critic itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub inner_folds: usize,
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
    /// How the run is watched on held-out cases.
    pub validation: ValidationSettings,
}

impl Default for CriticConfig {
    fn default() -> Self {
        Self {
            widths: vec![16, 32, 64, 128],
            network: None,
            steps: 2000,
            voxels_per_step: 2 * 48 * 48 * 48,
            cube_mix: default_cube_mix(),
            centres: BTreeMap::from([(Centre::Tumour, 0.5), (Centre::Organ, 0.25), (Centre::Anywhere, 0.25)]),
            max_cube: 96,
            seed: 1,
            split: Split::default(),
            inner_folds: 0,
            loss: LossForm::default(),
            optimizer: OptimizerSettings::default(),
            look: LookSettings::default(),
            checkpoint_every: 100,
            precision: Precision::default(),
            held_out: HeldOutSettings::default(),
            validation: ValidationSettings::default(),
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_zero(folds: &usize) -> bool {
    *folds == 0
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
        section.shares("centres", &self.centres)?;
        section.split(&self.split)?;
        self.validation.check(&section, self.steps)?;
        let inner = self.inner_folds;
        section.check(
            "inner_folds",
            inner == 0 || (2..=20).contains(&inner),
            "0 or 2 to 20",
            inner,
        )?;
        section.unit("loss.balance", self.loss.balance)?;
        section.optimizer("optimizer", &self.optimizer, self.steps)?;
        self.look.check(&section)?;
        let sides: Vec<[usize; 3]> = CubeSides::up_to(self.max_cube).all().map(|side| [side; 3]).to_vec();
        // How many classes there are changes nothing about what can be built.
        check_sides((&section, "max_cube"), &self.architecture(2), &sides)?;
        section.held_out(&self.held_out, self.widths.len())
    }

    fn course(&self) -> Course<'_> {
        Course {
            optimizer: &self.optimizer,
            steps: self.steps,
            seed: self.seed,
        }
    }

    fn architecture(&self, classes: usize) -> Architecture {
        architecture(self.network.as_ref(), &self.widths, classes)
    }
}

/// What stage 1 ended with.
#[derive(Clone, Debug, Serialize)]
pub struct CriticReport {
    /// Optimizer steps made.
    pub steps: u64,
    /// Best validation score and the step after which it was reached, where the run was watched.
    pub best: Option<(f32, u64)>,
    /// Mean wall time of a step in s; absent where an earlier run made them all.
    pub step_seconds: Option<f64>,
    /// Share of that time in which a step waited for its data; absent likewise.
    pub data_wait: Option<f64>,
    /// Number of parameters.
    pub parameters: u64,
    /// Training cases.
    pub training_cases: usize,
    /// Scores of the held-out cases.
    pub held_out: HeldOut,
    /// Real lesions that calibrated the gate: held-out ones, and those of training cases that inner critics judge.
    pub calibration_lesions: usize,
    /// The gate's thresholds, and the levels from which tissue is suspect.
    pub calibration: Calibration,
    /// Measures of the last step.
    pub last_step: Metrics,
}

struct CriticTrainee<'a> {
    config: &'a CriticConfig,
    catalogue: Catalogue<'a>,
    labelled: Vec<usize>,
    plan: Plan,
    learner: Learner<'a>,
}

impl CriticTrainee<'_> {
    /// Returns a step's cubes.
    fn batch(&self, step: u64) -> Result<Vec<Cube>, LearnError> {
        let mut rng = Rng::keyed(self.config.seed, step, 0, Purpose::Training);
        let shares: Vec<f64> = SizeClass::ALL
            .iter()
            .map(|size| self.config.cube_mix.get(size).copied().unwrap_or(0.0))
            .collect();
        let size = SizeClass::ALL[rng.weighted(&shares).unwrap_or(0)];
        let side = side_of(size, self.config.max_cube);
        let count = (self.config.voxels_per_step / side.pow(3)).clamp(1, 64);
        // One draw for all cubes: each step has each kind as often as its share says, give or take one.
        let turn = rng.uniform();
        (0..count)
            .map(|slot| {
                let mut rng = Rng::keyed(self.config.seed, step, slot as u64 + 1, Purpose::Training);
                let centre = self.centre((slot as f64 + turn) / count as f64);
                self.cube(&mut rng, centre, size, side)
            })
            .collect()
    }

    /// Returns the kind of centre whose share a number from 0 to 1 falls into.
    fn centre(&self, at: f64) -> Centre {
        let mut left = at * self.config.centres.values().sum::<f64>();
        let falls_here = |(_, share): &(&Centre, &f64)| {
            left -= **share;
            left < 0.0
        };
        let found = self.config.centres.iter().find(falls_here);
        found.map_or(Centre::Anywhere, |(centre, _)| *centre)
    }

    fn cube(&self, rng: &mut Rng, kind: Centre, size: SizeClass, side: usize) -> Result<Cube, LearnError> {
        let anywhere = |rng: &mut Rng| {
            let case = self.labelled[rng.below(self.labelled.len())];
            let shape = self.catalogue.record(case).grid.shape;
            (case, shape.map(|n| rng.below(n.max(1)) as i64))
        };
        let (case, centre) = match kind {
            Centre::Tumour => self
                .catalogue
                .draw_tumour(rng, &[size])
                .map(|(case, _, t)| (case, t.centre)),
            Centre::Organ => match self.catalogue.draw_host(rng, true) {
                Some((case, organ)) => {
                    let place = self.catalogue.draw_place(rng, case, organ, 0.0)?;
                    place.map(|centre| (case, centre))
                }
                None => None,
            },
            Centre::Anywhere => None,
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
        let began = Instant::now();
        let cubes = self.batch(step)?;
        self.learner.waited += began.elapsed();
        let images = stack(cubes.iter().map(|cube| &cube.image), &self.learner.device);
        let targets = targets(self.catalogue.cases, &cubes)?;
        let images = normalise(images, &self.plan.window_hu);
        let loss = deep_supervision_loss(self.learner.net.forward_deep(images), &targets, self.config.loss);
        self.learner.learn(step, &loss)
    }

    fn state(&self) -> Weights {
        self.learner.state()
    }

    fn restore(&mut self, state: Weights, steps: u64) -> Result<(), LearnError> {
        self.learner.restore(&state, steps)
    }

    fn model(&self) -> Weights {
        self.learner.model()
    }

    fn score(&mut self, _steps: u64, stop: &dyn Fn() -> bool) -> Result<Option<f64>, LearnError> {
        Ok(mean_dice(&self.learner.score(stop)?))
    }

    fn data_wait(&self) -> Duration {
        self.learner.waited
    }
}

/// Trains the critic, scores it on held-out cases, calibrates the gate and writes `critic.safetensors`, `critic.json`
/// and `critic.report.json`; those of inner folds into `inner-0`, `inner-1`, ...
///
/// # Errors
/// [`LearnError`] names the key, the case or the file.
pub fn train_critic(config: &CriticConfig, job: &mut Job) -> Result<CriticReport, LearnError> {
    config.check()?;
    Section("critic").tolerance(&config.held_out, job.cases.plan())?;
    let (training, held_out) = config.split.divide(job.cases)?;
    let held_out_cases = (job.cases, held_out.as_slice());
    config.validation.check_cases(&Section("critic"), held_out_cases)?;
    let labelled: Vec<usize> = training
        .into_iter()
        .filter(|case| job.cases.records()[*case].kind == CaseKind::Labelled)
        .collect();
    if labelled.is_empty() {
        return Err(LearnError::Data(
            "the critic needs labelled cases that are not held out".into(),
        ));
    }
    let inner = inner_folds(config, job.cases, &labelled)?;
    if !job.resume {
        forget_report(job.out, "critic")?;
        if config.inner_folds > 0 || job.out.join(inner_folder(0)).exists() {
            // Without its manifest there is no critic: an old one would judge beside the new ones of inner folds, or without its own.
            remove_if_there(&job.out.join("critic.json"))?;
        }
        forget_inner(job.out, 0)?;
    }
    let trained = train_on(config, job, &labelled, &held_out)?;
    job.progress.on_note("judging real lesions to calibrate the gate");
    let mut scores = trained.judge(config, job, &held_out)?;
    scores.extend(train_inner(config, job, &inner)?);
    let calibration = calibrate(&scores);
    job.progress.on_note(&calibrated_on(&scores, job.cases.plan()));
    let report = CriticReport {
        steps: trained.fitted.steps,
        best: trained.fitted.best,
        step_seconds: trained.fitted.step_seconds,
        data_wait: trained.fitted.data_wait,
        parameters: trained.architecture.parameters(),
        training_cases: labelled.len(),
        held_out: held_out_scores((&trained.net, trained.fitted.steps), job, &held_out, &config.held_out)?,
        calibration_lesions: scores.len(),
        calibration: calibration.clone(),
        last_step: trained.fitted.last_step.clone(),
    };
    let metrics = dice_metrics(&report.held_out);
    // Those of an earlier run with more folds are not this critic's.
    forget_inner(job.out, config.inner_folds)?;
    trained.save(config, job, (&labelled, metrics), Some(calibration))?;
    write_report(job.out, "critic", &report)?;
    Ok(report)
}

/// Says what the scored lesions allow.
fn calibrated_on(scores: &[RealScore], plan: &Plan) -> String {
    if scores.is_empty() {
        return "no real lesion calibrates the gate, which gate.rule = calibrated needs: hold cases out (critic.split), or train critics of \
                inner folds (critic.inner_folds)"
            .into();
    }
    let organs = plan.labels.organs();
    let count = |name: &str| scores.iter().filter(|score| score.organ == name).count();
    let few: Vec<&str> = (organs.iter().map(|organ| organ.name.as_str()))
        .filter(|name| count(name) < LEAST_LESIONS)
        .collect();
    let total = scores.len();
    if few.is_empty() {
        return format!("calibrated on {total} real lesions");
    }
    format!(
        "calibrated on {total} real lesions, fewer than {LEAST_LESIONS} of {}: there all tissue of unlabelled hosts is suspect. Critics of inner \
         folds (critic.inner_folds) judge the lesions of training cases, too",
        few.join(", ")
    )
}

/// A critic that has learnt.
pub(super) struct Trained {
    architecture: Architecture,
    net: Network,
    weights: Weights,
    fitted: Fitted,
}

/// Trains a critic on labelled cases, watched on others.
pub(super) fn train_on(
    config: &CriticConfig,
    job: &mut Job,
    labelled: &[usize],
    held_out: &[usize],
) -> Result<Trained, LearnError> {
    let plan = job.cases.plan().clone();
    let architecture = config.architecture(plan.labels.class_count());
    let mut trainee = CriticTrainee {
        config,
        catalogue: Catalogue::new(job.cases, labelled),
        labelled: labelled.to_vec(),
        plan,
        learner: Learner::new(
            job,
            &architecture,
            &config.course(),
            Validator::new(job, held_out, (&config.held_out, config.validation.cases)),
        ),
    };
    let settings = FitSettings {
        stage: "critic",
        steps: config.steps,
        checkpoint_every: config.checkpoint_every,
        identity: Digest::of_json(&("critic", config, job.cases.snapshot(), labelled, job.dtype)),
        out: job.out,
        resume: job.resume,
        validation: &config.validation,
    };
    let mut fitted = fit(&mut trainee, &settings, job.progress)?;
    let weights = config.precision.rounded(std::mem::take(&mut fitted.model));
    let net = fill_network(fresh(&architecture, job.device, 0), weights.clone())?.with_compute_dtype(job.dtype);
    Ok(Trained {
        architecture,
        net,
        weights,
        fitted,
    })
}

impl Trained {
    /// Scores every real lesion of cases that it did not learn from.
    pub(super) fn judge(
        &self,
        config: &CriticConfig,
        job: &Job,
        cases: &[usize],
    ) -> Result<Vec<RealScore>, LearnError> {
        // The state of the last step is saved, so that a resumed run comes back here.
        let go_on = || match job.progress.should_stop() {
            true => Err(LearnError::Stopped {
                step: self.fitted.steps,
            }),
            false => Ok(()),
        };
        let catalogue = Catalogue::new(job.cases, cases);
        judge_real((&self.net, job.device), &catalogue, config.max_cube, go_on)
    }

    pub(super) fn save(
        self,
        config: &CriticConfig,
        job: &Job,
        (learnt, metrics): (&[usize], Metrics),
        calibration: Option<Calibration>,
    ) -> Result<(), LearnError> {
        let manifest = ModelManifest {
            format_version: FORMAT_VERSION,
            role: Role::Critic,
            architecture: self.architecture,
            plan: job.cases.plan().clone(),
            cubes: SizeClass::ALL.map(|size| side_of(size, config.max_cube)).to_vec(),
            provenance_known: true,
            training: Some(training_of(
                job.cases,
                learnt,
                config,
                (self.fitted.model_steps, config.seed),
                metrics,
            )),
            calibration,
            realism: None,
            adapter: Adapter::default(),
            imported: None,
            weights: WeightsFile::default(),
        };
        save_model(job.out, manifest, &self.weights, config.precision)?;
        Ok(())
    }
}
