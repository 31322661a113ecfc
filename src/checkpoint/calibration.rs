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

/// The most lesions that a manifest may tell of.
const MOST_LESIONS: usize = 100_000;

/// How real a discriminator finds real lesions that it did not learn from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Realism {
    /// Of each lesion the mean over its voxels of how probably real rather than painted it is, ascending.
    pub scores: Vec<f64>,
}

impl Realism {
    /// Puts scores in their order.
    pub fn of(mut scores: Vec<f64>) -> Self {
        scores.sort_by(f64::total_cmp);
        Self { scores }
    }

    /// Tells what is wrong with scores of a file, or nothing.
    pub(super) fn refusal(&self) -> Option<String> {
        let is_share = |score: &f64| (0.0..=1.0).contains(score);
        let refused = |got: String| {
            Some(format!(
                "realism.scores: expected up to {MOST_LESIONS} ascending from 0 to 1, got {got}"
            ))
        };
        if self.scores.len() > MOST_LESIONS {
            return refused(self.scores.len().to_string());
        }
        let out_of_range = self.scores.iter().find(|score| !is_share(score));
        let descending = self
            .scores
            .windows(2)
            .find(|pair| pair[0] > pair[1])
            .map(|pair| &pair[1]);
        out_of_range.or(descending).and_then(|score| refused(score.to_string()))
    }

    /// Returns the score below which a share of these lesions lies, rounded down to whole lesions; nothing where none was scored.
    pub fn threshold(&self, share: f64) -> Option<f64> {
        // 0.29 of 100 are 29, though the product of doubles is a little less.
        let below = (share * self.scores.len() as f64 + 1e-9) as usize;
        self.scores.get(below).or(self.scores.last()).copied()
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
        let realism = Realism::of(vec![0.5, 0.1, 0.9, 0.7, 0.3]);
        assert_eq!(realism.refusal(), None);
        let at = |share| realism.threshold(share);
        assert_eq!([at(0.0), at(0.2), at(0.39), at(0.4)], [0.1, 0.3, 0.3, 0.5].map(Some));
        assert_eq!(at(1.0), Some(0.9));
        assert_eq!(Realism::default().threshold(0.2), None);
        let hundred = Realism::of((0..100).map(|score| f64::from(score) / 100.0).collect());
        assert_eq!(hundred.threshold(0.29), Some(0.29));
    }

    #[test]
    fn scores_of_a_file_that_are_none_are_refused() {
        let refusal = |scores: Vec<f64>| Realism { scores }.refusal().unwrap_or_default();
        assert!(refusal(vec![0.5, 1.5]).ends_with("got 1.5"));
        assert!(refusal(vec![0.5, 0.25]).ends_with("got 0.25"));
        assert!(refusal(vec![0.5; MOST_LESIONS + 1]).ends_with("got 100001"));
    }
}
