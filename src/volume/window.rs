//! The intensity window that maps HU to the range networks see.

use serde::{Deserialize, Serialize};

/// An intensity window: HU at or below `low` become 0, at or above `high` become 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HuWindow {
    /// The HU that becomes 0.
    pub low: f32,
    /// The HU that becomes 1.
    pub high: f32,
}

impl Default for HuWindow {
    /// Returns the published abdomen window, -175 to 250 HU (FreeTumor, journal Table A19).
    fn default() -> Self {
        Self {
            low: -175.0,
            high: 250.0,
        }
    }
}

impl HuWindow {
    /// Returns a HU value in [0, 1], clipped.
    pub fn normalise(&self, hu: i16) -> f32 {
        ((f32::from(hu) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    /// Tells whether the bounds are finite and in order.
    pub fn is_valid(&self) -> bool {
        self.low.is_finite() && self.high.is_finite() && self.low < self.high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_clips_and_scales() {
        let window = HuWindow::default();
        assert_eq!(
            [-1024, -175, 250, 900].map(|hu| window.normalise(hu)),
            [0.0, 0.0, 1.0, 1.0]
        );
        assert!((window.normalise(38) - 213.0 / 425.0).abs() < 1e-6);
    }
}
