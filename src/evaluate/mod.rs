//! How good a network is on held-out cases: whole volumes through a sliding window, overlap per class, lesions found.

mod dice;
mod lesion_level;
mod sliding_window;

pub use dice::{ClassScore, Overlap, mean_scores, overlap};
pub use lesion_level::{LesionScore, lesion_level};
pub(crate) use sliding_window::forward;
pub use sliding_window::{Blending, SlidingWindow, argmax, predict};
