//! The synthesizer with the paper's generator and equation, which lives on the device thread.

use std::sync::Arc;

use ndarray::Array3;

use super::{Engine, LesionCube, SynthError, Synthesizer};
use crate::lesion::published::texture_crop;
use crate::rng::{Purpose, Rng};

/// Paints with the bundle's published generator. What contrast comes of it is the network's to decide: the one requested is not
/// heard.
///
/// # Source
/// FreeTumor's synthesis equation, x' = x - M d t in the organ (method, section 3.2). Departure: M is the recipe's mask with its
/// soft edge, so that outside of it nothing changes (promise P5); the paper's is a blurred one, whose rim is darkened and labelled
/// organ. Departure: the generator sees the lesion's cube, which is the training patch where the sides in the manifest say so.
pub struct PublishedGan {
    engine: Arc<Engine>,
}

impl PublishedGan {
    /// Makes a handle on the engine's published generator.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

impl Synthesizer for PublishedGan {
    fn name(&self) -> &'static str {
        "published"
    }

    fn needs_weights(&self) -> bool {
        true
    }

    fn residuals(&self, batch: &[LesionCube]) -> Result<Vec<Array3<f32>>, SynthError> {
        let paint = |cube: &LesionCube| {
            let [seed, index, attempt] = cube.key;
            let texture = texture_crop(
                cube.image.dim().into(),
                &mut Rng::keyed(seed, index, attempt, Purpose::Texture),
            );
            self.engine.paint_published(cube, texture)
        };
        batch.iter().map(paint).collect()
    }
}
