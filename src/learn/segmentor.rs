//! Stage 3: the segmentor, on the patches that any trainer would stream: real ones and gated synthetic ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::augment::SlabMix;
use super::check::Section;
use super::choice::{NetworkChoice, architecture, check_sides, filled_voxels, fresh};
use super::cubes::{normalise, stack};
use super::fit::{FitSettings, Job, Metrics, Trainee, fit, forget};
use super::held_out::{dice_metrics, held_out_scores};
use super::learner::{Course, Learner};
use super::models::{training_of, write_report};
use super::steering::{Mix, Steering, SteeringSettings};
use super::validation::{ValidationSettings, Validator, mean_dice};
use super::{LearnError, OptimizerSettings, Split};
use crate::checkpoint::{
    Architecture, FORMAT_VERSION, ModelManifest, Precision, Role, Training, Weights, WeightsFile, check_plan,
    fill_network, save_model,
};
use crate::digest::Digest;
use crate::evaluate::{HeldOut, HeldOutSettings};
use crate::nn::{Adapter, LossForm, Targets, deep_supervision_loss};
use crate::rng::{Purpose, Rng};
use crate::store::Cases;
use crate::stream::delivery::{Delivery, Priority};
use crate::stream::patch::{Outcome, StreamedPatch};
use crate::stream::recipe::{Recipe, Selection};
use crate::stream::{PatchService, PatchStream, Resolved, StreamError, check_delivery, held_out_cases};
use crate::volume::{ClassSet, Plan};

/// The most voxels of a step, with those that fill sides up to what the network can halve: 128 patches of 128^3. What a device can hold
/// is less, and depends on the network.
const MAX_BATCH_VOXELS: u64 = 1 << 28;

/// Stage 3's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SegmentorConfig {
    /// Channels of the plain U-Net at each resolution, finest first.
    pub widths: Vec<usize>,
    /// Another network instead.
    pub network: Option<NetworkChoice>,
    /// Optimizer steps.
    pub steps: u64,
    /// Patches of a step.
    pub batch_size: u32,
    /// The seed of weights and slab mix.
    pub seed: u64,
    /// What is streamed; its `select.hold_out` cases are scored at the end.
    pub recipe: Recipe,
    /// Probability that a step exchanges slabs between its patches.
    pub slab_mix: f64,
    /// What is minimised.
    pub loss: LossForm,
    /// The optimizer.
    pub optimizer: OptimizerSettings,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// How the final weights are stored.
    pub precision: Precision,
    /// Which cases are held out, beside those that the recipe names: the fold of the models that gate the stream.
    pub split: Split,
    /// How held-out cases are scored.
    pub held_out: HeldOutSettings,
    /// How the run is watched on held-out cases.
    pub validation: ValidationSettings,
    /// Whether what is missed there is streamed more often.
    pub steering: SteeringSettings,
}

impl Default for SegmentorConfig {
    fn default() -> Self {
        Self {
            widths: vec![16, 32, 64, 128],
            network: None,
            steps: 2000,
            batch_size: 2,
            seed: 3,
            recipe: Recipe::default(),
            slab_mix: 0.0,
            loss: LossForm::default(),
            optimizer: OptimizerSettings::default(),
            checkpoint_every: 100,
            precision: Precision::default(),
            split: Split::default(),
            held_out: HeldOutSettings::default(),
            validation: ValidationSettings::default(),
            steering: SteeringSettings::default(),
        }
    }
}

/// What stage 3 ended with.
#[derive(Clone, Debug, Serialize)]
pub struct SegmentorReport {
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
    /// The streamed recipe's hash.
    pub recipe: Digest,
    /// Cases that could be streamed.
    pub training_cases: usize,
    /// Scores of the held-out cases.
    pub held_out: HeldOut,
    /// What was streamed instead of the recipe, where errors steered it.
    pub mixes: Vec<Mix>,
    /// Measures of the last step.
    pub last_step: Metrics,
}

