//! What an ingest says of its cases.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;

use crate::store::{CaseRecord, Duplicate};
use crate::volume::{Plan, Shape};

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
    /// How long it took, in seconds.
    pub seconds: f64,
    /// What is stored; none for a refused case.
    pub stored: Option<StoredCase>,
}

/// What a store holds of a case.
#[derive(Clone, Debug, Serialize)]
pub struct StoredCase {
    /// Voxels of the image file along its axes (i, j, k).
    pub source_shape: [usize; 3],
    /// Voxel size of the image file along its axes (i, j, k), in mm.
    pub source_spacing_mm: [f64; 3],
    /// Towards what the image file's axes grow, such as `LPS`.
    pub source_orientation: String,
    /// Stored voxels (z, y, x), after resampling and cropping.
    pub shape: Shape,
    /// Healthy tissue of every organ, in ml.
    pub organs_ml: BTreeMap<String, f64>,
    /// Connected real tumours.
    pub tumours: usize,
}

impl StoredCase {
    /// Sums up a record.
    pub(super) fn of(record: &CaseRecord, plan: &Plan) -> Self {
        let voxel_ml = record.grid.spacing_mm().iter().product::<f64>() / 1000.0;
        let name = |id: u8| plan.labels.name(id).map_or_else(|| id.to_string(), Into::into);
        let affine = &record.source.affine_xyz;
        let length = |column: usize| libm::sqrt((0..3).map(|row| affine[row][column] * affine[row][column]).sum());
        Self {
            source_shape: record.source.shape_xyz,
            source_spacing_mm: std::array::from_fn(length),
            source_orientation: record.source.orientation.clone(),
            shape: record.grid.shape,
            organs_ml: (record.organs.iter())
                .map(|organ| (name(organ.id), organ.voxels as f64 * voxel_ml))
                .collect(),
            tumours: record.tumours.len(),
        }
    }
}

/// What became of all cases of a call.
#[derive(Clone, Debug, Serialize)]
pub struct IngestReport {
    /// The cases of this shard, in the datalist's order.
    pub cases: Vec<CaseReport>,
    /// Cases in the store's index afterwards, those of other shards included.
    pub indexed: usize,
    /// Pairs of the store's cases that show one scan, one of them at least of this shard.
    pub duplicates: Vec<Duplicate>,
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
