//! The part of `src/synth` that recipes are made of.

#[path = "../../src/synth/settings.rs"]
mod settings;
pub use settings::{GateRule, GateSettings, SynthesizerKind};
