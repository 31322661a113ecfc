//! All volumes on disk: one chunked, checksummed file per case and an index; patches are read through memory maps.
//!
//! ```text
//! DIR/index.bin        plan and records of all cases        (index.rs)
//! DIR/cases/ID.ftc     one case: header, chunks, candidates (format.rs, codec.rs)
//! ```
//!
//! [`StoreWriter`] analyses and writes cases and pairs what looks alike (duplicates.rs), [`Store`] reads them; `docs/store-format.md` has the bytes.

mod analyse;
mod cache;
mod codec;
mod decode;
mod disk;
mod duplicates;
mod format;
mod index;
mod map;
mod memory;
mod reader;
mod record;
mod residuals;
mod writer;

use std::path::{Path, PathBuf};

use ndarray::Array3;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, canonical_json};
use crate::volume::{Plan, Region, Shape};

pub use codec::Compression;
pub use disk::Store;
pub use duplicates::{Duplicate, DuplicateKind, duplicates, groups, nearness};
pub use memory::{MemoryStore, cut};
pub use record::{
    Candidate, CaseKind, CaseRecord, MAX_NAME_BYTES, NearDuplicate, OrganRecord, PSEUDO_PREFIX, SourceGeometry,
    TumourRecord,
};
pub(crate) use writer::replace;
pub use writer::{CaseInput, Finished, StoreWriter};

const CASES_DIR: &str = "cases";
/// The most memory for unpacked chunks, in MiB.
const MAX_CACHE_MIB: u64 = 1 << 20;

/// How a store is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Memory for chunks that were unpacked and are read again, in MiB; 0 keeps none.
    pub cache_mib: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { cache_mib: 128 }
    }
}

impl StoreConfig {
    /// Tells what is wrong with the settings, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        (self.cache_mib > MAX_CACHE_MIB)
            .then(|| format!("store.cache_mib: expected 0 to {MAX_CACHE_MIB}, got {}", self.cache_mib))
    }
}

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

    /// Lists the pairs of cases that are near-duplicates, sorted; those with the same source hash are not among them.
    fn near_duplicates(&self) -> &[NearDuplicate];

    /// Reads a box of a case, padded where it leaves the volume.
    ///
    /// # Errors
    /// [`StoreError`] names the file and what is damaged.
    fn read(&self, case: usize, region: Region) -> Result<Crop, StoreError>;

    /// Reads a box of a case into the caller's buffers of one element per voxel, x fastest; padded like [`Cases::read`].
    ///
    /// # Errors
    /// [`StoreError`] names the file and what is damaged; the buffers then hold nothing of use.
    fn read_into(&self, case: usize, region: Region, image: &mut [i16], labels: &mut [u8]) -> Result<(), StoreError> {
        check_buffers(region, image.len(), labels.len())?;
        let crop = self.read(case, region)?;
        crop.image.iter().zip(image).for_each(|(from, to)| *to = *from);
        crop.labels.iter().zip(labels).for_each(|(from, to)| *to = *from);
        Ok(())
    }

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

/// Returns the hash over sorted case ids, content hashes, patients where they are known, and the plan: the same for a store and for volumes in
/// memory. A patient decides which inner critic may judge a case (promise P1).
fn snapshot_of(records: &[CaseRecord], plan: &Plan) -> Digest {
    // The digest of the canonical JSON of `[[[id, content_hash, patient], ...], plan]`, written here piece by piece: as a tree in
    // memory, that JSON is what takes longest when a store of 100,000 cases is opened. Ids need no escapes (`check_id`).
    let mut hasher = blake3::Hasher::new();
    let mut piece = String::from("[[");
    for record in records {
        let comma = if piece.ends_with(']') { "," } else { "" };
        piece += &format!("{comma}[\"{}\",\"{}\"", record.id, record.content_hash);
        if !record.patient.is_empty() {
            piece += &format!(",{}", canonical_json(&record.patient));
        }
        piece.push(']');
        if piece.len() > 1 << 16 {
            // All but the bracket, by which the next case knows that it needs a comma.
            hasher.update(&piece.as_bytes()[..piece.len() - 1]);
            piece.drain(..piece.len() - 1);
        }
    }
    piece += &format!("],{}]", canonical_json(plan));
    hasher.update(piece.as_bytes());
    hasher.finalize().into()
}

