//! Organ labels case by case through a store: choose, predict, judge, write again. One bad case never stops the others.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ndarray::{Array3, Zip};
use serde::Serialize;

use super::{OrganReport, Scan, propose};
use crate::panic::panic_text;
use crate::store::{CaseInput, CaseKind, CaseRecord, Cases, Crop, Store, StoreError, StoreWriter};
use crate::volume::{Annotation, BACKGROUND, IGNORE, Region};

/// Returns a network's label ids of a case.
pub type Predict<'a> = dyn FnMut(&Store, usize) -> Result<Array3<u8>, StoreError> + 'a;

/// What to label.
#[derive(Clone, Copy, Debug)]
pub struct LabelRequest<'a> {
    /// The store's folder.
    pub dir: &'a Path,
    /// What becomes of [`CaseRecord::labels_by`].
    pub labels_by: &'a str,
    /// Only these cases; all that have no organ labels where empty.
    pub only: &'a [String],
    /// Whether organ labels that are there are replaced; those of labelled cases never are.
    pub replace: bool,
}

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CaseStatus {
    /// Written with at least one organ.
    Labelled,
    /// Left as it is, as it should be.
    Skipped,
    /// No organ was plausible.
    Implausible,
    /// Left as it is, because something is wrong with the case or with the request.
    Refused,
}

/// What became of a case, and why.
#[derive(Clone, Debug, Serialize)]
pub struct CaseOutcome {
    /// The case's id.
    pub id: String,
    /// What became of it.
    pub status: CaseStatus,
    /// Why it was skipped or refused.
    pub reason: Option<String>,
    /// Every organ of the label map, where the network has looked.
    pub organs: Vec<OrganReport>,
}

/// What became of all cases of a call.
#[derive(Clone, Debug, Serialize)]
pub struct LabelReport {
    /// The mark that labelled cases bear.
    pub labels_by: String,
    /// The cases that were looked at, by id; labelled cases that were not named are left out.
    pub cases: Vec<CaseOutcome>,
    /// Cases in the store's index afterwards.
    pub indexed: usize,
    /// Damaged case files that the index leaves out.
    pub damaged: Vec<String>,
}

impl LabelReport {
    /// Counts the cases with a status.
    pub fn count(&self, status: CaseStatus) -> usize {
        self.cases.iter().filter(|case| case.status == status).count()
    }
}

/// A case that is done, of how many.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The case.
    pub case: &'a CaseOutcome,
    /// How many cases there are in this call.
    pub total: usize,
}

/// Gives organ labels to a store's cases: `predict` returns a network's label ids of a case, `done` hears of every case.
///
/// Images stay what they are. A case is replaced at once by its new file; a call that was cut short is made good by the
/// next, which starts by writing the index over what is there.
///
/// # Errors
/// [`StoreError`] where the store itself cannot be opened or written; bad cases are in the report.
pub fn label_organs(
    request: &LabelRequest,
    predict: &mut Predict,
    done: &mut dyn FnMut(Progress),
) -> Result<LabelReport, StoreError> {
    let plan = Store::open(request.dir)?.plan().clone();
    StoreWriter::create(request.dir, &plan)?.finish()?;
    let store = Store::open(request.dir)?;
    let writer = StoreWriter::create(request.dir, &plan)?;
    let ids = chosen(&store, request);
    let mut cases = Vec::with_capacity(ids.len());
    for id in &ids {
        // A panic is a defect, but it must not take the other cases along.
        let run = AssertUnwindSafe(|| label_case(request, (&store, &writer), id, predict));
        let case = catch_unwind(run).unwrap_or_else(|panic| Err(format!("internal error: {}", panic_text(&*panic))));
        let case = case.unwrap_or_else(|reason| left(id, CaseStatus::Refused, reason));
        done(Progress {
            case: &case,
            total: ids.len(),
        });
        cases.push(case);
    }
    let finished = writer.finish()?;
    Ok(LabelReport {
        labels_by: request.labels_by.into(),
        cases,
        indexed: finished.cases,
        damaged: finished.damaged.iter().map(ToString::to_string).collect(),
    })
}

