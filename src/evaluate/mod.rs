//! How good a network is on held-out cases: whole volumes through a sliding window, overlap per class, lesions found.

mod dice;
mod held_out;
mod lesion_level;
mod sliding_window;

pub use dice::{ClassScore, Overlap, mean_scores, overlap};
pub use held_out::{Examination, HeldOut, HeldOutSettings, score_held_out};
pub use lesion_level::{LesionScore, lesion_level};
pub(crate) use sliding_window::forward;
pub use sliding_window::{Blending, SlidingWindow, argmax, predict};

/// Why a case cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// It cannot be read.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// Its classes are not those of the plan.
    #[error(transparent)]
    Label(#[from] crate::volume::LabelError),
}