/// Refuses buffers that do not hold exactly a box.
fn check_buffers(region: Region, image: usize, labels: usize) -> Result<(), StoreError> {
    let voxels = region
        .size
        .iter()
        .try_fold(1_usize, |product, side| product.checked_mul(*side));
    if voxels == Some(image) && voxels == Some(labels) {
        return Ok(());
    }
    Err(StoreError::Buffers {
        size: region.size,
        image,
        labels,
    })
}

/// Returns where a case's file stands; the id must have passed [`check_id`].
fn case_path(dir: &Path, id: &str) -> PathBuf {
    dir.join(CASES_DIR).join(format!("{id}.ftc"))
}

/// Refuses ids that could leave the store's folder or hide in it.
pub(crate) fn check_id(id: &str) -> Result<(), StoreError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=128).contains(&id.len()) && id.bytes().all(allowed) && !id.starts_with('.') {
        return Ok(());
    }
    Err(StoreError::BadId(id.chars().take(160).collect()))
}

/// Why a store cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused; the message names the file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file does not hold what its checksum or header promises.
    #[error("{path}: damaged store file: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A case or plan that a store does not take, or a box that it does not give.
    #[error("{path}: refused: {what}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field, what was expected and what was found.
        what: String,
    },
    /// A store of another plan.
    #[error("{path}: {key}: the store has {expected}, got {got}")]
    OtherPlan {
        /// The store's index.
        path: PathBuf,
        /// The first key that differs.
        key: String,
        /// What the store has.
        expected: String,
        /// What was asked for.
        got: String,
    },
    /// An id that is not a plain file name.
    #[error("case id {0:?}: expected 1 to 128 of A-Z a-z 0-9 . _ - and no leading dot")]
    BadId(String),
    /// Buffers that do not hold exactly the box that was asked for.
    #[error("a box of {size:?} voxels needs as many elements: got {image} for the image and {labels} for the labels")]
    Buffers {
        /// The box.
        size: Shape,
        /// Elements of the image's buffer.
        image: usize,
        /// Elements of the labels' buffer.
        labels: usize,
    },
    /// A case index or id that the store does not hold.
    #[error("no case {0:?} in the store")]
    NoCase(String),
}

impl StoreError {
    fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.into(),
            what: what.into(),
        }
    }

    fn invalid(path: &Path, what: impl Into<String>) -> Self {
        Self::Invalid {
            path: path.into(),
            what: what.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Affine, Annotation, Fingerprint, Grid};

    /// A record of an empty case.
    pub(super) fn record(number: usize) -> CaseRecord {
        CaseRecord {
            id: format!("case-{number:06}"),
            kind: CaseKind::Labelled,
            grid: Grid {
                shape: [1; 3],
                affine: Affine::axis_aligned([1.0; 3], [0.0; 3]),
            },
            annotation: Annotation {
                classes: Vec::new(),
                assumed_tumour_free: false,
            },
            patient: String::new(),
            labels_by: String::new(),
            source_hash: Digest::default(),
            fingerprint: Fingerprint::default(),
            content_hash: Digest::of(&number.to_le_bytes()),
            source: SourceGeometry {
                shape_xyz: [1; 3],
                affine_xyz: [[0.0; 4]; 4],
                orientation: "RAS".into(),
            },
            organs: Vec::new(),
            tumours: Vec::new(),
        }
    }

    #[test]
    fn a_snapshot_is_the_digest_of_canonical_json() {
        let plan = Plan::default();
        // Enough for several pieces.
        let records: Vec<CaseRecord> = (0..1500).map(record).collect();
        for count in [0, 1, 2, 1500] {
            let cases: Vec<_> = records[..count].iter().map(|r| (&r.id, r.content_hash)).collect();
            assert_eq!(snapshot_of(&records[..count], &plan), Digest::of_json(&(cases, &plan)));
        }
        let of_patient = |patient: &str| CaseRecord {
            patient: patient.into(),
            ..record(7)
        };
        let known = of_patient("a \"b\"\\\n");
        let expected = serde_json::json!([[[known.id, known.content_hash, known.patient]], plan]);
        assert_eq!(
            snapshot_of(std::slice::from_ref(&known), &plan),
            Digest::of_json(&expected)
        );
        assert_ne!(snapshot_of(&[known], &plan), snapshot_of(&[of_patient("")], &plan));
    }
}
