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

/// How real a discriminator finds real lesions that it did not learn from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Realism {
    /// Of each lesion the mean probability of "real tumour" over its voxels.
    pub scores: Vec<f64>,
}

impl Realism {
    /// Returns the score below which a share of these lesions lies, rounded down to whole lesions; nothing where none was scored.
    pub fn threshold(&self, share: f64) -> Option<f64> {
        let mut ascending = self.scores.clone();
        ascending.sort_by(f64::total_cmp);
        let below = (share * ascending.len() as f64) as usize;
        ascending.get(below).or(ascending.last()).copied()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_real_lesions_lies_below_the_threshold() {
        let realism = Realism {
            scores: vec![0.5, 0.1, 0.9, 0.7, 0.3],
        };
        let at = |share| realism.threshold(share);
        assert_eq!([at(0.0), at(0.2), at(0.39), at(0.4)], [0.1, 0.3, 0.3, 0.5].map(Some));
        assert_eq!(at(1.0), Some(0.9));
        assert_eq!(Realism::default().threshold(0.2), None);
    }
}
