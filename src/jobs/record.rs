//! What a job is, and how it stands.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::journal::VALIDATION;
use super::{Entry, Event, JobError, JobName};
use crate::checkpoint::write_atomically;
use crate::digest::Digest;
use crate::learn::{Metrics, SegmentorConfig};

/// No job's file is larger: recipes with 10^4 held-out cases fit.
const MAX_RECORD_BYTES: u64 = 8 << 20;

/// What a job is; it never changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRecord {
    /// Its name.
    pub name: JobName,
    /// The complete configuration; its recipe names the models by their hash.
    pub config: SegmentorConfig,
    /// The name under which these models were listed when it was submitted.
    pub models: Option<String>,
    /// Hash of the recipe's canonical form.
    pub recipe: Digest,
    /// Hash of the store's cases and plan.
    pub snapshot: Digest,
}

impl JobRecord {
    fn path(folder: &Path) -> PathBuf {
        folder.join("job.json")
    }

    /// Writes it, once.
    pub(super) fn write(&self, folder: &Path) -> Result<(), JobError> {
        let json = serde_json::to_vec_pretty(self).expect("a job is representable in JSON");
        Ok(write_atomically(&Self::path(folder), &json)?)
    }

    /// Reads what a folder holds; nothing where it is no job's.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>, JobError> {
        let path = Self::path(folder);
        let refused = |what: String| JobError::File {
            path: path.clone(),
            what,
        };
        match fs_err::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
            Ok(found) if found.len() > MAX_RECORD_BYTES => {
                let got = found.len();
                return Err(refused(format!("expected at most {MAX_RECORD_BYTES} bytes, got {got}")));
            }
            Ok(_) => {}
        }
        let record: Self =
            serde_json::from_slice(&fs_err::read(&path)?).map_err(|error| refused(format!("not a job: {error}")))?;
        if folder.file_name().is_none_or(|name| name != record.name.as_str()) {
            return Err(refused(format!("the job is named {}, its folder is not", record.name)));
        }
        Ok(Some(record))
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It waits for its turn.
    Queued,
    /// It trains.
    Running,
    /// Somebody stopped it.
    Stopped,
    /// The server shut down; it waits for the next one.
    Interrupted,
    /// Its model is there.
    Finished,
    /// It failed.
    Failed,
}

impl JobState {
    /// Tells whether nothing happens before somebody, or a new server, lets the job go on.
    pub fn is_end(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Interrupted => "interrupted",
            Self::Finished => "finished",
            Self::Failed => "failed",
        })
    }
}

/// How a job stands.
#[derive(Clone, Debug, Serialize)]
pub struct JobStatus {
    /// Its name.
    pub name: JobName,
    /// Where it stands.
    pub state: JobState,
    /// Steps made, as far as they were told.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// What the last step measured.
    pub metrics: Metrics,
    /// The last mean Dice on held-out cases, where there was a validation.
    pub validation_dice: Option<f64>,
    /// Patches learnt from per second, while it runs.
    pub patches_per_second: Option<f64>,
    /// Why it failed.
    pub failure: Option<String>,
    /// The last event's number.
    pub last_event: u64,
    /// When it was queued last, in milliseconds since 1970.
    #[serde(skip)]
    pub(super) queued_ms: u64,
    /// Whether somebody asked for its stop since it began.
    #[serde(skip)]
    pub(super) is_stopping: bool,
}

impl JobStatus {
    /// A job of which nothing is known yet.
    pub(super) fn new(record: &JobRecord) -> Self {
        Self {
            name: record.name.clone(),
            state: JobState::Queued,
            step: 0,
            steps: record.config.steps,
            metrics: Metrics::new(),
            validation_dice: None,
            patches_per_second: None,
            failure: None,
            last_event: 0,
            queued_ms: 0,
            is_stopping: false,
        }
    }

    /// Takes note of an event.
    pub(super) fn take(&mut self, entry: &Entry) {
        self.last_event = entry.id;
        let state = match &entry.event {
            Event::Queued => JobState::Queued,
            Event::Started | Event::Stopping | Event::Note { .. } => JobState::Running,
            Event::Step {
                step,
                steps,
                metrics,
                patches_per_second,
            } => {
                (self.step, self.steps) = (*step, *steps);
                self.patches_per_second = Some(*patches_per_second);
                self.validation_dice = metrics.get(VALIDATION).copied().or(self.validation_dice);
                self.metrics.clone_from(metrics);
                JobState::Running
            }
            Event::Stopped => JobState::Stopped,
            Event::Interrupted => JobState::Interrupted,
            Event::Finished => JobState::Finished,
            Event::Failed { .. } => JobState::Failed,
        };
        if entry.event == Event::Queued {
            self.queued_ms = entry.unix_ms;
        }
        match &entry.event {
            Event::Queued | Event::Started => self.is_stopping = false,
            Event::Stopping => self.is_stopping = true,
            _ => {}
        }
        self.failure = match &entry.event {
            Event::Failed { what } => Some(what.clone()),
            _ => None,
        };
        if state != JobState::Running {
            self.patches_per_second = None;
        }
        self.state = state;
    }
}
