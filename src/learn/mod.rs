//! The three training stages: critic, synthesizer, segmentor. One loop serves all of them; every choice is a function of
//! the seed and the step, so that a run that goes on after a stop ends with the same weights.

mod adversary;
mod augment;
mod calibrate;
mod check;
mod choice;
mod conditional;
mod critic;
mod cubes;
mod drawing;
mod fit;
mod guard;
mod held_out;
mod inner;
mod learner;
#[cfg(test)]
#[path = "../../tests/looks/mod.rs"]
mod looks;
mod models;
#[cfg(test)]
#[path = "../../tests/common/npz.rs"]
mod npz;
mod numbers;
mod optimise;
mod painted;
mod painting;
mod promote;
mod published;
mod rivals;
mod segmentor;
mod split;
mod steering;
mod synthesizer;
mod synthesizer_settings;
mod texture;
mod validation;

pub use augment::LookSettings;
pub use choice::NetworkChoice;
pub use critic::{CriticConfig, CriticReport, train_critic};
pub use fit::{FitSettings, Fitted, Job, Metrics, Progress, Quiet, Trainee, fit};
pub use guard::GuardSettings;
pub use optimise::{Optimizer, OptimizerSettings, Rule, Schedule};
pub use painting::PaintingScore;
pub use promote::{Promotion, promote_segmentor};
pub use segmentor::{SegmentorConfig, SegmentorReport, check_segmentor, train_segmentor};
pub use split::Split;
pub use steering::{Mix, SteeringSettings};
pub use synthesizer::train_synthesizer;
pub use synthesizer_settings::{LossWeights, Method, PublishedSettings, SynthesizerConfig, SynthesizerReport};
pub use validation::{Keep, ValidationSettings};

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::evaluate::EvaluateError;
use crate::store::StoreError;
use crate::stream::StreamError;
use crate::volume::LabelError;

/// Why a training run cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// A configuration value outside its range.
    #[error("{key}: expected {expected}, got {got}")]
    Config {
        /// The key, with its section.
        key: String,
        /// The allowed range.
        expected: String,
        /// What was found.
        got: String,
    },
    /// Cases that lack what the stage needs.
    #[error("cannot train on this store: {0}")]
    Data(String),
    /// A loss or gradient that is NaN or infinite; nothing of that step was saved.
    #[error("step {step}: {metric} is {value}; the last checkpoint is untouched, a lower learning rate may help")]
    NotFinite {
        /// The step.
        step: u64,
        /// What is not finite.
        metric: String,
        /// Its value.
        value: f64,
    },
    /// Stage 2 has stopped to make sense.
    #[error(
        "step {step}: {cause} ({value:.3} against {bound} for {steps} steps); the last checkpoint is untouched; {advice}"
    )]
    Guard {
        /// The step.
        step: u64,
        /// What went wrong.
        cause: &'static str,
        /// The measure.
        value: f64,
        /// The bound that it crossed.
        bound: f64,
        /// For how many steps.
        steps: u64,
        /// What may help.
        advice: &'static str,
    },
    /// The run was asked to stop; it can be resumed.
    #[error("stopped after step {step}; resume goes on from there")]
    Stopped {
        /// Steps done.
        step: u64,
    },
    /// A training state that belongs to another configuration.
    #[error("{path}: {what}")]
    State {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A file of folds that cannot be used.
    #[error("{path}: {what}")]
    Folds {
        /// The file.
        path: PathBuf,
        /// The fold or case, and what is wrong with it.
        what: String,
    },
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A model could not be saved or loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A case could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A patch could not be streamed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Held-out cases could not be scored.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// A case's classes are not those of the plan.
    #[error(transparent)]
    Label(#[from] LabelError),
}
