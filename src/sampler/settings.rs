//! What a recipe says of pools and augmentation.

use serde::{Deserialize, Serialize};

/// Where a patch's voxels come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// Labelled cases as they are.
    LabelledReal,
    /// Labelled cases with a synthesized lesion.
    LabelledHost,
    /// Unlabelled (organ masks only) cases with a synthesized lesion.
    UnlabelledHost,
}

impl Pool {
    /// All pools.
    pub const ALL: [Self; 3] = [Self::LabelledReal, Self::LabelledHost, Self::UnlabelledHost];

    /// Returns the name used in recipes and metrics.
    pub fn name(self) -> &'static str {
        ["labelled_real", "labelled_host", "unlabelled_host"][self as usize]
    }
}

/// Random changes after synthesis, applied alike to image, labels and optional outputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Augmentation {
    /// Probability of a mirror along each axis (z, y, x).
    pub flip: [f64; 3],
    /// Probability of a quarter, half or three-quarter turn in the axial plane.
    pub rotate90: f64,
    /// Probability of an intensity scale and shift.
    pub intensity: f64,
    /// Largest relative scale about the window's centre.
    pub scale: f64,
    /// Largest shift in HU.
    pub shift_hu: f64,
}

impl Default for Augmentation {
    /// Returns the published flips and turns (p 0.2) and intensity changes (p 0.1, 10 % of the window).
    fn default() -> Self {
        Self {
            flip: [0.2; 3],
            rotate90: 0.2,
            intensity: 0.1,
            scale: 0.1,
            shift_hu: 40.0,
        }
    }
}

impl Augmentation {
    /// Returns settings that change nothing.
    pub fn off() -> Self {
        Self {
            flip: [0.0; 3],
            rotate90: 0.0,
            intensity: 0.0,
            scale: 0.0,
            shift_hu: 0.0,
        }
    }
}