/// Lists the cases to be looked at, by id.
fn chosen(store: &Store, request: &LabelRequest) -> Vec<String> {
    let mut ids = request.only.to_vec();
    if ids.is_empty() {
        let unlabelled = store
            .records()
            .iter()
            .filter(|record| record.kind == CaseKind::Unlabelled);
        ids.extend(unlabelled.map(|record| record.id.clone()));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn left(id: &str, status: CaseStatus, reason: String) -> CaseOutcome {
    CaseOutcome {
        id: id.into(),
        status,
        reason: Some(reason),
        organs: Vec::new(),
    }
}

/// Labels one case, unless it is to be left as it is; an error says why it is refused.
fn label_case(
    request: &LabelRequest,
    (store, writer): (&Store, &StoreWriter),
    id: &str,
    predict: &mut Predict,
) -> Result<CaseOutcome, String> {
    let case = store.find(id).ok_or("no such case in the store")?;
    let record = &store.records()[case];
    if let Some(reason) = reason_to_leave(record, request)? {
        return Ok(left(id, CaseStatus::Skipped, reason));
    }
    let whole = store.read(case, Region::whole(record.grid.shape));
    let Crop {
        image, labels: known, ..
    } = whole.map_err(|error| error.to_string())?;
    let is_annotated = !record.has_pseudo_labels() && known.iter().any(|label| *label != BACKGROUND);
    if is_annotated && !request.replace {
        return leave(id, "has annotators' labels; --replace replaces them".into(), request);
    }
    let prediction = predict(store, case).map_err(|error| error.to_string())?;
    let mut proposal = propose(
        &Scan {
            image: &image,
            prediction: &prediction,
            spacing_mm: record.grid.spacing_mm(),
        },
        &store.plan().labels,
    );
    if is_annotated {
        // What annotators left open stays open: a tumour that the preset has no class for may lie there.
        Zip::from(&mut proposal.labels).and(&known).for_each(|label, known| {
            if *known == IGNORE {
                *label = IGNORE;
            }
        });
    }
    let is_empty = proposal.accepted.is_empty();
    // Labels that are there are better than none; a case without any is marked as looked at.
    if !is_empty || record.organs.is_empty() {
        let input = CaseInput {
            id: record.id.clone(),
            kind: CaseKind::Unlabelled,
            grid: record.grid,
            annotation: Annotation {
                classes: proposal.accepted,
                assumed_tumour_free: false,
            },
            patient: record.patient.clone(),
            labels_by: request.labels_by.into(),
            source_hash: record.source_hash,
            fingerprint: record.fingerprint.clone(),
            source: record.source.clone(),
            image,
            labels: proposal.labels,
        };
        writer.write(input).map_err(|error| error.to_string())?;
    }
    Ok(CaseOutcome {
        id: id.into(),
        status: if is_empty {
            CaseStatus::Implausible
        } else {
            CaseStatus::Labelled
        },
        reason: None,
        organs: proposal.organs,
    })
}

/// Leaves a case as it is; one that was asked for by name is refused.
fn leave(id: &str, reason: String, request: &LabelRequest) -> Result<CaseOutcome, String> {
    match request.only.is_empty() {
        true => Ok(left(id, CaseStatus::Skipped, reason)),
        false => Err(reason),
    }
}

/// Tells why a case is left as it is, or nothing; an error refuses a case that was asked for by name.
fn reason_to_leave(record: &CaseRecord, request: &LabelRequest) -> Result<Option<String>, String> {
    let by_annotators = |class: &String| class.ends_with("_tumour");
    let has_tumours = !record.tumours.is_empty() || record.annotation.classes.iter().any(by_annotators);
    if record.kind == CaseKind::Labelled || has_tumours {
        let reason = "its tumours are labelled: such labels are never replaced".to_string();
        return if request.only.is_empty() {
            Ok(Some(reason))
        } else {
            Err(reason)
        };
    }
    if request.replace {
        return Ok(None);
    }
    if record.labels_by == request.labels_by {
        return Ok(Some("labelled by this model already".into()));
    }
    let has_labels = !record.organs.is_empty() || !record.annotation.classes.is_empty();
    if !has_labels {
        return Ok(None);
    }
    let reason = if record.has_pseudo_labels() {
        format!("has organ labels by {}; --replace replaces them", record.labels_by)
    } else {
        "has annotators' organ labels; --replace replaces them".into()
    };
    if request.only.is_empty() {
        Ok(Some(reason))
    } else {
        Err(reason)
    }
}
