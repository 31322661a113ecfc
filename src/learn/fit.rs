//! The one training loop: steps, metrics, checkpoints, resuming, stopping.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use metrics::gauge;

use super::LearnError;
use crate::checkpoint::{Precision, Weights, read_weights, weights_bytes, write_atomically};
use crate::digest::Digest;
use crate::kernel::ComputeDtype;
use crate::store::Cases;
use crate::telemetry::metrics::TRAINING_LOSS;

/// What a step measured, by name.
pub type Metrics = BTreeMap<String, f64>;

/// Who watches a run, and may stop it.
pub trait Progress {
    /// Hears of a finished step (1 to `steps`).
    fn on_step(&mut self, stage: &str, step: u64, steps: u64, metrics: &Metrics);

    /// Hears of the work after the last step.
    fn on_note(&mut self, note: &str);

    /// Tells whether the run shall save its state and stop (SIGTERM).
    fn should_stop(&self) -> bool;
}

/// Nobody watches.
pub struct Quiet;

impl Progress for Quiet {
    fn on_step(&mut self, _stage: &str, _step: u64, _steps: u64, _metrics: &Metrics) {}
    fn on_note(&mut self, _note: &str) {}
    fn should_stop(&self) -> bool {
        false
    }
}

/// Where a stage's data, results and computing come from.
pub struct Job<'a> {
    /// The store.
    pub cases: &'a dyn Cases,
    /// The folder of results; it must exist.
    pub out: &'a Path,
    /// Whether to go on from the folder's last checkpoint, if there is one.
    pub resume: bool,
    /// Where to compute.
    pub device: &'a Device,
    /// What networks compute in; weights, optimiser and losses are single precision.
    pub dtype: ComputeDtype,
    /// Who watches.
    pub progress: &'a mut dyn Progress,
}

/// What is trained.
pub trait Trainee {
    /// Makes one step: a pure function of the state and the step's number. Not-finite losses must leave it unchanged.
    ///
    /// # Errors
    /// [`LearnError`] where data cannot be read or a loss is not finite.
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError>;

    /// Copies everything that the next step depends on.
    fn state(&self) -> Weights;

    /// Goes on from a state saved after `steps` steps.
    ///
    /// # Errors
    /// [`LearnError`] where the state is another network's.
    fn restore(&mut self, state: Weights, steps: u64) -> Result<(), LearnError>;
}

/// How long a run is and how often it is saved.
pub struct FitSettings<'a> {
    /// The stage's name: of its state file and in progress.
    pub stage: &'static str,
    /// Steps in all.
    pub steps: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Digest of everything else that decides the weights; a state of another is not resumed.
    pub identity: Digest,
    /// The folder of results.
    pub out: &'a Path,
    /// Whether to go on from the last checkpoint.
    pub resume: bool,
}

impl FitSettings<'_> {
    fn state_path(&self) -> PathBuf {
        self.out.join(format!("{}.state.safetensors", self.stage))
    }

    fn metrics_path(&self) -> PathBuf {
        self.out.join(format!("{}.metrics.jsonl", self.stage))
    }
}

/// Trains to the last step, from the last checkpoint where asked to.
///
/// # Errors
/// [`LearnError::NotFinite`] at the first loss that is not; [`LearnError::Stopped`] where the watcher asked for it.
pub fn fit(trainee: &mut dyn Trainee, settings: &FitSettings, progress: &mut dyn Progress) -> Result<(), LearnError> {
    let start = if settings.resume {
        restore(trainee, settings)?
    } else {
        0
    };
    let mut log = open_log(&settings.metrics_path(), start)?;
    for step in start..settings.steps {
        let metrics = trainee.step(step)?;
        if let Some((metric, value)) = metrics.iter().find(|(_, value)| !value.is_finite()) {
            let (metric, value) = (metric.clone(), *value);
            return Err(LearnError::NotFinite { step, metric, value });
        }
        let done = step + 1;
        let mut line = serde_json::to_string(&serde_json::json!({"step": done, "metrics": metrics}))
            .expect("finite numbers are representable in JSON");
        line.push('\n');
        log.write_all(line.as_bytes())?;
        if let Some(loss) = metrics.get("loss").or_else(|| metrics.get("generator_loss")) {
            gauge!(TRAINING_LOSS, "stage" => settings.stage).set(*loss);
        }
        progress.on_step(settings.stage, done, settings.steps, &metrics);
        let stop = progress.should_stop() && done < settings.steps;
        if stop || done == settings.steps || done % settings.checkpoint_every.max(1) == 0 {
            save(trainee, settings, done)?;
        }
        if stop {
            return Err(LearnError::Stopped { step: done });
        }
    }
    Ok(())
}

/// Writes model, optimizer and step as one file, so that one rename publishes a consistent state.
fn save(trainee: &dyn Trainee, settings: &FitSettings, step: u64) -> Result<(), LearnError> {
    let mark = format!("{} {}", step, settings.identity);
    let header = BTreeMap::from([("freetumor_state".into(), mark)]);
    let bytes = weights_bytes(&trainee.state(), Precision::Single, &header);
    Ok(write_atomically(&settings.state_path(), &bytes)?)
}

fn restore(trainee: &mut dyn Trainee, settings: &FitSettings) -> Result<u64, LearnError> {
    let path = settings.state_path();
    if !path.exists() {
        return Ok(0);
    }
    let bytes = fs_err::read(&path)?;
    let refused = |what: String| LearnError::State {
        path: path.clone(),
        what,
    };
    let weights = read_weights(&bytes, &path)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|error| refused(error.to_string()))?;
    let mark = header.metadata().as_ref().and_then(|map| map.get("freetumor_state"));
    let (step, identity) = mark
        .and_then(|mark| mark.split_once(' '))
        .and_then(|(step, identity)| Some((step.parse::<u64>().ok()?, identity.parse::<Digest>().ok()?)))
        .ok_or_else(|| refused("not a training state".into()))?;
    if identity != settings.identity {
        return Err(refused(format!(
            "the state belongs to another configuration or store (expected {}, got {identity}); \
             train without resume, or into another folder",
            settings.identity
        )));
    }
    trainee.restore(weights, step)?;
    Ok(step)
}

/// Opens the log of metrics and drops what a resumed run is about to repeat.
fn open_log(path: &Path, start: u64) -> Result<fs_err::File, LearnError> {
    let step_of = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line)
            .ok()?
            .get("step")?
            .as_u64()
    };
    let old = match fs_err::read_to_string(path) {
        Ok(text) if start > 0 => text,
        _ => String::new(),
    };
    let kept: String = old
        .lines()
        .filter(|line| step_of(line).is_some_and(|step| step <= start))
        .flat_map(|line| [line, "\n"])
        .collect();
    write_atomically(path, kept.as_bytes())?;
    Ok(fs_err::OpenOptions::new().append(true).open(path)?)
}
