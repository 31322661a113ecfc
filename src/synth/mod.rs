//! Lesions painted into healthy organs, and the gate that judges them.

mod settings;

pub use settings::{GateRule, GateSettings, SynthesizerKind};
