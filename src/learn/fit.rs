//! The one training loop: steps, metrics, checkpoints, resuming, stopping.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use metrics::gauge;
use serde::Deserialize;

use super::LearnError;
use super::validation::{Keep, ValidationSettings, Watch};
use crate::checkpoint::{Precision, Weights, not_finite, read_weights, weights_bytes, write_atomically};
use crate::digest::Digest;
use crate::kernel::ComputeDtype;
use crate::store::Cases;
use crate::telemetry::metrics::{Stage, TRAINING_LOSS, TRAINING_MEASURE};

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

    /// Copies the weights that would become the model.
    fn model(&self) -> Weights;

    /// Scores these weights after so many steps on held-out cases, from 0 to 1; nothing where no class is there or called. What
    /// is learnt next may depend on it.
    ///
    /// # Errors
    /// [`LearnError`] where a case cannot be read; [`LearnError::Stopped`], with nothing changed, where `stop` asked for it.
    fn score(&mut self, _steps: u64, _stop: &dyn Fn() -> bool) -> Result<Option<f64>, LearnError> {
        Ok(None)
    }

    /// Returns how long the steps so far have waited for their data.
    fn data_wait(&self) -> Duration {
        Duration::ZERO
    }
}

/// What a run ended with.
#[derive(Debug)]
pub struct Fitted {
    /// The model's weights.
    pub model: Weights,
    /// Steps made, of earlier runs that this one resumed too; fewer than asked for where it ended early.
    pub steps: u64,
    /// The step after which the model had these weights.
    pub model_steps: u64,
    /// The best score on held-out cases, and the step after which it was reached.
    pub best: Option<(f32, u64)>,
    /// What the last step measured, of an earlier run where this one had none left to make.
    pub last_step: Metrics,
    /// Mean wall time of this run's steps, in s; scoring and saving are not in it. Absent where it had none left to make.
    pub step_seconds: Option<f64>,
    /// Share of that time in which steps waited for data; absent likewise.
    pub data_wait: Option<f64>,
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
    /// How the run is watched.
    pub validation: &'a ValidationSettings,
}

impl FitSettings<'_> {
    /// Returns where the best weights lie. Their step is in the name: a state that is resumed finds those that it knows of, also
    /// where the run had come further.
    fn best_path(&self, step: u64) -> PathBuf {
        self.out.join(format!("{}.best-{step}.safetensors", self.stage))
    }

    /// Tells whether an earlier run left what this one could go on from.
    pub(super) fn has_state(&self) -> bool {
        self.state_path().exists()
    }

    fn state_path(&self) -> PathBuf {
        self.out.join(format!("{}.state.safetensors", self.stage))
    }

    /// Returns what tells whose weights a file holds, and after which step.
    fn mark(&self, step: u64) -> BTreeMap<String, String> {
        BTreeMap::from([("freetumor_state".into(), format!("{step} {}", self.identity))])
    }

    fn metrics_path(&self) -> PathBuf {
        self.out.join(format!("{}.metrics.jsonl", self.stage))
    }

    /// Returns where the report of a run lies that broke off.
    fn broken_off_path(&self) -> PathBuf {
        self.out.join(format!("{}.broken_off.json", self.stage))
    }
}

