//! Takes jobs, runs one at a time on a thread of its own, and lets others look at them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use metrics::gauge;
use serde::{Deserialize, Serialize};

use super::run::run;
use super::table::{Jobs, Known, REMOVED, events_path};
use super::{Event, Follower, JobError, JobName, JobRecord, JobState, JobStatus};
use crate::digest::Digest;
use crate::kernel::ComputeDtype;
use crate::learn::{LearnError, SegmentorConfig, check_segmentor};
use crate::store::Cases;
use crate::stream::{PatchService, Weights};
use crate::telemetry::metrics::TRAININGS_RUNNING;

/// The file that tells other servers to keep away; no job's name begins with a dot.
const LOCK: &str = ".lock";

/// How many jobs there may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobsConfig {
    /// Jobs that may wait while one trains.
    pub max_queued: usize,
    /// Jobs kept in all, whatever became of them.
    pub max_kept: usize,
    /// Clients that may follow events at the same time.
    pub max_followers: usize,
}

impl Default for JobsConfig {
    fn default() -> Self {
        Self {
            max_queued: 16,
            max_kept: 1000,
            max_followers: 64,
        }
    }
}

impl JobsConfig {
    /// Tells what is wrong with a value, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let ranges = [
            ("max_queued", 10_000, self.max_queued),
            ("max_kept", 100_000, self.max_kept),
            ("max_followers", 10_000, self.max_followers),
        ];
        let wrong = ranges.into_iter().find(|(_, most, got)| !(1..=*most).contains(got));
        wrong.map(|(key, most, got)| format!("jobs.{key}: expected 1 to {most}, got {got}"))
    }
}

/// What hosted training is made of.
pub struct TrainingParts {
    /// The folder of jobs; it must exist.
    pub root: PathBuf,
    /// The store.
    pub cases: Arc<dyn Cases>,
    /// What streams its patches.
    pub service: Arc<dyn PatchService>,
    /// What a job gets that says nothing else.
    pub defaults: SegmentorConfig,
    /// How many there may be.
    pub config: JobsConfig,
    /// Shares of the device between streams and training.
    pub weights: Weights,
    /// Where to train.
    pub device: Device,
    /// What networks compute in.
    pub dtype: ComputeDtype,
    /// Where models lie that are promoted, and where those lie that gate the stream.
    pub models: super::promote::ModelFolders,
}

/// What hosts trainings. Dropping it stops them with a checkpoint.
pub struct TrainingHost {
    parts: Arc<TrainingParts>,
    jobs: Arc<(Mutex<Jobs>, Condvar)>,
    /// One promotion at a time: each holds models of its own on the device.
    pub(super) promoting: Mutex<()>,
    /// Held as long as this server has the folder: two would write into the same files.
    _lock: fs_err::File,
}

impl TrainingHost {
    /// Finds the jobs of a folder, lets those go on that were under way, and starts the training thread.
    ///
    /// # Errors
    /// [`JobError`] names the file that is not what it should be, or that another server has the folder.
    pub fn start(parts: TrainingParts) -> Result<Arc<Self>, JobError> {
        let lock = lock(&parts)?;
        let jobs = Jobs::find(&parts)?;
        parts.models.forget_unfinished();
        let host = Self {
            parts: Arc::new(parts),
            jobs: Arc::new((Mutex::new(jobs), Condvar::new())),
            promoting: Mutex::default(),
            _lock: lock,
        };
        let (parts, jobs) = (host.parts.clone(), host.jobs.clone());
        std::thread::Builder::new()
            .name("freetumor-training".into())
            .spawn(move || work(&parts, &jobs))?;
        Ok(Arc::new(host))
    }

    /// Returns what jobs are made of.
    pub(super) fn parts(&self) -> &TrainingParts {
        &self.parts
    }

    /// Returns what a job gets that says nothing else.
    pub fn defaults(&self) -> &SegmentorConfig {
        &self.parts.defaults
    }

