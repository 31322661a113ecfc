//! Scores of a segmenting network on held-out labelled cases.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use burn::tensor::Device;

use super::{
    ClassScore, EvaluateError, LesionScore, Overlap, SlidingWindow, lesion_level, mean_scores, overlap, predict,
};
use crate::nn::VoxelClassifier;
use crate::store::{CaseKind, Cases};

/// How held-out cases are scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldOutSettings {
    /// At most so many cases.
    pub cases: usize,
    /// How a volume is covered.
    pub window: SlidingWindow,
}

impl Default for HeldOutSettings {
    fn default() -> Self {
        Self {
            cases: 50,
            window: SlidingWindow::default(),
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
    pub lesions: BTreeMap<String, LesionScore>,
}

/// A network to be scored, and what on.
pub struct Examination<'a> {
    /// The network.
    pub net: &'a dyn VoxelClassifier,
    /// Where it runs.
    pub device: &'a Device,
    /// The store.
    pub cases: &'a dyn Cases,
    /// Which of its cases; those without labelled tumours are passed over.
    pub held_out: &'a [usize],
    /// How.
    pub settings: &'a HeldOutSettings,
}

/// Predicts the labelled cases among `held_out` and compares; `note` hears of every case that is done.
///
/// # Errors
/// [`EvaluateError`] where a case cannot be read or its classes are not the plan's.
pub fn score_held_out(exam: &Examination, note: &mut dyn FnMut(&str)) -> Result<HeldOut, EvaluateError> {
    let Examination {
        net,
        device,
        cases,
        held_out,
        settings,
    } = *exam;
    let labels = &cases.plan().labels;
    let mut overlaps = Vec::new();
    let mut out = HeldOut::default();
    let labelled = held_out
        .iter()
        .filter(|case| cases.records()[**case].kind == CaseKind::Labelled);
    for &case in labelled.take(settings.cases) {
        let record = &cases.records()[case];
        let prediction = predict(net, cases, case, &settings.window, device)?;
        let truth = cases
            .read(case, crate::volume::Region::whole(record.grid.shape))?
            .labels;
        let table = record.annotation.admissible(labels)?;
        let of_classes = labels
            .iter()
            .map(|(_, id)| (id, overlap(&prediction, &truth, &table, id)));
        overlaps.push(of_classes.collect::<BTreeMap<u8, Overlap>>());
        let looked_for = |class: &str| record.annotation.classes.iter().any(|name| name == class);
        for organ in labels.organs() {
            if looked_for(&format!("{}_tumour", organ.name)) {
                let mask = |array: &ndarray::Array3<u8>| array.mapv(|id| u8::from(id == organ.tumour_id));
                let score = lesion_level(&mask(&prediction), &mask(&truth), record.grid.spacing_mm());
                out.lesions.entry(organ.name).or_default().add(&score);
            }
        }
        out.cases.push(record.id.clone());
        note(&format!("scored {}", record.id));
    }
    out.classes = mean_scores(&overlaps, labels);
    Ok(out)
}