struct SegmentorTrainee<'a> {
    config: &'a SegmentorConfig,
    service: &'a dyn PatchService,
    recipe: Arc<Resolved>,
    steering: Steering,
    plan: Plan,
    stream: Option<Reading>,
    learner: Learner<'a>,
}

/// An open stream.
struct Reading {
    /// The step it stands before.
    step: u64,
    /// The number of the mix that it holds.
    mix: u64,
    patches: Box<dyn PatchStream>,
}

impl SegmentorTrainee<'_> {
    /// Opens the stream of a step's mix.
    fn open(&self, step: u64) -> Result<Reading, LearnError> {
        let delivery = Delivery {
            from: step * u64::from(self.config.batch_size),
            count: Some(self.config.steps - step),
            batch_size: self.config.batch_size,
            priority: Priority::Training,
            ..Delivery::default()
        };
        let mix = self.steering.at(step);
        let recipe = match mix {
            Some(mix) => &self.service.resolve(self.with_models(mix.over(&self.recipe.recipe)))?,
            None => &self.recipe,
        };
        Ok(Reading {
            step,
            mix: mix.map_or(0, |mix| mix.number),
            patches: self.service.open(recipe, &delivery)?,
        })
    }

    /// Names the models that the run began with: a resolved recipe no longer does, and others may be active by now.
    fn with_models(&self, recipe: Recipe) -> Recipe {
        let bundle = self.recipe.bundle;
        Recipe {
            bundle: (bundle != Digest::default()).then(|| bundle.to_string()),
            ..recipe
        }
    }

    /// Returns a step's patches: those at its indices, whatever was read before.
    fn patches(&mut self, step: u64) -> Result<Vec<Arc<StreamedPatch>>, LearnError> {
        // The second round opens a stream where the first found none, or its end: an epoch's end is not the run's.
        let mix = self.steering.at(step).map_or(0, |mix| mix.number);
        for _ in 0..2 {
            if let Some(reading) = &mut self.stream
                && (reading.step, reading.mix) == (step, mix)
                && let Some(batch) = reading.patches.next_batch()
            {
                let batch = batch?;
                reading.step += 1;
                return Ok(batch.patches);
            }
            self.stream = Some(self.open(step)?);
        }
        Err(LearnError::Data(format!(
            "the stream ended before step {step} of {}",
            self.config.steps
        )))
    }

    fn loss(&self, step: u64, patches: &[Arc<StreamedPatch>]) -> burn::tensor::Tensor<1> {
        let mut images: Vec<_> = patches.iter().map(|patch| patch.image.mapv(f32::from)).collect();
        let classes = self.plan.labels.class_count();
        let all = ClassSet((1 << classes) - 1);
        // Marginal over what partly annotated cases leave open.
        let mut labels: Vec<_> = patches.iter().map(|patch| patch.admissible(all)).collect();
        let mut rng = Rng::keyed(self.config.seed, step, 0, Purpose::Training);
        if rng.chance(self.config.slab_mix) {
            let mix = SlabMix::draw(&mut rng, patches.len());
            (images, labels) = (mix.apply(&images), mix.apply(&labels));
        }
        let targets = Targets::new(labels.iter().flatten().copied().collect());
        let images = normalise(stack(images.iter(), &self.learner.device), &self.plan.window_hu);
        deep_supervision_loss(self.learner.net.forward_deep(images), &targets, self.config.loss)
    }
}

impl Trainee for SegmentorTrainee<'_> {
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError> {
        let began = Instant::now();
        let patches = self.patches(step)?;
        self.learner.waited += began.elapsed();
        let loss = self.loss(step, &patches);
        let mut measured = self.learner.learn(step, &loss)?;
        let is_synthetic = |outcome| matches!(outcome, Outcome::Accepted | Outcome::BestAfterK);
        let synthetic = patches.iter().filter(|patch| is_synthetic(patch.meta.outcome)).count();
        let share = synthetic as f64 / patches.len().max(1) as f64;
        measured.insert("synthetic_share".into(), share);
        Ok(measured)
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

    fn score(&mut self, steps: u64, stop: &dyn Fn() -> bool) -> Result<Option<f64>, LearnError> {
        let scores = self.learner.score(stop)?;
        self.steering.take(&scores, steps, self.config.batch_size)?;
        Ok(mean_dice(&scores))
    }

    fn data_wait(&self) -> Duration {
        self.learner.waited
    }
}