    /// Returns how many jobs there may be.
    pub fn config(&self) -> &JobsConfig {
        &self.parts.config
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a job: it is checked as a whole, written down, and trains when its turn comes.
    ///
    /// # Errors
    /// [`JobError`] names the field, or the limit that was reached.
    pub fn submit(&self, name: JobName, mut config: SegmentorConfig) -> Result<JobStatus, JobError> {
        self.refuse_paths(&config)?;
        let checked = check_segmentor(&config, &*self.parts.service, &*self.parts.cases);
        let resolved = checked.map_err(|error| match error {
            LearnError::Stream(error) => LearnError::Stream(error.of_recipe()),
            other => other,
        })?;
        let needs_models = resolved.bundle != Digest::default();
        // What other models would answer differently is answered now.
        config.recipe.bundle = needs_models.then(|| resolved.bundle.to_string());
        config.recipe.synthesizer = resolved.recipe.synthesizer;
        config.recipe.unlabelled_negatives = resolved.recipe.unlabelled_negatives;
        let shelf = self.parts.service.shelf().filter(|_| needs_models);
        let record = JobRecord {
            models: shelf.and_then(|shelf| shelf.name_of(resolved.bundle)),
            recipe: resolved.hash,
            snapshot: resolved.snapshot,
            name,
            config,
        };
        let mut jobs = self.lock();
        jobs.admit(&record.name, &self.parts.config)?;
        let folder = self.folder(&record.name);
        make_folder(&record.name, &folder)?;
        let status = match jobs.enter(record, &folder, &self.parts) {
            Ok(status) => status,
            Err(error) => {
                // What was refused must not train after a restart. Where not even this works, the error says enough.
                fs_err::remove_dir_all(&folder).ok();
                return Err(error);
            }
        };
        drop(jobs);
        self.jobs.1.notify_all();
        Ok(status)
    }

    /// Refuses a file that the server's own configuration does not name: paths are not a client's to choose.
    fn refuse_paths(&self, config: &SegmentorConfig) -> Result<(), JobError> {
        if config.split.file == self.parts.defaults.split.file {
            return Ok(());
        }
        Err(JobError::Field {
            field: "segmentor.split.file".into(),
            what: "expected none, or the one that the server's configuration names".into(),
        })
    }

    /// Returns how every job stands, by name.
    pub fn list(&self) -> Vec<JobStatus> {
        self.lock().known.values().map(|known| known.status.clone()).collect()
    }

    /// Returns what a job is and how it stands.
    ///
    /// # Errors
    /// [`JobError::Unknown`].
    pub fn get(&self, name: &str) -> Result<(Arc<JobRecord>, JobStatus), JobError> {
        let jobs = self.lock();
        let known = jobs.get(name)?;
        Ok((known.record.clone(), known.status.clone()))
    }

    /// Stops a job: one that trains saves its state first.
    ///
    /// # Errors
    /// [`JobError::Unknown`], or [`JobError::State`] where it neither waits nor trains.
    pub fn stop(&self, name: &str) -> Result<JobStatus, JobError> {
        let mut jobs = self.lock();
        let Known { status, stop, .. } = jobs.get(name)?;
        match status.state {
            JobState::Running => {
                stop.store(true, Ordering::Relaxed);
                let name = status.name.clone();
                // Written down, so that the wish outlives a server that ends before the checkpoint; it stops without as well.
                if let Err(error) = jobs.tell(&name, Event::Stopping) {
                    tracing::error!(%name, %error, "the stop of a training cannot be written down");
                }
            }
            JobState::Queued => {
                let name = status.name.clone();
                // Written down first: where that fails, it still waits.
                jobs.tell(&name, Event::Stopped)?;
                jobs.unqueue(&name);
            }
            state @ (JobState::Stopped | JobState::Interrupted | JobState::Finished | JobState::Failed) => {
                let what = "only one that is queued or running can be stopped";
                let name = status.name.clone();
                return Err(JobError::State { name, state, what });
            }
        }
        let status = jobs.get(name)?.status.clone();
        drop(jobs);
        self.jobs.1.notify_all();
        Ok(status)
    }

    /// Lets a job go on from its last checkpoint when its turn comes.
    ///
    /// # Errors
    /// [`JobError::Unknown`], or [`JobError::State`] where it was neither stopped nor failed.
    pub fn resume(&self, name: &str) -> Result<JobStatus, JobError> {
        let mut jobs = self.lock();
        let status = &jobs.get(name)?.status;
        let (name, state) = (status.name.clone(), status.state);
        if !matches!(state, JobState::Stopped | JobState::Failed) {
            let what = "only one that was stopped or failed can be resumed";
            return Err(JobError::State { name, state, what });
        }
        jobs.admit_one_more(&self.parts.config)?;
        jobs.tell(&name, Event::Queued)?;
        jobs.queue(name.clone());
        let status = jobs.get(name.as_str())?.status.clone();
        drop(jobs);
        self.jobs.1.notify_all();
        Ok(status)
    }

    /// Removes a job with all of its files; clients that follow it hear nothing more.
    ///
    /// # Errors
    /// [`JobError::Unknown`], [`JobError::State`] where it is queued or runs, or [`JobError::Io`] names the file.
    pub fn remove(&self, name: &str) -> Result<(), JobError> {
        let mut jobs = self.lock();
        let status = &jobs.get(name)?.status;
        let (name, state) = (status.name.clone(), status.state);
        if !state.is_end() {
            let what = "only one that is neither queued nor running can be removed";
            return Err(JobError::State { name, state, what });
        }
        // Cut off in between, nothing of it is taken for a training, or becomes part of one of the same name.
        let removed = self.parts.root.join(format!("{REMOVED}{name}"));
        if removed.exists() {
            // Of an earlier removal that did not come to its end.
            fs_err::remove_dir_all(&removed)?;
        }
        fs_err::rename(self.folder(&name), &removed)?;
        jobs.known.remove(&name);
        fs_err::remove_dir_all(removed)?;
        drop(jobs);
        self.jobs.1.notify_all();
        Ok(())
    }

    /// Returns the folder of a job.
    pub(super) fn folder(&self, name: &JobName) -> PathBuf {
        self.parts.root.join(name.as_str())
    }

    /// Returns one of a job's files, where it is there and may be downloaded: weights, manifest, report, measures and the
    /// last checkpoint.
    ///
    /// # Errors
    /// [`JobError::Unknown`] names what there is.
    pub fn file(&self, name: &str, file: &str) -> Result<PathBuf, JobError> {
        let name = self.get(name)?.1.name;
        let folder = self.folder(&name);
        let there = |file: &&&str| folder.join(file).exists();
        match FILES.iter().find(|known| **known == file).filter(there) {
            Some(file) => Ok(folder.join(file)),
            None => {
                let held: Vec<&str> = FILES.iter().filter(there).copied().collect();
                Err(JobError::Unknown(format!(
                    "{name}: it has the files {}",
                    held.join(", ")
                )))
            }
        }
    }

    /// Follows a job's events after the one of a number: those that there are, and then those that come.
    ///
    /// # Errors
    /// [`JobError::Unknown`].
    pub fn follow(self: &Arc<Self>, name: &str, after: u64) -> Result<Follower, JobError> {
        let name = self.get(name)?.1.name;
        Ok(Follower::new(self.clone(), name, after))
    }

    /// Returns the file of a job's events.
    pub(super) fn events_path(&self, name: &JobName) -> PathBuf {
        events_path(&self.parts, name)
    }

    /// Looks at the jobs.
    pub(super) fn look<T>(&self, look: impl Fn(&Jobs) -> T) -> T {
        look(&self.lock())
    }

    /// Waits until the jobs are as wanted; `false` where they are not in time.
    pub(super) fn wait_until(&self, until: Instant, wanted: impl Fn(&Jobs) -> bool) -> bool {
        let mut jobs = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if wanted(&jobs) || left.is_zero() {
                return wanted(&jobs);
            }
            let waited = self.jobs.1.wait_timeout(jobs, left);
            jobs = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Stops the job that trains with a checkpoint, takes no more, and waits until it is done or the time is over.
    pub fn close(&self, time: Duration) {
        let mut jobs = self.lock();
        jobs.is_closed = true;
        for known in jobs.known.values() {
            known.stop.store(true, Ordering::Relaxed);
        }
        drop(jobs);
        self.jobs.1.notify_all();
        if !self.wait_until(Instant::now() + time, |jobs| !jobs.is_busy) {
            tracing::warn!("the time is over; the training goes on from its last checkpoint at the next start");
        }
    }
}

impl Drop for TrainingHost {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}

/// What may be downloaded of a job.
const FILES: [&str; 7] = [
    "segmentor.safetensors",
    "segmentor.json",
    "segmentor.report.json",
    "segmentor.metrics.jsonl",
    "segmentor.mixes.jsonl",
    "segmentor.broken_off.json",
    "segmentor.state.safetensors",
];

/// Takes the folder for this process.
fn lock(parts: &TrainingParts) -> Result<fs_err::File, JobError> {
    let path = parts.root.join(LOCK);
    let file = fs_err::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    match file.file().try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(JobError::File {
            path,
            what: "another server has this folder of jobs; give each its own".into(),
        }),
        Err(std::fs::TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Makes a job's folder, which must be new: what lies in another might be taken for the job's own.
fn make_folder(name: &JobName, folder: &Path) -> Result<(), JobError> {
    match fs_err::create_dir(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(JobError::Occupied(name.clone())),
        made => Ok(made?),
    }
}

/// The training thread: one job after the other.
fn work(parts: &TrainingParts, jobs: &(Mutex<Jobs>, Condvar)) {
    let tell = |name: &JobName, event: Event| {
        let mut locked = jobs.0.lock().unwrap_or_else(PoisonError::into_inner);
        locked.happened(name, event);
        drop(locked);
        jobs.1.notify_all();
    };
    while let Some((record, stop)) = next(jobs) {
        let name = &record.name;
        tracing::info!(%name, steps = record.config.steps, "training");
        gauge!(TRAININGS_RUNNING).set(1.0);
        let folder = parts.root.join(name.as_str());
        let ended = run(&record, (parts, &folder), &stop, &mut |event| tell(name, event));
        gauge!(TRAININGS_RUNNING).set(0.0);
        let ended = match ended {
            Event::Stopped if is_interrupted(jobs, name) => Event::Interrupted,
            ended => ended,
        };
        tracing::info!(%name, ended = ended.name(), "the training ended");
        tell(name, ended);
        jobs.0.lock().unwrap_or_else(PoisonError::into_inner).is_busy = false;
        jobs.1.notify_all();
    }
}

/// Tells whether a training ended because the server does, and not because somebody stopped it.
fn is_interrupted((jobs, _): &(Mutex<Jobs>, Condvar), name: &JobName) -> bool {
    let jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    let is_stopping = jobs.known.get(name).is_some_and(|known| known.status.is_stopping);
    jobs.is_closed && !is_stopping
}

/// Waits for a job, and marks it as begun; nothing once the host is closed.
fn next((jobs, changed): &(Mutex<Jobs>, Condvar)) -> Option<(Arc<JobRecord>, Arc<AtomicBool>)> {
    let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    while !jobs.is_closed {
        if let Some(name) = jobs.queue.pop_front() {
            jobs.is_busy = true;
            // As one with taking it from the queue: who stops it meanwhile finds it running.
            jobs.happened(&name, Event::Started);
            if let Some(known) = jobs.known.get_mut(&name) {
                known.stop = Arc::default();
                let begun = (known.record.clone(), known.stop.clone());
                drop(jobs);
                changed.notify_all();
                return Some(begun);
            }
        }
        jobs = changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
    }
    None
}
