//! Overlap of prediction and truth per class, over the voxels whose truth is known.

use std::collections::BTreeMap;

use ndarray::{Array3, Zip};
use serde::{Deserialize, Serialize};

use crate::volume::{ClassSet, LabelMap};

/// Voxel counts of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlap {
    /// Predicted and true.
    pub both: u64,
    /// Predicted.
    pub predicted: u64,
    /// True.
    pub truth: u64,
}

impl Overlap {
    /// Returns the Dice coefficient; nothing where the class is neither predicted nor there.
    pub fn dice(&self) -> Option<f64> {
        let size = self.predicted + self.truth;
        (size > 0).then(|| 2.0 * self.both as f64 / size as f64)
    }
}

/// Counts one class over the voxels of which it is known whether they are of it.
///
/// # Shape
/// prediction and labels alike; `table` is [`Annotation::admissible`](crate::volume::Annotation::admissible).
pub fn overlap(prediction: &Array3<u8>, labels: &Array3<u8>, table: &[ClassSet; 256], class: u8) -> Overlap {
    let mut out = Overlap::default();
    Zip::from(prediction).and(labels).for_each(|predicted, label| {
        let set = table[usize::from(*label)];
        let is_class = set.single() == Some(class);
        if set.contains(class) && !is_class {
            return;
        }
        let is_predicted = *predicted == class;
        out.both += u64::from(is_class && is_predicted);
        out.predicted += u64::from(is_predicted);
        out.truth += u64::from(is_class);
    });
    out
}

/// A class over several cases.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClassScore {
    /// Mean Dice over the cases that hold the class.
    pub dice: Option<f64>,
    /// Cases that hold the class.
    pub cases: usize,
    /// Cases without the class in which it is predicted all the same.
    pub false_alarms: usize,
}

/// Averages the overlaps of several cases, by class name; the background is left out.
pub fn mean_scores(overlaps: &[BTreeMap<u8, Overlap>], labels: &LabelMap) -> BTreeMap<String, ClassScore> {
    let of_class = |id: u8| {
        let of_cases: Vec<Overlap> = overlaps.iter().filter_map(|case| case.get(&id).copied()).collect();
        let dice: Vec<f64> = of_cases
            .iter()
            .filter(|o| o.truth > 0)
            .filter_map(Overlap::dice)
            .collect();
        ClassScore {
            dice: (!dice.is_empty()).then(|| dice.iter().sum::<f64>() / dice.len() as f64),
            cases: dice.len(),
            false_alarms: of_cases.iter().filter(|o| o.truth == 0 && o.predicted > 0).count(),
        }
    };
    let classes = labels.iter().filter(|(_, id)| *id != crate::volume::BACKGROUND);
    classes.map(|(name, id)| (name.to_string(), of_class(id))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Annotation, IGNORE};

    #[test]
    fn dice_by_hand_leaves_unknown_voxels_out() {
        let annotation = Annotation {
            classes: vec!["liver".into(), "liver_tumour".into()],
            assumed_tumour_free: false,
        };
        let table = annotation.admissible(&LabelMap::default()).unwrap();
        let labels = Array3::from_shape_vec((1, 2, 3), vec![1, 1, 1, 2, 0, IGNORE]).unwrap();
        let prediction = Array3::from_shape_vec((1, 2, 3), vec![1, 1, 2, 2, 1, 1]).unwrap();
        // Liver: true 3, predicted 3 (the ignored voxel is out), both 2: 4 / 6.
        let liver = overlap(&prediction, &labels, &table, 1);
        assert_eq!(
            liver,
            Overlap {
                both: 2,
                predicted: 3,
                truth: 3
            }
        );
        assert_eq!(liver.dice(), Some(4.0 / 6.0));
        // Tumour: true 1, predicted 2, both 1.
        assert_eq!(overlap(&prediction, &labels, &table, 2).dice(), Some(2.0 / 3.0));
        // Nobody looked for a pancreas: the background decides nothing, the liver does.
        assert_eq!(overlap(&prediction, &labels, &table, 3), Overlap::default());
    }
}
