//! The jobs of a folder: found, taken in, queued.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use metrics::gauge;

use super::journal::Journal;
use super::{Event, JobError, JobName, JobRecord, JobState, JobStatus, JobsConfig, TrainingParts};
use crate::telemetry::metrics::TRAININGS_QUEUED;

/// What the folder of a job is called, before its name, while it is removed.
pub(super) const REMOVED: &str = ".removed-";

/// A job, and the end of its journal.
pub(super) struct Known {
    pub record: Arc<JobRecord>,
    pub status: JobStatus,
    pub journal: Journal,
    pub stop: Arc<AtomicBool>,
}

/// Every job, by name.
#[derive(Default)]
pub(super) struct Jobs {
    pub known: BTreeMap<JobName, Known>,
    pub queue: VecDeque<JobName>,
    pub is_closed: bool,
    /// Whether the training thread is at work on a job.
    pub is_busy: bool,
}

impl Jobs {
    /// Finds the jobs of a folder, and queues those that were under way: what trained before, then what waited, the longest first.
    pub fn find(parts: &TrainingParts) -> Result<Self, JobError> {
        let (mut jobs, mut under_way) = (Self::default(), Vec::new());
        for entry in fs_err::read_dir(&parts.root)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            if entry.file_name().to_string_lossy().starts_with(REMOVED) {
                // Its removal was cut off.
                fs_err::remove_dir_all(entry.path())?;
                continue;
            }
            let Some(record) = JobRecord::read(&entry.path())? else {
                continue;
            };
            let status = jobs.insert(record, parts)?;
            if status.is_stopping && status.state == JobState::Running {
                jobs.tell(&status.name, Event::Stopped)?;
            } else if matches!(
                status.state,
                JobState::Running | JobState::Interrupted | JobState::Queued
            ) {
                under_way.push((status.state == JobState::Queued, status.queued_ms, status.name));
            }
        }
        under_way.sort();
        for (waited, _, name) in under_way {
            tracing::info!(%name, "the training goes on");
            jobs.queue.push_back(name.clone());
            // Who waited keeps its turn, and the time since which it has waited.
            if !waited {
                jobs.tell(&name, Event::Queued)?;
            }
        }
        gauge!(TRAININGS_QUEUED).set(jobs.queue.len() as f64);
        Ok(jobs)
    }

    pub fn get(&self, name: &str) -> Result<&Known, JobError> {
        let parsed = name.parse::<JobName>().ok();
        let known = parsed.and_then(|name| self.known.get(&name));
        known.ok_or_else(|| JobError::Unknown(name.chars().take(80).collect()))
    }

    pub fn admit(&self, name: &JobName, config: &JobsConfig) -> Result<(), JobError> {
        if self.known.contains_key(name) {
            return Err(JobError::Exists(name.clone()));
        }
        if self.known.len() >= config.max_kept {
            let limit = config.max_kept;
            return Err(JobError::TooMany { limit });
        }
        self.admit_one_more(config)
    }

    pub fn admit_one_more(&self, config: &JobsConfig) -> Result<(), JobError> {
        if self.is_closed {
            return Err(JobError::Stopping);
        }
        if self.queue.len() >= config.max_queued {
            let limit = config.max_queued;
            return Err(JobError::Full { limit });
        }
        Ok(())
    }

    /// Lets a job wait for its turn.
    pub fn queue(&mut self, name: JobName) {
        self.queue.push_back(name);
        gauge!(TRAININGS_QUEUED).set(self.queue.len() as f64);
    }

    /// Takes a job out of those that wait.
    pub fn unqueue(&mut self, name: &JobName) {
        self.queue.retain(|queued| queued != name);
        gauge!(TRAININGS_QUEUED).set(self.queue.len() as f64);
    }

    /// Writes a new job down and queues it.
    pub fn enter(&mut self, record: JobRecord, folder: &Path, parts: &TrainingParts) -> Result<JobStatus, JobError> {
        record.write(folder)?;
        let name = self.insert(record, parts)?.name;
        if let Err(error) = self.tell(&name, Event::Queued) {
            self.known.remove(&name);
            return Err(error);
        }
        self.queue(name.clone());
        Ok(self.get(name.as_str())?.status.clone())
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
    pub fn tell(&mut self, name: &JobName, event: Event) -> Result<(), JobError> {
        if let Some(known) = self.known.get_mut(name) {
            let entry = known.journal.entry(event);
            known.journal.append(&entry)?;
            known.status.take(&entry);
        }
        gauge!(TRAININGS_QUEUED).set(self.queue.len() as f64);
        Ok(())
    }

    /// Lets an event count that has happened, and writes it down if that is possible: a training that failed on a full disk does
    /// not go on running because nobody could write that it failed.
    pub fn happened(&mut self, name: &JobName, event: Event) {
        if let Some(known) = self.known.get_mut(name) {
            let entry = known.journal.entry(event);
            let last = known.status.last_event;
            let written = known.journal.append(&entry);
            known.status.take(&entry);
            if let Err(error) = written {
                tracing::error!(%name, %error, event = entry.event.name(), "an event of a training cannot be written down");
                // Who follows reads the journal, and would wait for ever for what is not there.
                known.status.last_event = last;
            }
        }
        gauge!(TRAININGS_QUEUED).set(self.queue.len() as f64);
    }
}

/// Returns where a job's journal lies.
pub(super) fn events_path(parts: &TrainingParts, name: &JobName) -> PathBuf {
    parts.root.join(name.as_str()).join("events.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::learn::SegmentorConfig;

    #[test]
    fn a_training_has_failed_also_where_that_cannot_be_written_down() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        std::fs::write(&path, "").unwrap();
        let name: JobName = "a".parse().unwrap();
        let record = JobRecord {
            name: name.clone(),
            config: SegmentorConfig::default(),
            models: None,
            recipe: Digest::default(),
            snapshot: Digest::default(),
        };
        let known = Known {
            status: JobStatus::new(&record),
            journal: Journal::unwritable(&path),
            stop: Arc::default(),
            record: Arc::new(record),
        };
        let mut jobs = Jobs::default();
        jobs.known.insert(name.clone(), known);
        assert!(jobs.tell(&name, Event::Started).is_err());
        assert_eq!(jobs.known[&name].status.state, JobState::Queued);
        jobs.happened(&name, Event::Started);
        assert_eq!(jobs.known[&name].status.state, JobState::Running);
        let why = "no space left on device".to_owned();
        jobs.happened(&name, Event::Failed { what: why });
        let status = &jobs.known[&name].status;
        assert_eq!((status.state, status.last_event), (JobState::Failed, 0));
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
