//! Everything that is measured on one case.

use std::collections::BTreeMap;

use ndarray::Array3;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::dice::{ClassMasks, Overlap};
use super::lesion_level::{LesionScore, lesion_level};
use super::surface::{SurfaceDistances, SurfaceOverlap};
use super::tolerance::Tolerances;
use crate::volume::{Annotation, BACKGROUND, LabelError, LabelMap, Organ};

/// The share of a surface that the robust Hausdorff distance covers.
const HD95_SHARE: f64 = 0.95;

/// One class in one case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClassMeasures {
    /// Voxels.
    pub overlap: Overlap,
    /// Surfaces within the class's tolerance.
    pub surface: SurfaceOverlap,
    /// Volume of the truth in ml.
    pub truth_ml: f64,
    /// Volume of the prediction in ml.
    pub predicted_ml: f64,
    /// Dice coefficient; nothing where the class is neither there nor predicted.
    pub dice: Option<f64>,
    /// Normalised surface Dice at the class's tolerance; nothing where the class is neither there nor predicted.
    pub nsd: Option<f64>,
    /// Robust Hausdorff distance in mm: the larger of both directions' 95th percentile by area; nothing where either is empty.
    pub hd95_mm: Option<f64>,
}

/// The measures of one case; classes and organs that its annotators did not look for are absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaseScore {
    /// The case's id.
    pub case: String,
    /// Whose scan it is: the record's patient, or the case itself.
    pub patient: String,
    /// By class name; the background is left out.
    pub classes: BTreeMap<String, ClassMeasures>,
    /// By organ: its tumours as lesions.
    pub lesions: BTreeMap<String, LesionScore>,
}

/// A prediction beside the truth of a case.
pub struct Comparison<'a> {
    /// Predicted label ids.
    pub prediction: &'a Array3<u8>,
    /// True label ids, of the same shape.
    pub truth: &'a Array3<u8>,
    /// What its annotators looked for.
    pub annotation: &'a Annotation,
    /// Voxel size (z, y, x).
    pub spacing_mm: [f64; 3],
}

impl Comparison<'_> {
    /// Measures all classes that the annotators looked for and told from their tumours, where they have any; `score` brings the case's names.
    ///
    /// # Errors
    /// [`LabelError`] where an annotated class is not in the map.
    pub fn measure(&self, labels: &LabelMap, tolerances: &Tolerances) -> Result<Measures, LabelError> {
        let table = self.annotation.admissible(labels)?;
        let organs = labels.organs();
        let is_tumour_of = |organ: &Organ, id: u8| organ.tumour_id == id;
        let looked_for: Vec<(String, u8)> = labels
            .iter()
            .filter(|(name, id)| {
                let is_assumed = self.annotation.assumed_tumour_free && organs.iter().any(|o| is_tumour_of(o, *id));
                // An organ's label that may hold its tumour says of no voxel that it is the organ.
                let is_told = table[usize::from(*id)].single() == Some(*id);
                *id != BACKGROUND
                    && (is_assumed || self.annotation.classes.iter().any(|class| class == name) && is_told)
            })
            .map(|(name, id)| (name.to_string(), id))
            .collect();
        // Classes do not depend on each other, and the distance transforms take a while.
        let measured = looked_for.into_par_iter().map(|(name, id)| {
            let masks = ClassMasks::of(self.prediction, self.truth, &table, id);
            let organ = organs.iter().find(|organ| is_tumour_of(organ, id));
            let lesions = organ.map(|organ| {
                let score = lesion_level(masks.prediction.view(), masks.truth.view(), self.spacing_mm);
                (organ.name.clone(), score)
            });
            let measures = self.class(&masks, tolerances.of(&name));
            ((name, measures), lesions)
        });
        let (classes, lesions): (Vec<_>, Vec<_>) = measured.unzip();
        Ok(Measures {
            classes: classes.into_iter().collect(),
            lesions: lesions.into_iter().flatten().collect(),
        })
    }

    fn class(&self, masks: &ClassMasks, tolerance_mm: f64) -> ClassMeasures {
        let overlap = masks.overlap();
        let surfaces = SurfaceDistances::between(masks.prediction.view(), masks.truth.view(), self.spacing_mm);
        let surface = surfaces.within(tolerance_mm);
        let ml = |voxels: u64| voxels as f64 * self.spacing_mm.iter().product::<f64>() / 1000.0;
        ClassMeasures {
            overlap,
            surface,
            truth_ml: ml(overlap.truth),
            predicted_ml: ml(overlap.predicted),
            dice: overlap.dice(),
            nsd: surface.dice(),
            hd95_mm: surfaces.robust_hausdorff_mm(HD95_SHARE),
        }
    }
}

/// The measures of a comparison, before they have a case's name.
pub struct Measures {
    /// By class name.
    pub classes: BTreeMap<String, ClassMeasures>,
    /// By organ.
    pub lesions: BTreeMap<String, LesionScore>,
}

impl Measures {
    /// Gives them a case's name and its patient's; an empty patient is the case itself.
    pub fn named(self, case: &str, patient: &str) -> CaseScore {
        CaseScore {
            case: case.into(),
            patient: if patient.is_empty() { case } else { patient }.into(),
            classes: self.classes,
            lesions: self.lesions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever drew livers and looked for no tumours in them may have drawn tumours as liver: no voxel is known to be liver, and a
    /// segmentation that is right must not be scored as a false alarm.
    #[test]
    fn an_organ_that_was_not_told_from_its_tumours_is_not_measured() {
        let mut truth = Array3::zeros((8, 8, 8));
        truth.slice_mut(ndarray::s![2..6, 2..6, 2..6]).fill(1);
        truth.slice_mut(ndarray::s![2..6, 2..6, 6..8]).fill(3);
        let annotation = Annotation {
            classes: ["liver", "pancreas", "pancreas_tumour"].map(String::from).into(),
            assumed_tumour_free: false,
        };
        let measured = |annotation: &Annotation| {
            let comparison = Comparison {
                prediction: &truth,
                truth: &truth,
                annotation,
                spacing_mm: [1.0; 3],
            };
            let measures = comparison.measure(&LabelMap::default(), &Tolerances::default());
            measures.unwrap().classes
        };
        let classes = measured(&annotation);
        assert_eq!(classes.keys().collect::<Vec<_>>(), ["pancreas", "pancreas_tumour"]);
        assert_eq!(classes["pancreas"].dice, Some(1.0));
        // Where there is none by assumption, whatever is liver is known to be.
        let free = Annotation {
            assumed_tumour_free: true,
            ..annotation
        };
        assert_eq!(measured(&free)["liver"].dice, Some(1.0));
    }
}
