//! One job at work.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use metrics::gauge;

use super::journal::VALIDATION;
use super::turn::Turns;
use super::{Event, JobError, JobRecord, TrainingParts};
use crate::digest::Digest;
use crate::learn::{Job, LearnError, Metrics, Progress, check_segmentor, train_segmentor};
use crate::panic::panic_text;
use crate::stream::{ModelsError, Resolved, Shelf, StreamError};
use crate::telemetry::metrics::TRAINING_PATCHES_PER_SECOND;

/// Steps without a validation are told once in so long.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Trains a job until it ends, fails or is asked to stop, and returns the event that says which.
pub(super) fn run(
    record: &JobRecord,
    (parts, folder): (&TrainingParts, &Path),
    stop: &Arc<AtomicBool>,
    tell: &mut dyn FnMut(Event),
) -> Event {
    let work = AssertUnwindSafe(|| train(record, (parts, folder), stop, tell));
    let trained = catch_unwind(work).unwrap_or_else(|panic| Err(JobError::Unfit(panic_text(&*panic))));
    gauge!(TRAINING_PATCHES_PER_SECOND).set(0.0);
    match trained {
        Ok(true) => Event::Finished,
        // Who asked it to stop knows what comes of it.
        Ok(false) => Event::Stopped,
        Err(error) => Event::Failed {
            what: error.to_string(),
        },
    }
}

/// Trains a job to its end; `false` where it was asked to stop before.
fn train(
    record: &JobRecord,
    (parts, folder): (&TrainingParts, &Path),
    stop: &Arc<AtomicBool>,
    tell: &mut dyn FnMut(Event),
) -> Result<bool, JobError> {
    hold_models(record, parts)?;
    let models = check_record(record, parts)?.bundle;
    // Its models are its own until it ends: a new mix is resolved against them, whatever is released meanwhile.
    let holder = parts.service.holder(models)?;
    let service = Turns {
        service: parts.service.clone(),
        patches: holder.unwrap_or_else(|| parts.service.clone()),
        weights: parts.weights,
        stop: stop.clone(),
    };
    let mut watcher = Watcher {
        batch_size: record.config.batch_size,
        told: None,
        stop,
        tell,
    };
    let mut job = Job {
        cases: &*parts.cases,
        out: folder,
        resume: true,
        device: &parts.device,
        dtype: parts.dtype,
        progress: &mut watcher,
    };
    match train_segmentor(&record.config, &service, &mut job) {
        Ok(_) => Ok(true),
        Err(LearnError::Stopped { .. }) => Ok(false),
        // A stream that ends because the server does is no failure of the job: it goes on from its last checkpoint.
        Err(LearnError::Stream(StreamError::Stopped)) if stop.load(Ordering::Relaxed) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Refuses to train on anything but what was accepted: a new server may have another store. Returns the resolved recipe.
fn check_record(record: &JobRecord, parts: &TrainingParts) -> Result<Arc<Resolved>, JobError> {
    let resolved = check_segmentor(&record.config, &*parts.service, &*parts.cases)?;
    let differs = |what: &str, then: Digest, now: Digest| {
        let what = format!("the {what} was {then} when the training was accepted, and is {now}; submit it anew");
        (then != now).then_some(JobError::Unfit(what))
    };
    let store = differs("store", record.snapshot, resolved.snapshot);
    match store.or_else(|| differs("recipe", record.recipe, resolved.hash)) {
        Some(error) => Err(error),
        None => Ok(resolved),
    }
}

/// Loads the job's models where a new server holds others.
pub(super) fn hold_models(record: &JobRecord, parts: &TrainingParts) -> Result<(), JobError> {
    let gone = match parts.service.resolve(record.config.recipe.clone()) {
        Err(StreamError::BundleGone(hash)) => hash,
        _ => return Ok(()),
    };
    let (Some(shelf), Some(name)) = (parts.service.shelf(), &record.models) else {
        return Err(StreamError::BundleGone(gone).into());
    };
    let loaded = match shelf.load(name) {
        Err(ModelsError::Full) => return Err(full(shelf, name)),
        loaded => loaded?,
    };
    if loaded.bundle != Some(gone) {
        // Nobody asked for these.
        shelf.release(name)?;
        let what = format!("models {name:?} are others than those that the training began with ({gone})");
        return Err(JobError::Unfit(what));
    }
    Ok(())
}

fn full(shelf: &Shelf, name: &str) -> JobError {
    let held: Vec<String> = shelf.list().into_iter().map(|entry| entry.name).collect();
    let held = held.join(", ");
    JobError::Unfit(format!(
        "no place for the models {name:?} beside {held}; release some, then resume"
    ))
}

/// Tells steps to the journal.
struct Watcher<'a> {
    batch_size: u32,
    /// When and which step was told last.
    told: Option<(Instant, u64)>,
    stop: &'a AtomicBool,
    tell: &'a mut dyn FnMut(Event),
}

impl Progress for Watcher<'_> {
    fn on_step(&mut self, _stage: &str, step: u64, steps: u64, metrics: &Metrics) {
        let due = match self.told {
            None => true,
            Some((at, _)) => at.elapsed() >= TELL_EVERY || step == steps || metrics.contains_key(VALIDATION),
        };
        if !due {
            return;
        }
        let patches_per_second = self.told.map_or(0.0, |(at, before)| {
            let patches = (step - before) as f64 * f64::from(self.batch_size);
            patches / at.elapsed().as_secs_f64().max(1e-3)
        });
        self.told = Some((Instant::now(), step));
        gauge!(TRAINING_PATCHES_PER_SECOND).set(patches_per_second);
        (self.tell)(Event::Step {
            step,
            steps,
            metrics: metrics.clone(),
            patches_per_second,
        });
    }

    fn on_note(&mut self, note: &str) {
        (self.tell)(Event::Note { note: note.to_owned() });
    }

    fn should_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
