//! From the measures of cases to those of a test set: per patient, and pooled.

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{CaseScore, ClassMeasures};
use super::dice::Overlap;
use super::lesion_level::{LesionCounts, LesionScore};
use super::statistics::{Bootstrap, Summary, mean};
use super::surface::SurfaceOverlap;
use super::tolerance::Tolerances;
use crate::volume::{LabelMap, SizeClass};

/// A class over several cases.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClassScore {
    /// Mean Dice over the cases that hold the class.
    pub dice: Option<f64>,
    /// Cases that hold the class.
    pub cases: usize,
    /// Cases without the class in which it is predicted all the same.
    pub false_alarms: usize,
    /// Dice of all cases' voxels together.
    pub pooled_dice: Option<f64>,
    /// 95 % bootstrap interval of the pooled Dice, patients drawn with all their cases.
    pub pooled_dice_interval: Option<[f64; 2]>,
    /// Dice over patients, of the cases that hold the class.
    pub dice_by_patient: Summary,
    /// The same with 0 for every case of `false_alarms`, as nnU-Net's evaluator has it.
    pub dice_with_false_alarms: Summary,
    /// The tolerance of the normalised surface Dice in mm.
    pub tolerance_mm: f64,
    /// Normalised surface Dice over patients, of the cases that hold the class; 0 where it is not predicted.
    pub nsd: Summary,
    /// Normalised surface Dice of all cases' surfaces together.
    pub pooled_nsd: Option<f64>,
    /// 95 % bootstrap interval of the pooled one, patients drawn with all their cases.
    pub pooled_nsd_interval: Option<[f64; 2]>,
    /// Robust Hausdorff distance in mm over patients, of the cases that hold the class and where it is predicted.
    pub hd95_mm: Summary,
    /// Cases that hold the class where it is not predicted, so that no distance is defined.
    pub hd95_undefined: usize,
}

/// The lesions of one organ over several cases.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OrganLesions {
    /// Cases whose annotators looked for its tumours.
    pub cases: u32,
    /// All sizes together.
    pub all: LesionRates,
    /// By size class.
    pub by_size: BTreeMap<SizeClass, LesionRates>,
    /// Predicted lesions that touch several true ones.
    pub merges: u32,
    /// True lesions that several predicted ones touch.
    pub splits: u32,
    /// What is predicted where there is no tumour.
    pub tumour_free: FalsePositives,
}

/// Counts of lesions and what follows from them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LesionRates {
    /// The counts of all cases together.
    #[serde(flatten)]
    pub counts: LesionCounts,
    /// Matched over true lesions.
    pub sensitivity: Rate,
    /// Matched over matched and false positives.
    pub precision: Rate,
    /// Harmonic mean of both.
    pub f1: Rate,
    /// Touched over true lesions.
    pub sensitivity_any_overlap: Rate,
    /// Predicted lesions that touch a true one over all predicted.
    pub precision_any_overlap: Rate,
}

/// A ratio of counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Rate {
    /// Of all cases' lesions together; nothing where there are none to count.
    pub pooled: Option<f64>,
    /// 95 % bootstrap interval of the pooled ratio, patients drawn with all their lesions.
    pub interval: Option<[f64; 2]>,
    /// Mean and spread over the patients in whom it is defined.
    pub by_patient: Summary,
}

/// What is predicted in cases without a tumour.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FalsePositives {
    /// Cases whose annotators looked for tumours and found none.
    pub cases: usize,
    /// Those with any predicted tumour.
    pub with_any: usize,
    /// Predicted tumour in ml per case, over patients.
    pub volume_ml: Summary,
    /// Predicted lesions per case, over patients.
    pub lesions: Summary,
}

