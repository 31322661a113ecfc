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
    /// Of entries of any size and contrast: the probability of a tumour from which a voxel of an unlabelled host may belong to one. At
    /// least half of the voxels of nine in ten real lesions are at least as probable. Absent in older critics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspect_from: Option<f64>,
}

/// What nine in ten real lesions that a critic did not learn from reach, per organ, size and contrast bin, pooled where few.
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

    /// Returns from which probability of an organ's tumour a voxel is suspect; nothing where that was never measured.
    pub fn suspect_from(&self, organ: &str) -> Option<f64> {
        let of_organ = |entry: &CalibrationEntry| entry.organ.as_deref().is_none_or(|name| name == organ);
        let is_general = |entry: &CalibrationEntry| entry.size.is_none() && entry.contrast.is_none();
        let mut fitting = self.entries.iter().filter(|entry| of_organ(entry) && is_general(entry));
        fitting.find_map(|entry| entry.suspect_from)
    }

    /// Tells what is wrong with a calibration of a file, or nothing.
    pub(super) fn refusal(&self) -> Option<String> {
        let levels = self.entries.iter().filter_map(|entry| entry.suspect_from);
        let wrong = levels.into_iter().find(|level| !(0.0..=1.0).contains(level));
        wrong.map(|got| format!("calibration.entries: expected suspect_from from 0 to 1, got {got}"))
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
    fn the_level_of_an_organ_is_that_of_its_widest_bin() {
        let entry = |organ: Option<&str>, size, suspect_from| CalibrationEntry {
            organ: organ.map(Into::into),
            size,
            contrast: None,
            lesions: 5,
            thresholds: Thresholds {
                recall: 0.5,
                precision: 0.5,
            },
            suspect_from,
        };
        let mut calibration = Calibration {
            entries: vec![
                entry(Some("liver"), Some(SizeClass::Small), None),
                entry(Some("liver"), None, Some(0.25)),
                entry(None, None, Some(0.125)),
            ],
        };
        assert_eq!(calibration.suspect_from("liver"), Some(0.25));
        assert_eq!(calibration.suspect_from("kidney"), Some(0.125));
        assert_eq!(calibration.refusal(), None);
        calibration.entries.truncate(1);
        assert_eq!(calibration.suspect_from("liver"), None);
        calibration.entries[0].suspect_from = Some(-1.0);
        assert!(calibration.refusal().unwrap().ends_with("got -1"));
    }

    #[test]
    fn scores_of_a_file_that_are_none_are_refused() {
        let refusal = |scores: Vec<f64>| Realism { scores }.refusal().unwrap_or_default();
        assert!(refusal(vec![0.5, 1.5]).ends_with("got 1.5"));
        assert!(refusal(vec![0.5, 0.25]).ends_with("got 0.25"));
        assert!(refusal(vec![0.5; MOST_LESIONS + 1]).ends_with("got 100001"));
    }
}
