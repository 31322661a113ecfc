//! Scanner files into the store: read NIfTI or DICOM, orient, resample, map labels, crop, write. One bad case never stops others.
//!
//! ```text
//! datalist.rs -> pipeline.rs: files.rs (nifti.rs | dicom/) -> orient.rs -> volume::resample -> crop -> store::StoreWriter
//!                    labels.rs, masks.rs: label files and folders of masks -> labels; preset.rs, built_in.rs: file ids -> class names
//!                    config.rs: what is refused; regrid.rs: labels onto the image's grid
//!                    planned.rs: a scan on the plan's grid, and labels back to the file's
//!                    ledger.rs: what a second run can skip; report.rs: what a user is told
//! ```

mod built_in;
mod config;
pub mod datalist;
pub mod dicom;
mod files;
mod header;
mod labels;
mod ledger;
mod masks;
pub mod nifti;
pub mod nnunet_plans;
pub mod orient;
mod pipeline;
mod planned;
pub mod preset;
pub mod regrid;
mod report;
mod shard;

use std::path::PathBuf;

use crate::store::StoreError;
use crate::volume::Shape;

pub use built_in::{BuiltIn, preset_table};
pub use config::{IngestConfig, LabelGrid, NotFinite};
pub use datalist::{Entry, Section};
pub use orient::source_hash;
pub use pipeline::{IngestRequest, ingest};
pub use planned::{
    LabelledScan, PlannedScan, labels_on_grid, labels_on_source, read_labelled, read_planned, write_on_source,
};
pub use preset::Preset;
pub use report::{CaseProgress, CaseReport, IngestReport, Status, StoredCase};
pub use shard::Shard;

/// Why an ingest cannot start or end, or why one case is refused.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// A volume that cannot be read.
    #[error(transparent)]
    Nifti(#[from] nifti::NiftiFileError),
    /// A series that cannot be read.
    #[error(transparent)]
    Dicom(#[from] dicom::DicomError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A case under the id of another one.
    #[error("{path}: the store's case {id:?} is another scan, of {before}; give this one another id in its datalist")]
    OtherScan {
        /// The file.
        path: PathBuf,
        /// The id.
        id: String,
        /// The file that the case was made of.
        before: PathBuf,
    },
    /// A datalist that cannot be understood.
    #[error("{path}: datalist: {what}")]
    Datalist {
        /// The file.
        path: PathBuf,
        /// The entry or key and what is wrong with it.
        what: String,
    },
    /// A plans file of nnU-Net that no store can follow.
    #[error("{path}: {what}")]
    NnunetPlans {
        /// The file.
        path: PathBuf,
        /// The key, what was expected and what was found.
        what: String,
    },
    /// A preset that does not exist or does not fit the plan.
    #[error("preset {name}: {what}")]
    Preset {
        /// The preset's name or file.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// Labels with an id that the preset does not know.
    #[error("{path}: label id {id} is not in preset {preset}, which knows {known}{}", looks_like(.candidates))]
    UnknownLabel {
        /// The label file.
        path: PathBuf,
        /// The id.
        id: u8,
        /// The preset's name.
        preset: String,
        /// The ids it knows.
        known: String,
        /// The built-in presets that the file's ids look like.
        candidates: Vec<&'static str>,
    },
    /// Labels on another grid than their image.
    #[error("{labels}: not on the grid of {image}: {what}")]
    OtherGrid {
        /// The label file.
        labels: PathBuf,
        /// The image file.
        image: PathBuf,
        /// Shape or position, and by how much.
        what: String,
    },
    /// A volume that the plan's spacing would make too large.
    #[error("{path}: {shape:?} voxels at {spacing_mm:?} mm: at most 2048 a side and 2^29 in all")]
    TooLarge {
        /// The image file.
        path: PathBuf,
        /// The shape it would have.
        shape: Shape,
        /// The plan's spacing.
        spacing_mm: [f64; 3],
    },
    /// A shard outside its range.
    #[error("shard: expected i/n with i below n and n at least 1, got {0:?}")]
    Shard(String),
    /// A case that panicked: a defect of this program, kept from the other cases.
    #[error("{path}: internal error: {what}")]
    Internal {
        /// The image file.
        path: PathBuf,
        /// The panic's message.
        what: String,
    },
    /// The worker threads cannot be started.
    #[error("cannot start ingest threads: {0}")]
    Threads(String),
}

/// Says which presets ids look like, for the end of a message.
fn looks_like(candidates: &[&str]) -> String {
    if candidates.is_empty() {
        return String::new();
    }
    format!("; its ids look like {}", candidates.join(", "))
}