/// Trains to the last step, from the last checkpoint where asked to, or until more steps stop to help.
///
/// # Errors
/// [`LearnError::NotFinite`] at the first loss that is not, [`LearnError::Guard`] where stage 2 has stopped to make sense; either leaves
/// `<stage>.broken_off.json`. [`LearnError::Stopped`] where the watcher asked for it.
pub fn fit(
    trainee: &mut dyn Trainee,
    settings: &FitSettings,
    progress: &mut dyn Progress,
) -> Result<Fitted, LearnError> {
    let mut watch = Watch::default();
    let start = match settings.resume {
        true => restore(trainee, &mut watch, settings)?,
        false => forget(settings)?,
    };
    remove_if_there(&settings.broken_off_path())?;
    let (mut log, mut last) = open_log(&settings.metrics_path(), start)?;
    if watch.is_due {
        log = catch_up(trainee, &mut watch, settings, (start, &mut last), progress)?;
    }
    let (mut done, mut spent) = (start, Duration::ZERO);
    while done < settings.steps && !watch.is_over(settings.validation) {
        let (began, waited) = (Instant::now(), trainee.data_wait());
        let measured = trainee.step(done);
        let measured = measured.and_then(|metrics| refuse_not_finite(metrics, done));
        let measured = measured.map_err(counted_from_one);
        let mut metrics = measured.or_else(|error| break_off(settings, (done, &last), error))?;
        spent += began.elapsed();
        Stage::Learn.took(
            began
                .elapsed()
                .saturating_sub(trainee.data_wait().saturating_sub(waited)),
        );
        done += 1;
        let every = settings.validation.every;
        if every > 0 && done.is_multiple_of(every) {
            watch.is_due = !validate(trainee, &mut watch, settings, (done, &mut metrics), progress)?;
        }
        log_step(&mut log, done, &metrics)?;
        show(settings.stage, &metrics);
        progress.on_step(settings.stage, done, settings.steps, &metrics);
        last.clone_from(&metrics);
        let is_last = done == settings.steps || watch.is_over(settings.validation);
        let stop = watch.is_due || (progress.should_stop() && !is_last);
        if stop || is_last || done.is_multiple_of(settings.checkpoint_every.max(1)) {
            save(trainee, &mut watch, settings, done).or_else(|error| break_off(settings, (done, &last), error))?;
        }
        if stop {
            return Err(LearnError::Stopped { step: done });
        }
    }
    let (model, model_steps) = model(trainee, &watch, settings, done)?;
    let of_steps = |value: f64| (done > start).then_some(value);
    Ok(Fitted {
        model,
        steps: done,
        model_steps,
        best: watch.best(),
        last_step: last,
        step_seconds: of_steps(spent.as_secs_f64() / (done - start) as f64),
        data_wait: of_steps(trainee.data_wait().as_secs_f64() / spent.as_secs_f64()),
    })
}

/// Scores a state that a run left while it did so, and completes its line of the log.
fn catch_up(
    trainee: &mut dyn Trainee,
    watch: &mut Watch,
    settings: &FitSettings,
    (step, metrics): (u64, &mut Metrics),
    progress: &mut dyn Progress,
) -> Result<fs_err::File, LearnError> {
    watch.is_due = !validate(trainee, watch, settings, (step, metrics), progress)?;
    if watch.is_due {
        return Err(LearnError::Stopped { step });
    }
    let (mut log, _) = open_log(&settings.metrics_path(), step - 1)?;
    log_step(&mut log, step, metrics)?;
    show(settings.stage, metrics);
    progress.on_step(settings.stage, step, settings.steps, metrics);
    save(trainee, watch, settings, step)?;
    Ok(log)
}

/// Refuses to save weights that no loss can come back from.
fn refuse_broken(state: &Weights, step: u64) -> Result<(), LearnError> {
    match not_finite(state) {
        Some((name, value)) => Err(LearnError::NotFinite {
            step,
            metric: name.into(),
            value: value.into(),
        }),
        None => Ok(()),
    }
}

fn refuse_not_finite(metrics: Metrics, step: u64) -> Result<Metrics, LearnError> {
    match metrics.iter().find(|(_, value)| !value.is_finite()) {
        Some((metric, value)) => Err(LearnError::NotFinite {
            step,
            metric: metric.clone(),
            value: *value,
        }),
        None => Ok(metrics),
    }
}

/// Counts an error's step as the log does; a stage's own steps count from 0.
fn counted_from_one(mut error: LearnError) -> LearnError {
    if let LearnError::NotFinite { step, .. } | LearnError::Guard { step, .. } = &mut error {
        *step += 1;
    }
    error
}