/// Summarises one class.
pub(super) fn class_score(
    scores: &[CaseScore],
    class: &str,
    tolerances: &Tolerances,
    bootstrap: &Bootstrap,
) -> ClassScore {
    let of_class = || {
        scores
            .iter()
            .filter_map(|score| Some((score.patient.as_str(), score.classes.get(class)?)))
    };
    let present = || of_class().filter(|(_, measures)| measures.overlap.truth > 0);
    let summary = |value: &dyn Fn(&ClassMeasures) -> Option<f64>| {
        Summary::of(
            present().filter_map(|(patient, m)| Some((patient, value(m)?))),
            bootstrap,
        )
    };
    let dice: Vec<f64> = present().filter_map(|(_, measures)| measures.dice).collect();
    let (voxels, areas) = by_patient(of_class());
    let is_false_alarm = |measures: &ClassMeasures| measures.overlap.truth == 0 && measures.overlap.predicted > 0;
    ClassScore {
        dice: mean(&dice),
        cases: dice.len(),
        false_alarms: of_class().filter(|(_, measures)| is_false_alarm(measures)).count(),
        pooled_dice: Overlap::sum(&voxels).dice(),
        pooled_dice_interval: bootstrap.interval(&voxels, |drawn| Overlap::sum(drawn).dice()),
        dice_by_patient: summary(&|measures| measures.dice),
        // Dice is 0 for false alarms and undefined where the class is neither there nor predicted.
        dice_with_false_alarms: Summary::of(
            of_class().filter_map(|(patient, measures)| Some((patient, measures.dice?))),
            bootstrap,
        ),
        tolerance_mm: tolerances.of(class),
        nsd: summary(&|measures| measures.nsd),
        pooled_nsd: SurfaceOverlap::sum(&areas).dice(),
        pooled_nsd_interval: bootstrap.interval(&areas, |drawn| SurfaceOverlap::sum(drawn).dice()),
        hd95_mm: summary(&|measures| measures.hd95_mm),
        hd95_undefined: present().filter(|(_, measures)| measures.hd95_mm.is_none()).count(),
    }
}

/// Returns every patient's voxels and surfaces, of all cases together.
fn by_patient<'a>(measures: impl Iterator<Item = (&'a str, &'a ClassMeasures)>) -> (Vec<Overlap>, Vec<SurfaceOverlap>) {
    let mut of_patients: BTreeMap<&str, (Overlap, SurfaceOverlap)> = BTreeMap::new();
    for (patient, measures) in measures {
        let (voxels, areas) = of_patients.entry(patient).or_default();
        voxels.add(&measures.overlap);
        areas.add(&measures.surface);
    }
    of_patients.into_values().unzip()
}

/// Summarises the lesions of every organ that somebody looked at for tumours.
pub(super) fn organ_lesions(
    scores: &[CaseScore],
    labels: &LabelMap,
    bootstrap: &Bootstrap,
) -> BTreeMap<String, OrganLesions> {
    let organs = labels.organs().into_iter();
    let lesions = organs.map(|organ| (lesions_of(scores, &organ.name, bootstrap), organ.name));
    lesions
        .filter(|(lesions, _)| lesions.cases > 0)
        .map(|(lesions, name)| (name, lesions))
        .collect()
}

fn lesions_of(scores: &[CaseScore], organ: &str, bootstrap: &Bootstrap) -> OrganLesions {
    let mut by_patient: BTreeMap<&str, LesionScore> = BTreeMap::new();
    for score in scores {
        if let Some(lesions) = score.lesions.get(organ) {
            by_patient.entry(&score.patient).or_default().add(lesions);
        }
    }
    let mut total = LesionScore::default();
    by_patient.values().for_each(|score| total.add(score));
    let rates = |counts: &dyn Fn(&LesionScore) -> LesionCounts| {
        let of_patients: Vec<(&str, LesionCounts)> = by_patient
            .iter()
            .map(|(patient, score)| (*patient, counts(score)))
            .collect();
        LesionRates::of(&of_patients, bootstrap)
    };
    let of_size = |size: SizeClass| move |score: &LesionScore| score.by_size.get(&size).copied().unwrap_or_default();
    OrganLesions {
        cases: total.cases,
        all: rates(&|score| score.all()),
        by_size: total
            .by_size
            .keys()
            .map(|size| (*size, rates(&of_size(*size))))
            .collect(),
        merges: total.merges,
        splits: total.splits,
        tumour_free: false_positives(scores, organ, bootstrap),
    }
}

