//! What becomes of inputs that are refused unless somebody has decided otherwise.

use serde::{Deserialize, Serialize};

/// Decisions about unusual files; part of what decides what a case becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IngestConfig {
    /// Image voxels that are NaN or infinite: `refuse` the case, or read them as `air`.
    pub not_finite: NotFinite,
    /// Labels on another grid than their image: `refuse` the case, or `resample` them to the nearest label.
    pub label_grid: LabelGrid,
    /// Which volume of a file that holds several is read, from 0; absent: such a file is refused.
    pub volume: Option<u32>,
}

/// What becomes of image voxels that are NaN or infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotFinite {
    /// The case is refused with their number.
    #[default]
    Refuse,
    /// They are air, and a warning has their number.
    Air,
}

/// What becomes of labels on another grid than their image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelGrid {
    /// The case is refused, and both files are named.
    #[default]
    Refuse,
    /// Every voxel of the image takes the nearest label; a warning has both shapes and what fell outside.
    Resample,
}