/// Leaves a report where a run makes no sense any more: the cause, and what was measured last.
fn break_off<T>(settings: &FitSettings, (step, last): (u64, &Metrics), error: LearnError) -> Result<T, LearnError> {
    if let LearnError::NotFinite { .. } | LearnError::Guard { .. } = error {
        let report = serde_json::json!({
            "stage": settings.stage,
            "step": step,
            "cause": error.to_string(),
            "last_metrics": last,
        });
        let text = serde_json::to_vec_pretty(&report).expect("finite numbers are representable in JSON");
        let path = settings.broken_off_path();
        if let Err(unwritten) = write_atomically(&path, &text) {
            // The cause matters more than that its report is missing.
            tracing::warn!(path = %path.display(), error = %unwritten, "the report of a run that broke off was not written");
        }
    }
    Err(error)
}

/// Sets the metrics that tell what a step measured.
fn show(stage: &'static str, metrics: &Metrics) {
    if let Some(loss) = metrics.get("loss").or_else(|| metrics.get("generator_loss")) {
        gauge!(TRAINING_LOSS, "stage" => stage).set(*loss);
    }
    for (name, value) in metrics {
        gauge!(TRAINING_MEASURE, "stage" => stage, "name" => name.clone()).set(*value);
    }
}

fn log_step(log: &mut fs_err::File, step: u64, metrics: &Metrics) -> Result<(), LearnError> {
    let mut line = serde_json::to_string(&serde_json::json!({"step": step, "metrics": metrics}))
        .expect("finite numbers are representable in JSON");
    line.push('\n');
    Ok(log.write_all(line.as_bytes())?)
}

/// Scores the weights, and keeps them where they are the best so far and the best are wanted; `false` where the run is to stop before that is
/// done.
fn validate(
    trainee: &mut dyn Trainee,
    watch: &mut Watch,
    settings: &FitSettings,
    (step, metrics): (u64, &mut Metrics),
    progress: &mut dyn Progress,
) -> Result<bool, LearnError> {
    if progress.should_stop() {
        return Ok(false);
    }
    let stop = || progress.should_stop();
    let score = match Stage::Validate.time(|| trainee.score(step, &stop)) {
        Err(LearnError::Stopped { .. }) => return Ok(false),
        score => score?,
    };
    let Some(score) = score else {
        progress.on_note("no class is there or called in the cases of validation.cases: no score");
        return Ok(true);
    };
    metrics.insert("validation_dice".into(), score);
    let before = watch.best().map(|(_, step)| step);
    if watch.take(score, step) && settings.validation.keep == Keep::Best {
        let bytes = weights_bytes(&trainee.model(), Precision::Single, &settings.mark(step));
        write_atomically(&settings.best_path(step), &bytes)?;
        let stale = before.filter(|before| watch.saved != Some(*before));
        let stale = stale
            .map(|before| settings.best_path(before))
            .filter(|stale| stale.exists());
        stale.map_or(Ok(()), fs_err::remove_file)?;
    }
    Ok(true)
}

/// Returns the weights that become the model, and the step after which it had them.
fn model(
    trainee: &dyn Trainee,
    watch: &Watch,
    settings: &FitSettings,
    done: u64,
) -> Result<(Weights, u64), LearnError> {
    let Some((_, step)) = watch.best().filter(|_| settings.validation.keep == Keep::Best) else {
        return Ok((trainee.model(), done));
    };
    let (best, kept) = read_marked(&settings.best_path(step), settings)?;
    if kept != step {
        let (path, what) = (
            settings.best_path(step),
            format!("expected the weights of step {step}, got {kept}'s"),
        );
        return Err(LearnError::State { path, what });
    }
    Ok((best, step))
}

