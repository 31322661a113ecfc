//! The gate's thresholds, calibrated on real lesions.

use std::collections::BTreeMap;

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

/// What real lesions score that a critic did not learn from, pooled where few.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// The gate's thresholds, from the most special bin to the most general: nine in ten real lesions reach each.
    pub entries: Vec<CalibrationEntry>,
    /// By organ, the probability of a tumour from which a voxel of an unlabelled host may belong to one: at least half of the voxels of
    /// nine in ten real lesions are as probable. Absent in older critics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspect_from: Option<BTreeMap<String, f64>>,
}

/// The most entries of a calibration.
const MOST_ENTRIES: usize = 10_000;
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

    /// Returns how many real lesions were scored; nothing where the model was never calibrated.
    pub fn lesions(&self) -> Option<usize> {
        let most = self.entries.iter().map(|entry| entry.lesions).max();
        most.or(self.suspect_from.as_ref().map(|_| 0))
    }

    /// Returns from which probability of an organ's tumour a voxel is suspect, 0 of an organ of which too few lesions were scored; nothing
    /// of a critic whose calibration does not say.
    pub fn suspect_from(&self, organ: &str) -> Option<f64> {
        let levels = self.suspect_from.as_ref()?;
        Some(levels.get(organ).copied().unwrap_or(0.0))
    }

    /// Tells what is wrong with a calibration of a file, or nothing.
    pub(super) fn refusal(&self) -> Option<String> {
        let levels = self.suspect_from.iter().flatten();
        let count = self.entries.len() + levels.clone().count();
        if count > MOST_ENTRIES {
            return Some(format!(
                "calibration: expected up to {MOST_ENTRIES} entries, got {count}"
            ));
        }
        let thresholds = self.entries.iter().map(|entry| entry.thresholds);
        let thresholds = thresholds.flat_map(|least| [("recall", least.recall), ("precision", least.precision)]);
        let levels = levels.map(|(_, level)| ("suspect_from", *level));
        let wrong = thresholds.chain(levels).find(|(_, value)| !(0.0..=1.0).contains(value));
        wrong.map(|(key, got)| format!("calibration: expected {key} from 0 to 1, got {got}"))
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
    fn an_organ_without_a_level_is_suspect_everywhere_but_in_critics_of_before() {
        let levels = BTreeMap::from([("liver".to_string(), 0.25)]);
        let mut calibration = Calibration {
            suspect_from: Some(levels),
            ..Calibration::default()
        };
        assert_eq!(calibration.suspect_from("liver"), Some(0.25));
        assert_eq!(calibration.suspect_from("kidney"), Some(0.0));
        assert_eq!(calibration.lesions(), Some(0));
        calibration.suspect_from = None;
        assert_eq!(calibration.suspect_from("liver"), None);
        assert_eq!(calibration.lesions(), None);
    }

    #[test]
    fn a_calibration_of_a_file_that_is_none_is_refused() {
        let entry = CalibrationEntry {
            organ: None,
            size: None,
            contrast: None,
            lesions: 5,
            thresholds: Thresholds {
                recall: 0.5,
                precision: 1.0,
            },
        };
        let of = |entries: Vec<CalibrationEntry>, level: f64| {
            let calibration = Calibration {
                entries,
                suspect_from: Some(BTreeMap::from([("liver".to_string(), level)])),
            };
            calibration.refusal().unwrap_or_default()
        };
        assert_eq!(of(vec![entry.clone()], 0.5), "");
        assert!(of(vec![entry.clone()], -1.0).ends_with("suspect_from from 0 to 1, got -1"));
        let mut high = entry.clone();
        high.thresholds.recall = f64::NAN;
        assert!(of(vec![high], 0.5).ends_with("recall from 0 to 1, got NaN"));
        assert!(of(vec![entry; MOST_ENTRIES], 0.5).contains("up to 10000 entries"));
    }

    #[test]
    fn scores_of_a_file_that_are_none_are_refused() {
        let refusal = |scores: Vec<f64>| Realism { scores }.refusal().unwrap_or_default();
        assert!(refusal(vec![0.5, 1.5]).ends_with("got 1.5"));
        assert!(refusal(vec![0.5, 0.25]).ends_with("got 0.25"));
        assert!(refusal(vec![0.5; MOST_LESIONS + 1]).ends_with("got 100001"));
    }
}
