//! All volumes on disk: one chunked, checksummed file per case and an index; patches are read through memory maps.

mod memory;
mod record;

use ndarray::Array3;

use crate::digest::Digest;
use crate::volume::{Plan, Region};

pub use memory::MemoryStore;
pub use record::{Candidate, CaseKind, CaseRecord, OrganRecord, SourceGeometry, TumourRecord};

/// A box of voxels read from a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Crop {
    /// The box, in the case's indices.
    pub region: Region,
    /// Intensities in HU, air outside the volume; shape [D, H, W].
    pub image: Array3<i16>,
    /// Label ids, background outside the volume; shape [D, H, W].
    pub labels: Array3<u8>,
}

/// Read access to a set of cases: the store on disk, or volumes in memory.
pub trait Cases: Send + Sync {
    /// Returns what all cases have in common.
    fn plan(&self) -> &Plan;

    /// Returns the hash over sorted case ids, content hashes and the plan.
    fn snapshot(&self) -> Digest;

    /// Lists the cases, sorted by id.
    fn records(&self) -> &[CaseRecord];

    /// Reads a box of a case, padded where it leaves the volume.
    ///
    /// # Errors
    /// [`StoreError`] names the file and what is damaged.
    fn read(&self, case: usize, region: Region) -> Result<Crop, StoreError>;

    /// Returns where lesions may be centred in an organ, deepest first.
    ///
    /// # Errors
    /// [`StoreError`] names the file and what is damaged.
    fn candidates(&self, case: usize, organ_id: u8) -> Result<Vec<Candidate>, StoreError>;

    /// Finds a case by id.
    fn find(&self, id: &str) -> Option<usize> {
        self.records()
            .binary_search_by(|record| record.id.as_str().cmp(id))
            .ok()
    }
}

/// Why a store cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file does not hold what its checksum or header promises.
    #[error("{path}: damaged store file: {what}")]
    Damaged {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A case index or id that the store does not hold.
    #[error("no case {0:?} in the store")]
    NoCase(String),
}
