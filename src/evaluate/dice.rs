//! Overlap of prediction and truth per class, over the voxels whose truth is known.

use ndarray::{Array3, Zip};
use serde::{Deserialize, Serialize};

use crate::volume::ClassSet;

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

    /// Returns the counts of several together.
    pub fn sum<'a>(parts: impl IntoIterator<Item = &'a Self>) -> Self {
        parts.into_iter().fold(Self::default(), |mut sum, part| {
            sum.add(part);
            sum
        })
    }

    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.both += other.both;
        self.predicted += other.predicted;
        self.truth += other.truth;
    }
}

/// One class of a case as masks, over the voxels of which it is known whether they are of it; the others are in neither.
pub struct ClassMasks {
    /// Where it is predicted.
    pub prediction: Array3<bool>,
    /// Where it is.
    pub truth: Array3<bool>,
}

impl ClassMasks {
    /// Makes the masks of a class.
    ///
    /// # Shape
    /// prediction and labels alike; `table` is [`Annotation::admissible`](crate::volume::Annotation::admissible).
    pub fn of(prediction: &Array3<u8>, labels: &Array3<u8>, table: &[ClassSet; 256], class: u8) -> Self {
        let is_class = |label: u8| table[usize::from(label)].single() == Some(class);
        let is_known = |label: u8| is_class(label) || !table[usize::from(label)].contains(class);
        Self {
            prediction: Zip::from(prediction)
                .and(labels)
                .map_collect(|predicted, label| *predicted == class && is_known(*label)),
            truth: labels.mapv(is_class),
        }
    }

    /// Counts their voxels.
    pub fn overlap(&self) -> Overlap {
        let mut out = Overlap::default();
        Zip::from(&self.prediction).and(&self.truth).for_each(|predicted, is| {
            out.both += u64::from(*predicted && *is);
            out.predicted += u64::from(*predicted);
            out.truth += u64::from(*is);
        });
        out
    }
}

/// Counts one class over the voxels of which it is known whether they are of it.
///
/// # Shape
/// As [`ClassMasks::of`].
pub fn overlap(prediction: &Array3<u8>, labels: &Array3<u8>, table: &[ClassSet; 256], class: u8) -> Overlap {
    ClassMasks::of(prediction, labels, table, class).overlap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Annotation, IGNORE, LabelMap};

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