impl LesionRates {
    fn of(patients: &[(&str, LesionCounts)], bootstrap: &Bootstrap) -> Self {
        let rate = |ratio: &dyn Fn(&LesionCounts) -> Option<f64>| Rate {
            pooled: ratio(&LesionCounts::sum(patients.iter().map(|(_, counts)| counts))),
            interval: bootstrap.interval(patients, |drawn| {
                ratio(&LesionCounts::sum(drawn.into_iter().map(|(_, counts)| counts)))
            }),
            by_patient: Summary::of(
                patients
                    .iter()
                    .filter_map(|(patient, counts)| Some((*patient, ratio(counts)?))),
                bootstrap,
            ),
        };
        Self {
            counts: LesionCounts::sum(patients.iter().map(|(_, counts)| counts)),
            sensitivity: rate(&LesionCounts::sensitivity),
            precision: rate(&LesionCounts::precision),
            f1: rate(&LesionCounts::f1),
            sensitivity_any_overlap: rate(&LesionCounts::sensitivity_any_overlap),
            precision_any_overlap: rate(&LesionCounts::precision_any_overlap),
        }
    }
}

fn false_positives(scores: &[CaseScore], organ: &str, bootstrap: &Bootstrap) -> FalsePositives {
    let class = format!("{organ}_tumour");
    let free: Vec<(&CaseScore, &ClassMeasures, LesionCounts)> = scores
        .iter()
        .filter_map(|score| Some((score, score.classes.get(&class)?, score.lesions.get(organ)?.all())))
        .filter(|(_, measures, _)| measures.overlap.truth == 0)
        .collect();
    let summary = |value: &dyn Fn(&(&CaseScore, &ClassMeasures, LesionCounts)) -> f64| {
        Summary::of(
            free.iter().map(|case| (case.0.patient.as_str(), value(case))),
            bootstrap,
        )
    };
    FalsePositives {
        cases: free.len(),
        with_any: free.iter().filter(|(_, _, counts)| counts.predictions > 0).count(),
        volume_ml: summary(&|(_, measures, _)| measures.predicted_ml),
        lesions: summary(&|(_, _, counts)| f64::from(counts.predictions)),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;
    use crate::evaluate::Comparison;
    use crate::volume::{Annotation, LabelMap};

    #[test]
    fn false_positives_are_counted_on_cases_without_a_tumour_alone() {
        let labels = LabelMap::default();
        let liver = Array3::from_elem((10, 10, 10), 1);
        let with = |boxes: &[([usize; 3], [usize; 3])]| {
            let mut volume = liver.clone();
            for (from, to) in boxes {
                let at = |axis: usize| from[axis]..to[axis];
                volume.slice_mut(ndarray::s![at(0), at(1), at(2)]).fill(2);
            }
            volume
        };
        let annotation = Annotation {
            classes: vec!["liver".into(), "liver_tumour".into()],
            assumed_tumour_free: false,
        };
        let score = |case: &str, (truth, prediction): (&Array3<u8>, &Array3<u8>)| {
            let comparison = Comparison {
                prediction,
                truth,
                annotation: &annotation,
                spacing_mm: [2.0, 1.0, 5.0],
            };
            let measures = comparison.measure(&labels, &Tolerances::default()).unwrap();
            measures.named(case, "")
        };
        // Two lesions of 8 and 27 voxels of 10 mm3, one of 8, none; the sick case's false alarm does not count here.
        let two = with(&[([0; 3], [2; 3]), ([5; 3], [8; 3])]);
        let one = with(&[([0; 3], [2; 3])]);
        let scores = [
            score("a", (&liver, &two)),
            score("b", (&liver, &one)),
            score("c", (&liver, &liver)),
            score("sick", (&one, &two)),
        ];
        let found = false_positives(&scores, "liver", &Bootstrap::default());
        assert_eq!((found.cases, found.with_any), (3, 2));
        assert_eq!((found.volume_ml.cases, found.lesions.cases), (3, 3));
        // In ml: 0.35, 0.08 and 0.
        assert!((found.volume_ml.mean.unwrap() - 0.43 / 3.0).abs() < 1e-12, "{found:?}");
        assert!((found.lesions.mean.unwrap() - 1.0).abs() < 1e-12);
        let pancreas = false_positives(&scores, "pancreas", &Bootstrap::default());
        assert_eq!((pancreas.cases, pancreas.volume_ml.mean), (0, None));
    }
}