impl SegmentorConfig {
    /// Checks every value that can be checked without a store.
    ///
    /// # Errors
    /// [`LearnError::Config`] names the key and its range.
    pub fn check(&self) -> Result<(), LearnError> {
        let section = Section("segmentor");
        section.widths("widths", &self.widths, 7)?;
        section.count("steps", self.steps)?;
        section.count("batch_size", self.batch_size.into())?;
        section.count("checkpoint_every", self.checkpoint_every)?;
        section.unit("slab_mix", self.slab_mix)?;
        section.split(&self.split)?;
        self.validation.check(&section, self.steps)?;
        self.steering.check(&section, (self.validation.every, self.steps))?;
        section.unit("loss.balance", self.loss.balance)?;
        section.optimizer("optimizer", &self.optimizer, self.steps)?;
        section.held_out(&self.held_out, self.widths.len())?;
        self.recipe.validate().map_err(|error| LearnError::Config {
            key: format!("segmentor.recipe.{}", error.field),
            expected: error.expected,
            got: error.got,
        })
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

/// Returns the cases that a recipe may stream and those it holds out, as positions in the store; scans are held out by hash,
/// as the stream does it.
fn cases_of(cases: &dyn Cases, select: &Selection) -> (Vec<usize>, Vec<usize>) {
    let records = cases.records();
    let is_held_out = held_out_cases(cases, select);
    let (held_out, others): (Vec<usize>, Vec<usize>) = (0..records.len()).partition(|case| is_held_out[*case]);
    let chosen = |case: &usize| {
        let only = select.cases.as_ref();
        only.is_none_or(|only| only.contains(&records[*case].id))
    };
    (others.into_iter().filter(chosen).collect(), held_out)
}

/// What a configuration comes to on a service and its store.
pub(super) struct Setup {
    recipe: Arc<Resolved>,
    architecture: Architecture,
    training: Vec<usize>,
    /// Cases that the segmentor never sees.
    pub held_out: Vec<usize>,
}

impl Setup {
    pub fn new(config: &SegmentorConfig, service: &dyn PatchService, cases: &dyn Cases) -> Result<Self, LearnError> {
        config.check()?;
        let plan = service.plan();
        Section("segmentor").tolerance(&config.held_out, plan)?;
        check_plan(("the service", plan), ("the store", cases.plan()))?;
        let mut wanted = config.recipe.clone();
        let (_, held_out) = config.split.divide(cases)?;
        let ids = held_out.iter().map(|case| cases.records()[*case].id.clone());
        wanted.select.hold_out.extend(ids);
        let recipe = service.resolve(wanted)?;
        let architecture = config.architecture(plan.labels.class_count());
        let section = Section("segmentor");
        check_sides((&section, "recipe.patch"), &architecture, &[recipe.patch])?;
        let most = MAX_BATCH_VOXELS / filled_voxels(&architecture, recipe.patch).max(1);
        let (batch, expected) = (
            u64::from(config.batch_size),
            format!("at most {most} patches of {:?}", recipe.patch),
        );
        section.check("batch_size", batch <= most, &expected, batch)?;
        let (training, held_out) = cases_of(cases, &recipe.recipe.select);
        config.validation.check_cases(&section, (cases, &held_out))?;
        let delivery = Delivery {
            batch_size: config.batch_size,
            ..Delivery::default()
        };
        check_delivery(&recipe, &delivery).map_err(|error| match error {
            StreamError::Delivery { field, expected, got } => LearnError::Config {
                key: format!("segmentor.{field}"),
                expected,
                got,
            },
            other => other.into(),
        })?;
        Ok(Self {
            recipe,
            architecture,
            training,
            held_out,
        })
    }
}

/// Checks a configuration against a service and its store without training, and returns what it would stream.
///
/// # Errors
/// [`LearnError`] names the key.
pub fn check_segmentor(
    config: &SegmentorConfig,
    service: &dyn PatchService,
    cases: &dyn Cases,
) -> Result<Arc<Resolved>, LearnError> {
    Ok(Setup::new(config, service, cases)?.recipe)
}

/// Trains the segmentor on a service's patches, scores it on the recipe's held-out cases and writes
/// `segmentor.safetensors`, `segmentor.json` and `segmentor.report.json`.
///
/// # Errors
/// [`LearnError`] names the key, the patch or the file.
pub fn train_segmentor(
    config: &SegmentorConfig,
    service: &dyn PatchService,
    job: &mut Job,
) -> Result<SegmentorReport, LearnError> {
    let Setup {
        recipe,
        architecture,
        training,
        held_out,
    } = Setup::new(config, service, job.cases)?;
    let plan = service.plan().clone();
    let settings = FitSettings {
        stage: "segmentor",
        steps: config.steps,
        checkpoint_every: config.checkpoint_every,
        identity: Digest::of_json(&("segmentor", config, recipe.cursor(0), job.dtype)),
        out: job.out,
        resume: job.resume,
        validation: &config.validation,
    };
    if !job.resume {
        // Before the mixes that its steps were made with.
        forget(&settings)?;
    }
    let mut trainee = SegmentorTrainee {
        config,
        service,
        recipe: recipe.clone(),
        // Without a state the run begins anew, and mixes that lie there may be another configuration's.
        steering: Steering::new(
            &config.steering,
            &recipe.recipe,
            job.out,
            job.resume && settings.has_state(),
        )?,
        plan: plan.clone(),
        stream: None,
        learner: Learner::new(
            job,
            &architecture,
            &config.course(),
            Validator::new(job, &held_out, (&config.held_out, config.validation.cases)),
        ),
    };
    let fitted = fit(&mut trainee, &settings, job.progress)?;
    let mixes = trainee.steering.mixes().to_vec();
    let weights = config.precision.rounded(fitted.model);
    let net = fill_network(fresh(&architecture, job.device, 0), weights.clone())?.with_compute_dtype(job.dtype);

    job.progress.on_note("scoring held-out cases");
    let report = SegmentorReport {
        steps: fitted.steps,
        best: fitted.best,
        step_seconds: fitted.step_seconds,
        data_wait: fitted.data_wait,
        parameters: architecture.parameters(),
        recipe: recipe.hash,
        training_cases: training.len(),
        held_out: held_out_scores((&net, fitted.steps), job, &held_out, &config.held_out)?,
        mixes,
        last_step: fitted.last_step,
    };
    let mut record = training_of(
        job.cases,
        &training,
        &(config, recipe.cursor(fitted.model_steps * u64::from(config.batch_size))),
        (fitted.model_steps, config.seed),
        dice_metrics(&report.held_out),
    );
    // Its synthetic lesions are what those models made of the scans that they learnt from.
    recipe.models.iter().for_each(|models| record.add_seen(models));
    let manifest = manifest(architecture, plan, &recipe, record);
    save_model(job.out, manifest, &weights, config.precision)?;
    write_report(job.out, "segmentor", &report)?;
    Ok(report)
}

fn manifest(architecture: Architecture, plan: Plan, recipe: &Resolved, record: Training) -> ModelManifest {
    ModelManifest {
        format_version: FORMAT_VERSION,
        role: Role::Segmentor,
        architecture,
        plan,
        cubes: recipe.patch.to_vec(),
        provenance_known: recipe.models.as_ref().is_none_or(|models| models.known),
        training: Some(record),
        calibration: None,
        realism: None,
        adapter: Adapter::default(),
        imported: None,
        weights: WeightsFile::default(),
    }
}
