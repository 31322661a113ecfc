//! FreeTumor: synthesizes, filters and streams CT tumour patches with labels to any segmentation trainer.
//!
//! ```text
//!  NIfTI + datalist                                       trainer (PyTorch / MONAI / nnU-Net / curl)
//!        |                                                        ^  HTTP frames
//!     ingest -> store -> sampler -> lesion -> synth -> gate -> stream -> wire -> http
//!     phantom                                   ^
//!    organs                           checkpoint <- learn (stages 1, 2, 3) -> evaluate <- experiment
//!                                                     ^
//!                                                    jobs <- http
//! ```
//!
//! **Axes.** Arrays are `[B, C, D, H, W]`; voxels are ordered (z, y, x) and their indices grow towards Superior, Anterior
//! and Right. **Units.** Sizes and spacings in millimetres, intensities in integer Hounsfield units until they are
//! windowed at encode. **Labels.** Ids come from the plan's [`volume::LabelMap`]; 255 is *ignore*.

// The toy volumes of `tests/` name this crate from outside.
#[cfg(test)]
extern crate self as freetumor;

pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod digest;
pub mod evaluate;
pub mod experiment;
pub mod http;
pub mod ingest;
pub mod jobs;
pub mod kernel;
pub mod learn;
pub mod lesion;
pub mod nn;
pub mod organs;
mod panic;
pub mod phantom;
pub mod rng;
pub mod sampler;
pub mod store;
pub mod stream;
pub mod synth;
pub mod telemetry;
#[cfg(test)]
#[path = "../tests/toy/mod.rs"]
mod toy;
pub mod volume;
pub mod wire;
