//! The gate's thresholds, calibrated on real lesions.

use serde::{Deserialize, Serialize};

use crate::volume::{ContrastBin, SizeClass};

/// Least scores that a lesion needs to pass the gate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// Least recall.
    pub recall: f64,
    /// Least precision.
    pub precision: f64,
}

/// Thresholds of one bin; an absent key stands for all values of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationEntry {
    /// The organ's name.
    pub organ: Option<String>,
    /// The size class.
    pub size: Option<SizeClass>,
    /// The contrast bin.
    pub contrast: Option<ContrastBin>,
    /// How many real lesions it was measured on.
    pub lesions: usize,
    /// What to ask.
    pub thresholds: Thresholds,
}

/// The 20th percentile of out-of-fold scores on real lesions, per organ, size and contrast bin, pooled where few.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// From the most special bin to the most general.
    pub entries: Vec<CalibrationEntry>,
}

impl Calibration {
    /// Returns the thresholds of the first entry that fits; nothing where the model was never calibrated.
    pub fn thresholds(&self, organ: &str, size: SizeClass, contrast: ContrastBin) -> Option<Thresholds> {
        let fits = |entry: &&CalibrationEntry| {
            entry.organ.as_deref().is_none_or(|name| name == organ)
                && entry.size.is_none_or(|class| class == size)
                && entry.contrast.is_none_or(|bin| bin == contrast)
        };
        self.entries.iter().find(fits).map(|entry| entry.thresholds)
    }
}