/// Removes the best weights that the saved state does not know of.
fn remove_other_bests(watch: &Watch, settings: &FitSettings) -> Result<(), LearnError> {
    let kept = watch.best().map(|(_, step)| settings.best_path(step));
    let prefix = format!("{}.best-", settings.stage);
    for entry in fs_err::read_dir(settings.out)? {
        let entry = entry?;
        let is_best = entry.file_name().to_string_lossy().starts_with(&prefix);
        if is_best && Some(entry.path()) != kept {
            fs_err::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes model, optimizer and step as one file, so that one rename publishes a consistent state.
fn save(trainee: &dyn Trainee, watch: &mut Watch, settings: &FitSettings, step: u64) -> Result<(), LearnError> {
    let mut state = trainee.state();
    refuse_broken(&state, step)?;
    state.extend(watch.state());
    let bytes = weights_bytes(&state, Precision::Single, &settings.mark(step));
    write_atomically(&settings.state_path(), &bytes)?;
    watch.saved = watch.best().map(|(_, step)| step);
    remove_other_bests(watch, settings)
}

fn restore(trainee: &mut dyn Trainee, watch: &mut Watch, settings: &FitSettings) -> Result<u64, LearnError> {
    if !settings.state_path().exists() {
        return Ok(0);
    }
    let (mut state, step) = read_marked(&settings.state_path(), settings)?;
    watch.restore(&state);
    take_over_best(settings)?;
    Watch::strip(&mut state);
    trainee.restore(state, step)?;
    Ok(step)
}

/// Renames the best weights of a version that did not name their step.
fn take_over_best(settings: &FitSettings) -> Result<(), LearnError> {
    let unnamed = settings.out.join(format!("{}.best.safetensors", settings.stage));
    if unnamed.exists() {
        let (_, step) = read_marked(&unnamed, settings)?;
        fs_err::rename(unnamed, settings.best_path(step))?;
    }
    Ok(())
}

/// Removes the state of an earlier run, which this one begins again; nothing is left to be resumed by mistake. Returns its
/// first step.
pub(super) fn forget(settings: &FitSettings) -> Result<u64, LearnError> {
    forget_report(settings.out, settings.stage)?;
    remove_if_there(&settings.state_path())?;
    Ok(0)
}

/// Removes the report of an earlier run, which says that it came to its end.
pub(super) fn forget_report(out: &Path, stage: &str) -> std::io::Result<()> {
    remove_if_there(&out.join(format!("{stage}.report.json")))
}

/// Removes a file that may not be there.
pub(super) fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match path.exists() {
        true => fs_err::remove_file(path),
        false => Ok(()),
    }
}

/// Reads weights that a run of these settings has left, and after which step.
fn read_marked(path: &Path, settings: &FitSettings) -> Result<(Weights, u64), LearnError> {
    let bytes = fs_err::read(path)?;
    let refused = |what: String| LearnError::State {
        path: path.into(),
        what,
    };
    let weights = read_weights(&bytes, path)?;
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
    Ok((weights, step))
}

/// A line of the log of metrics.
#[derive(Deserialize)]
struct Line {
    step: u64,
    metrics: Metrics,
}

/// Opens the log of metrics and drops what a resumed run is about to repeat; returns what the last step before measured.
fn open_log(path: &Path, start: u64) -> Result<(fs_err::File, Metrics), LearnError> {
    let read = |line: &str| serde_json::from_str::<Line>(line).ok();
    let old = match start > 0 && path.exists() {
        true => fs_err::read_to_string(path)?,
        false => String::new(),
    };
    let kept: String = old
        .lines()
        .filter(|line| read(line).is_some_and(|line| line.step <= start))
        .flat_map(|line| [line, "\n"])
        .collect();
    write_atomically(path, kept.as_bytes())?;
    let last = kept.lines().last().and_then(read).map(|line| line.metrics);
    let log = fs_err::OpenOptions::new().append(true).open(path)?;
    Ok((log, last.unwrap_or_default()))
}
