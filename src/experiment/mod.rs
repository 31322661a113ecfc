//! The experiment: does the method's claim hold here? One segmentor, trained for the same steps on what each arm allows and
//! tested on scanners that no labelled patient came from.
//!
//! ```text
//! cohort: phantoms -> stores: labelled + healthy | labelled + the same patients with their tumours | test
//!                       -> critic, synthesizer: once per seed and number of patients
//!                       -> segmentor: once per arm, seed and number of patients -> predictions, Dice of every test case
//!                                                     -> results: JSON, table, plots; comparisons by paired bootstrap
//! ```
//!
//! A run that is done is never repeated while configuration and code revision stay the same; `docs/experiments/` holds what
//! came out.

mod arm;
mod cohort;
mod compare;
mod config;
mod document;
mod identity;
mod results;
mod run;

pub use arm::{Arm, RunKey};
pub use compare::{PairedDifference, paired_difference};
pub use config::{ExperimentConfig, Setting};
pub use document::{Picture, page, pictures};
pub use results::{Calibrated, Results, RunRecord};
pub use run::{Experiment, Workplace};

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::evaluate::EvaluateError;
use crate::learn::LearnError;
use crate::store::StoreError;
use crate::stream::{StartError, StreamError};

/// Why an experiment cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    /// A patch could not be streamed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A configuration value outside its range.
    #[error("experiment.{key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// The allowed range.
        expected: &'static str,
        /// What was found.
        got: String,
    },
    /// A file of results that cannot be read.
    #[error("{path}: {what}")]
    Results {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A prediction could not be written.
    #[error("{path}: {what}")]
    Prediction {
        /// The file.
        path: PathBuf,
        /// The writer's reason.
        what: String,
    },
    /// A stage failed, or was asked to stop.
    #[error(transparent)]
    Learn(#[from] LearnError),
    /// A store could not be made or read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Models could not be loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The service did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Test cases could not be scored.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
