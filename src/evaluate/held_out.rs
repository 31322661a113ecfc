//! Scores of a segmenting network on held-out labelled cases.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use burn::tensor::Device;
use ndarray::Array3;
use serde::{Deserialize, Serialize};

use super::case::{CaseScore, Comparison};
use super::statistics::Bootstrap;
use super::summary::{ClassScore, OrganLesions, class_score, organ_lesions};
use super::tolerance::Tolerances;
use super::{EvaluateError, HD95_VARIANT, Predictor, SlidingWindow};
use crate::nn::VoxelClassifier;
use crate::store::{CaseKind, Cases};
use crate::volume::{BACKGROUND, LabelMap, Region};

/// How held-out cases are scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldOutSettings {
    /// At most so many cases.
    pub cases: usize,
    /// How a volume is covered.
    pub window: SlidingWindow,
    /// How far surfaces may lie apart.
    pub tolerance: Tolerances,
    /// How intervals are made.
    pub bootstrap: Bootstrap,
}

impl Default for HeldOutSettings {
    fn default() -> Self {
        Self {
            cases: 50,
            window: SlidingWindow::default(),
            tolerance: Tolerances::default(),
            bootstrap: Bootstrap::default(),
        }
    }
}

/// Scores of held-out cases.
#[derive(Clone, Debug, Default, Serialize)]
pub struct HeldOut {
    /// Ids of the cases.
    pub cases: Vec<String>,
    /// Per class.
    pub classes: BTreeMap<String, ClassScore>,
    /// Per organ: its tumours as lesions.
    pub lesions: BTreeMap<String, OrganLesions>,
    /// Per case.
    pub scores: Vec<CaseScore>,
    /// How HD95 is computed: others give other numbers.
    pub hd95_variant: &'static str,
    /// How the cases were predicted and scored.
    pub settings: HeldOutSettings,
}

/// A network to be scored, and what on.
pub struct Examination<'a> {
    /// The network.
    pub net: &'a dyn VoxelClassifier,
    /// Where it runs.
    pub device: &'a Device,
    /// The store.
    pub cases: &'a dyn Cases,
    /// Which of its cases; those without labelled tumours are passed over, and where there are more than `settings.cases` those of
    /// [`chosen`] are taken.
    pub held_out: &'a [usize],
    /// How.
    pub settings: &'a HeldOutSettings,
}

/// A case that has just been scored.
pub struct Scored<'a> {
    /// Its measures.
    pub score: &'a CaseScore,
    /// Its image in HU.
    pub image: &'a Array3<i16>,
    /// Its labels.
    pub truth: &'a Array3<u8>,
    /// The predicted labels.
    pub prediction: &'a Array3<u8>,
    /// Voxel size (z, y, x).
    pub spacing_mm: [f64; 3],
}

/// Predicts the labelled cases among `held_out` and compares; `note` sees every case that is done, and may stop there if cases are left.
///
/// # Errors
/// [`EvaluateError`] where a case cannot be read or its classes are not the plan's, and where `note` stopped.
pub fn score_held_out(
    exam: &Examination,
    note: &mut dyn FnMut(&Scored) -> ControlFlow<()>,
) -> Result<HeldOut, EvaluateError> {
    let labelled =
        (exam.held_out.iter().copied()).filter(|case| exam.cases.records()[*case].kind == CaseKind::Labelled);
    let wanted = chosen(exam.cases, labelled.collect(), exam.settings.cases);
    let mut scores = Vec::new();
    for &case in &wanted {
        let mut noted = ControlFlow::Continue(());
        scores.push(score_case(exam, case, &mut |scored| noted = note(scored))?);
        if noted.is_break() && scores.len() < wanted.len() {
            return Err(EvaluateError::Stopped);
        }
    }
    Ok(HeldOut::of(scores, &exam.cases.plan().labels, exam.settings))
}

/// Chooses at most so many of some cases by the hashes of their scans, and leaves them in their order. Ids often begin with the name
/// of a data set: the first ones would be of one alone.
pub fn chosen(cases: &dyn Cases, mut among: Vec<usize>, most: usize) -> Vec<usize> {
    if among.len() > most {
        let mut by_hash: Vec<_> = among
            .iter()
            .map(|case| (cases.records()[*case].source_hash, *case))
            .collect();
        by_hash.sort_unstable();
        let taken: BTreeSet<usize> = by_hash.into_iter().take(most).map(|(_, case)| case).collect();
        among.retain(|case| taken.contains(case));
    }
    among
}

/// Predicts a case and compares; `note` sees it.
///
/// # Errors
/// [`EvaluateError`] where it cannot be read or its classes are not the plan's.
pub fn score_case(exam: &Examination, case: usize, note: &mut dyn FnMut(&Scored)) -> Result<CaseScore, EvaluateError> {
    let plan = exam.cases.plan();
    let predictor = Predictor {
        net: exam.net,
        plan,
        settings: &exam.settings.window,
        device: exam.device,
    };
    let record = &exam.cases.records()[case];
    let crop = exam.cases.read(case, Region::whole(record.grid.shape))?;
    let prediction = predictor.labels(&crop.image);
    let comparison = Comparison {
        prediction: &prediction,
        truth: &crop.labels,
        annotation: &record.annotation,
        spacing_mm: record.grid.spacing_mm(),
    };
    let score = comparison
        .measure(&plan.labels, &exam.settings.tolerance)?
        .named(&record.id, &record.patient);
    note(&Scored {
        score: &score,
        image: &crop.image,
        truth: &crop.labels,
        prediction: &prediction,
        spacing_mm: record.grid.spacing_mm(),
    });
    Ok(score)
}

impl HeldOut {
    /// Summarises the scores of cases.
    pub fn of(scores: Vec<CaseScore>, labels: &LabelMap, settings: &HeldOutSettings) -> Self {
        let HeldOutSettings {
            tolerance, bootstrap, ..
        } = settings;
        let classes = labels.iter().filter(|(_, id)| *id != BACKGROUND);
        Self {
            cases: scores.iter().map(|score| score.case.clone()).collect(),
            classes: classes
                .map(|(name, _)| (name.to_string(), class_score(&scores, name, tolerance, bootstrap)))
                .collect(),
            lesions: organ_lesions(&scores, labels, bootstrap),
            scores,
            hd95_variant: HD95_VARIANT,
            settings: settings.clone(),
        }
    }
}
