//! How good a network is on held-out cases: whole volumes through a sliding window, overlap per class, lesions found.

mod components;
mod dice;
mod distance;
mod lesion_level;
mod sliding_window;

pub use components::{component_of, components};
pub use dice::{ClassScore, Overlap, mean_scores, overlap};
pub use distance::{dilated, squared_distance_mm};
pub use lesion_level::{LesionScore, lesion_level};
pub(crate) use sliding_window::forward;
pub use sliding_window::{Blending, SlidingWindow, argmax, predict};
