//! What an ingest says of its cases.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Written.
    Ok,
    /// Already there from the same files.
    Skipped,
    /// Not stored.
    Refused,
}

/// What became of a case, and why.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// The case's id.
    pub id: String,
    /// The image file.
    pub image: PathBuf,
    /// What became of it.
    pub status: Status,
    /// What a user should know about a stored case.
    pub warnings: Vec<String>,
    /// Why a refused case was refused.
    pub reason: Option<String>,
    /// The ids in the label files of a case that is stored; empty where there are none.
    pub label_ids: BTreeSet<u8>,
}

/// What became of all cases of a call.
#[derive(Clone, Debug, Serialize)]
pub struct IngestReport {
    /// The cases of this shard, in the datalist's order.
    pub cases: Vec<CaseReport>,
    /// Cases in the store's index afterwards, those of other shards included.
    pub indexed: usize,
    /// Damaged case files that the index leaves out.
    pub damaged: Vec<String>,
    /// What a user should know about the cases together.
    pub warnings: Vec<String>,
}

impl IngestReport {
    /// Counts the cases with a status.
    pub fn count(&self, status: Status) -> usize {
        self.cases.iter().filter(|case| case.status == status).count()
    }
}

/// A case that has just been dealt with.
#[derive(Clone, Debug)]
pub struct CaseProgress<'a> {
    /// The case.
    pub case: &'a CaseReport,
    /// Cases dealt with so far.
    pub done: usize,
    /// Cases in all.
    pub total: usize,
}
