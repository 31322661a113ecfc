//! Models on disk: safetensors and a JSON manifest each, hashed together as a bundle.

mod bundle;
mod calibration;

pub use bundle::{Bundle, Provenance};
pub use calibration::{Calibration, CalibrationEntry, Thresholds};
