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

/// What lies in the middle half of a patch of the labelled-real pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Centre {
    /// A tumour of the organ; where the case has none, the organ.
    Tumour,
    /// The organ.
    Organ,
    /// Any voxel of the volume.
    Anywhere,
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
    /// Probability of a blur by one voxel (weights 1/4, 1/2, 1/4 along each axis).
    #[serde(skip_serializing_if = "is_zero")]
    pub blur: f64,
    /// Largest standard deviation of added noise in HU; each patch draws its own.
    #[serde(skip_serializing_if = "is_zero")]
    pub noise_hu: f64,
    /// Probability of a warp: rotation, zoom and elastic deformation together, by interpolation. Unlike the changes above,
    /// it costs some tens of milliseconds per patch of 96^3.
    pub warp: f64,
    /// Of a warp: the largest rotation about each axis, in degrees.
    pub rotation_deg: f64,
    /// Of a warp: the largest factor by which things grow or shrink.
    pub zoom: f64,
    /// Of a warp: standard deviation of the elastic displacement's control points, which lie 32 mm apart, in mm.
    pub elastic_mm: f64,
}

/// What is off is left out, so that recipes keep the hash that they had before these settings existed.
fn is_zero(value: &f64) -> bool {
    *value == 0.0
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
            blur: 0.0,
            noise_hu: 0.0,
            warp: 0.0,
            rotation_deg: 15.0,
            zoom: 1.25,
            elastic_mm: 2.0,
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
            blur: 0.0,
            noise_hu: 0.0,
            warp: 0.0,
            rotation_deg: 0.0,
            zoom: 1.0,
            elastic_mm: 0.0,
        }
    }
}
