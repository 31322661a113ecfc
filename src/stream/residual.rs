//! What a synthesizer changes: on the models' grid, brought back to the store's.

use ndarray::Array3;

use super::make::Maker;
use crate::nn::ContrastOver;
use crate::synth::{
    Analytic, Conditional, GridBridge, LesionCube, PublishedGan, SynthError, Synthesizer, SynthesizerKind, shift_mean,
};

impl Maker {
    /// Returns the residual of a lesion on the store's grid.
    pub(super) fn residual(
        &self,
        synthesizer: Option<SynthesizerKind>,
        cube: &LesionCube,
        bridge: Option<&GridBridge>,
    ) -> Result<Array3<f32>, SynthError> {
        let paint = |synthesizer: &dyn Synthesizer, cube: &LesionCube| {
            let residuals = synthesizer.residuals(std::slice::from_ref(cube))?;
            residuals.into_iter().next().ok_or(SynthError::Ended)
        };
        if synthesizer == Some(SynthesizerKind::Analytic) {
            return paint(&Analytic, cube);
        }
        let engine = self.engine.as_ref().ok_or(SynthError::NoModel("generator"))?;
        let trained: &dyn Synthesizer = match synthesizer {
            Some(SynthesizerKind::Published) => &PublishedGan::new(engine.clone()),
            _ => &Conditional::new(engine.clone()),
        };
        match bridge {
            Some(bridge) => {
                let seen = bridge.lesion_view(cube);
                let mut residual = bridge.residual(&paint(trained, &seen)?, &seen, cube);
                if synthesizer != Some(SynthesizerKind::Published) && self.keeps_means() {
                    shift_mean(&mut residual, &cube.soft, cube.contrast_hu);
                }
                Ok(residual)
            }
            None => paint(trained, cube),
        }
    }

    /// Tells whether the generator's lesions have the requested contrast in the mean: what holds on its own grid shall hold on the store's.
    fn keeps_means(&self) -> bool {
        let generator = self.bundle.as_ref().and_then(|bundle| bundle.generator.as_ref());
        generator.is_some_and(|generator| generator.contrast_over() == ContrastOver::Lesion)
    }
}
