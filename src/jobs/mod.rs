//! Hosted training: jobs that train the segmentor inside the server, on its own stream, without the wire.
//!
//! ```text
//! submit -> <root>/<name>/job.json  (what it is: never changed)
//!              |                    queue -> the training thread -> learn::train_segmentor -> checkpoints, model, report
//!              v                                  |  every event
//!           <root>/<name>/events.jsonl  <---------+  (what became of it: appended, never changed)
//! ```
//!
//! A job's state is its last event, so that a server that was killed finds its jobs as they were: those that ran or
//! waited go on, from their last checkpoint and to the same weights (on the CPU), those that somebody stopped stay
//! stopped. Knows nothing of HTTP.

mod follow;
mod host;
mod journal;
mod name;
mod promote;
mod record;
mod run;
mod table;
mod turn;

pub use follow::Follower;
pub use host::{JobsConfig, TrainingHost, TrainingParts};
pub use journal::{Entry, Event};
pub use name::JobName;
pub use promote::{ModelFolders, Promoted};
pub use record::{JobRecord, JobState, JobStatus};

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::learn::LearnError;
pub use crate::learn::SegmentorConfig as TrainingConfig;
use crate::stream::{ModelsError, StreamError};

/// Why a job cannot be taken, changed or read.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// A name that cannot be a folder's.
    #[error("name: expected 1 to {max} of a-z, 0-9, - and _, a letter or digit first, got {got:?}", max = name::MAX_LENGTH)]
    Name {
        /// What was given, shortened.
        got: String,
    },
    /// A name that is taken.
    #[error("there is a training {0} already; choose another name")]
    Exists(JobName),
    /// A folder of that name that is no job's.
    #[error("there is a folder {0} already that is no training's; choose another name")]
    Occupied(JobName),
    /// No job of that name.
    #[error("there is no training {0:?}")]
    Unknown(String),
    /// Models of that name are there already.
    #[error("there are models {0} already; choose another name")]
    ModelsExist(JobName),
    /// As many jobs wait as may.
    #[error("{limit} trainings are waiting, which is the configured limit")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// As many jobs are kept as may.
    #[error("{limit} trainings are kept, which is the configured limit; remove old ones")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// What is asked does not fit the job's state.
    #[error("training {name} is {state}: {what}")]
    State {
        /// The job.
        name: JobName,
        /// Its state.
        state: JobState,
        /// What was asked, and of which states it may be.
        what: &'static str,
    },
    /// A field of its configuration.
    #[error("{field}: {what}")]
    Field {
        /// The field, with its section.
        field: String,
        /// The allowed range and what was found.
        what: String,
    },
    /// A recipe that the store or the models cannot serve.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A store that cannot teach it, or a model that cannot be promoted.
    #[error("{0}")]
    Unfit(String),
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Stopping,
    /// Models under a name that cannot be used.
    #[error(transparent)]
    Models(#[from] ModelsError),
    /// A model that could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file of a job that is not what it should be.
    #[error("{path}: {what}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl From<LearnError> for JobError {
    fn from(error: LearnError) -> Self {
        match error {
            LearnError::Config { key, expected, got } => Self::Field {
                field: key,
                what: format!("expected {expected}, got {got}"),
            },
            LearnError::Stream(error) => Self::Stream(error),
            LearnError::Checkpoint(error) => Self::Checkpoint(error),
            LearnError::Io(error) => Self::Io(error),
            other => Self::Unfit(other.to_string()),
        }
    }
}
