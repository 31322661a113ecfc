//! Lesions painted into healthy organs, and the gate that judges them.

pub mod gate;
mod settings;

pub use settings::{GateRule, GateSettings, SynthesizerKind};
