//! How far two surfaces may lie apart and still count as the same, per class.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::volume::LabelMap;

/// Tolerances of the normalised surface Dice, fixed before anything is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tolerances {
    /// Of classes that are not named, in mm.
    pub other_mm: f64,
    /// By class name, in mm.
    pub class_mm: BTreeMap<String, f64>,
}

impl Default for Tolerances {
    /// Returns those of FLARE 2023: liver and pancreas 5 mm, kidneys 3 mm, tumours 2 mm.
    ///
    /// # Source
    /// The challenge's evaluation code (JunMa11/FLARE, `FLARE23_DSC_NSD_Eval.py`). Nikolov et al. (arXiv 1809.04430) take the
    /// differences between observers, which nobody has published for all these organs; KiTS21's are 1.54 mm for tumours.
    fn default() -> Self {
        let organs = [("liver", 5.0), ("pancreas", 5.0), ("kidney", 3.0)];
        Self {
            other_mm: 2.0,
            class_mm: organs.map(|(name, mm)| (name.to_string(), mm)).into(),
        }
    }
}

impl Tolerances {
    /// Returns the tolerance of a class in mm.
    pub fn of(&self, class: &str) -> f64 {
        self.class_mm.get(class).copied().unwrap_or(self.other_mm)
    }

    /// Names a class that has a tolerance and is none of a map's, or nothing. Those of the defaults may stand there for other plans.
    pub fn unknown(&self, labels: &LabelMap) -> Option<&str> {
        let defaults = Self::default();
        let is_known =
            |name: &str| defaults.class_mm.contains_key(name) || labels.iter().any(|(known, _)| known == name);
        self.class_mm.keys().map(String::as_str).find(|name| !is_known(name))
    }

    /// Tells which tolerance is no distance, or nothing.
    pub fn refusal(&self) -> Option<(&str, f64)> {
        let of_classes = self.class_mm.iter().map(|(name, mm)| (name.as_str(), *mm));
        let mut all = of_classes.chain([("other_mm", self.other_mm)]);
        all.find(|(_, mm)| !(0.0..=100.0).contains(mm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_that_is_not_named_has_the_tumours_tolerance() {
        let tolerances = Tolerances::default();
        assert_eq!((tolerances.of("liver"), tolerances.of("liver_tumour")), (5.0, 2.0));
        assert_eq!(tolerances.refusal(), None);
        let labels = crate::volume::Plan::default().labels;
        assert_eq!(tolerances.unknown(&labels), None);
        let misspelt = Tolerances {
            class_mm: BTreeMap::from([("liver_tumor".into(), 1.5), ("liver".into(), 5.0)]),
            ..Tolerances::default()
        };
        assert_eq!(misspelt.unknown(&labels), Some("liver_tumor"));
        let wrong = Tolerances {
            class_mm: BTreeMap::from([("liver".into(), f64::NAN)]),
            ..tolerances
        };
        assert_eq!(wrong.refusal().map(|(name, _)| name), Some("liver"));
    }
}
