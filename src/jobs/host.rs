//! Takes jobs, runs one at a time on a thread of its own, and lets others look at them.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use metrics::gauge;
use serde::{Deserialize, Serialize};

use super::journal::{Journal, JournalReader};
use super::run::run;
use super::{Entry, Event, JobError, JobName, JobRecord, JobState, JobStatus};
use crate::digest::Digest;
use crate::kernel::ComputeDtype;
use crate::learn::{SegmentorConfig, check_segmentor};
use crate::store::Cases;
use crate::stream::{PatchService, Weights};
use crate::telemetry::metrics::{TRAININGS_QUEUED, TRAININGS_RUNNING};

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

struct Known {
    record: Arc<JobRecord>,
    status: JobStatus,
    journal: Journal,
    stop: Arc<AtomicBool>,
}

#[derive(Default)]
struct Jobs {
    known: BTreeMap<JobName, Known>,
    queue: VecDeque<JobName>,
    is_closed: bool,
    /// Whether the training thread is at work on a job.
    is_busy: bool,
}

/// What hosts trainings. Dropping it stops them with a checkpoint.
pub struct TrainingHost {
    parts: Arc<TrainingParts>,
    jobs: Arc<(Mutex<Jobs>, Condvar)>,
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
        let host = Self {
            parts: Arc::new(parts),
            jobs: Arc::new((Mutex::new(jobs), Condvar::new())),
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
        let resolved = check_segmentor(&config, &*self.parts.service, &*self.parts.cases)?;
        let needs_models = resolved.bundle != Digest::default();
        config.recipe.bundle = needs_models.then(|| resolved.bundle.to_string());
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
        fs_err::create_dir_all(&folder)?;
        record.write(&folder)?;
        let status = jobs.insert(record, &self.parts)?;
        jobs.tell(&status.name, Event::Queued)?;
        jobs.queue.push_back(status.name.clone());
        let status = jobs.get(status.name.as_str())?.status.clone();
        drop(jobs);
        self.jobs.1.notify_all();
        Ok(status)
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
            JobState::Running => stop.store(true, Ordering::Relaxed),
            JobState::Queued => {
                let name = status.name.clone();
                jobs.queue.retain(|queued| *queued != name);
                jobs.tell(&name, Event::Stopped)?;
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
        jobs.queue.push_back(name.clone());
        let status = jobs.get(name.as_str())?.status.clone();
        drop(jobs);
        self.jobs.1.notify_all();
        Ok(status)
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
        Ok(Follower {
            reader: JournalReader::new(&events_path(&self.parts, &name)),
            host: self.clone(),
            name,
            after,
        })
    }

    /// Stops the job that trains with a checkpoint, takes no more, and waits until it is done or the time is over.
    pub fn close(&self, time: Duration) {
        let mut jobs = self.lock();
        jobs.is_closed = true;
        for known in jobs.known.values() {
            known.stop.store(true, Ordering::Relaxed);
        }
        self.jobs.1.notify_all();
        let until = Instant::now() + time;
        while jobs.is_busy {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("the time is over; the training goes on from its last checkpoint at the next start");
                return;
            }
            let waited = self.jobs.1.wait_timeout(jobs, left);
            jobs = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for TrainingHost {
    fn drop(&mut self) {
        self.close(Duration::ZERO);
    }
}

/// What may be downloaded of a job.
const FILES: [&str; 5] = [
    "segmentor.safetensors",
    "segmentor.json",
    "segmentor.report.json",
    "segmentor.metrics.jsonl",
    "segmentor.state.safetensors",
];

fn events_path(parts: &TrainingParts, name: &JobName) -> PathBuf {
    parts.root.join(name.as_str()).join("events.jsonl")
}

/// Takes the folder for this process.
fn lock(parts: &TrainingParts) -> Result<fs_err::File, JobError> {
    let path = parts.root.join("lock");
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

impl Jobs {
    /// Finds the jobs of a folder, and queues those that were under way, the longest known first.
    fn find(parts: &TrainingParts) -> Result<Self, JobError> {
        let (mut jobs, mut under_way) = (Self::default(), Vec::new());
        for entry in fs_err::read_dir(&parts.root)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let Some(record) = JobRecord::read(&entry.path())? else {
                continue;
            };
            let status = jobs.insert(record, parts)?;
            if matches!(
                status.state,
                JobState::Running | JobState::Interrupted | JobState::Queued
            ) {
                under_way.push((status.state == JobState::Queued, status.last_event, status.name));
            }
        }
        // What trained before goes first.
        under_way.sort();
        for (_, _, name) in under_way {
            tracing::info!(%name, "the training goes on");
            jobs.tell(&name, Event::Queued)?;
            jobs.queue.push_back(name);
        }
        Ok(jobs)
    }

    fn get(&self, name: &str) -> Result<&Known, JobError> {
        let parsed = name.parse::<JobName>().ok();
        let known = parsed.and_then(|name| self.known.get(&name));
        known.ok_or_else(|| JobError::Unknown(name.chars().take(80).collect()))
    }

    fn admit(&self, name: &JobName, config: &JobsConfig) -> Result<(), JobError> {
        if self.known.contains_key(name) {
            return Err(JobError::Exists(name.clone()));
        }
        if self.known.len() >= config.max_kept {
            let limit = config.max_kept;
            return Err(JobError::TooMany { limit });
        }
        self.admit_one_more(config)
    }

    fn admit_one_more(&self, config: &JobsConfig) -> Result<(), JobError> {
        if self.is_closed {
            return Err(JobError::Stopping);
        }
        if self.queue.len() >= config.max_queued {
            let limit = config.max_queued;
            return Err(JobError::Full { limit });
        }
        Ok(())
    }

    /// Opens a job's journal and takes it in.
    fn insert(&mut self, record: JobRecord, parts: &TrainingParts) -> Result<JobStatus, JobError> {
        let (journal, last) = Journal::open(&events_path(parts, &record.name))?;
        let mut status = JobStatus::new(&record);
        last.iter().for_each(|entry| status.take(entry));
        let known = Known {
            status: status.clone(),
            journal,
            stop: Arc::default(),
            record: Arc::new(record),
        };
        self.known.insert(status.name.clone(), known);
        Ok(status)
    }

    /// Writes an event down, and only then lets it count.
    fn tell(&mut self, name: &JobName, event: Event) -> Result<(), JobError> {
        if let Some(known) = self.known.get_mut(name) {
            let entry = known.journal.append(event)?;
            known.status.take(&entry);
        }
        gauge!(TRAININGS_QUEUED).set(self.queue.len() as f64);
        Ok(())
    }
}

/// The training thread: one job after the other.
fn work(parts: &TrainingParts, jobs: &(Mutex<Jobs>, Condvar)) {
    let tell = |name: &JobName, event: Event| {
        let mut locked = jobs.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk must not stop a training that may still have room for its checkpoint elsewhere.
        if let Err(error) = locked.tell(name, event) {
            tracing::error!(%name, %error, "an event of a training cannot be written down");
        }
        drop(locked);
        jobs.1.notify_all();
    };
    while let Some((record, stop)) = next(jobs) {
        let name = &record.name;
        tell(name, Event::Started);
        tracing::info!(%name, steps = record.config.steps, "training");
        gauge!(TRAININGS_RUNNING).set(1.0);
        let folder = parts.root.join(name.as_str());
        let ended = run(&record, (parts, &folder), &stop, &mut |event| tell(name, event));
        gauge!(TRAININGS_RUNNING).set(0.0);
        let is_closed = jobs.0.lock().unwrap_or_else(PoisonError::into_inner).is_closed;
        let ended = match ended {
            Event::Stopped if is_closed => Event::Interrupted,
            ended => ended,
        };
        tracing::info!(%name, ended = ended.name(), "the training ended");
        tell(name, ended);
        jobs.0.lock().unwrap_or_else(PoisonError::into_inner).is_busy = false;
        jobs.1.notify_all();
    }
}

/// Waits for a job; nothing once the host is closed.
fn next((jobs, changed): &(Mutex<Jobs>, Condvar)) -> Option<(Arc<JobRecord>, Arc<AtomicBool>)> {
    let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    while !jobs.is_closed {
        if let Some(name) = jobs.queue.pop_front() {
            jobs.is_busy = true;
            if let Some(known) = jobs.known.get_mut(&name) {
                known.stop = Arc::default();
                return Some((known.record.clone(), known.stop.clone()));
            }
        }
        jobs = changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
    }
    None
}

/// Follows a job's events.
pub struct Follower {
    host: Arc<TrainingHost>,
    name: JobName,
    reader: JournalReader,
    after: u64,
}

impl Follower {
    /// Blocks for the next events, some at a time: none where nothing happened within a time, or nothing any more once
    /// one said that the job has ended.
    ///
    /// # Errors
    /// [`JobError`] names the file.
    pub fn next(&mut self, time: Duration) -> Result<Vec<Entry>, JobError> {
        let until = Instant::now() + time;
        loop {
            let mut entries = self.reader.read()?;
            let is_end = entries.is_empty();
            entries.retain(|entry| entry.id > self.after);
            if let Some(last) = entries.last() {
                self.after = last.id;
                return Ok(entries);
            }
            // Old events of a long journal come in chunks.
            if is_end && !self.wait(until) {
                return Ok(entries);
            }
        }
    }

    /// Tells whether the job has ended and every event was read.
    pub fn is_over(&self) -> bool {
        let jobs = self.host.lock();
        let status = jobs.known.get(&self.name).map(|known| &known.status);
        status.is_none_or(|status| status.last_event == self.after && status.state.is_end())
    }

    /// Waits until there is an event that was not read; `false` where there is none in time.
    fn wait(&self, until: Instant) -> bool {
        let mut jobs = self.host.lock();
        loop {
            let last = jobs.known.get(&self.name).map_or(0, |known| known.status.last_event);
            let left = until.saturating_duration_since(Instant::now());
            if last > self.after || left.is_zero() {
                return last > self.after;
            }
            let waited = self.host.jobs.1.wait_timeout(jobs, left);
            jobs = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
