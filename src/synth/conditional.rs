//! The synthesizer with our conditional generator, which lives on the device thread.

use std::sync::Arc;

use ndarray::Array3;

use super::{Engine, LesionCube, SynthError, Synthesizer};

/// Paints with the bundle's generator.
pub struct Conditional {
    engine: Arc<Engine>,
}

impl Conditional {
    /// Makes a handle on the engine's generator.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

impl Synthesizer for Conditional {
    fn name(&self) -> &'static str {
        "conditional"
    }

    fn needs_weights(&self) -> bool {
        true
    }

    fn residuals(&self, batch: &[LesionCube]) -> Result<Vec<Array3<f32>>, SynthError> {
        batch.iter().map(|cube| self.engine.paint(cube)).collect()
    }
}
