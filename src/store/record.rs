//! What is known of a case without reading its voxels.

use crate::digest::Digest;
use crate::volume::{Annotation, Fingerprint, Grid, Region, Shape};

/// The most bytes of [`CaseRecord::patient`] and of [`CaseRecord::labels_by`].
pub const MAX_NAME_BYTES: usize = 128;

/// What stands before a model's hash in [`CaseRecord::labels_by`].
pub const PSEUDO_PREFIX: &str = "pseudo:";

/// Whether a case brings labelled tumours or only organ masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, bincode::Encode, bincode::Decode)]
#[serde(rename_all = "snake_case")]
pub enum CaseKind {
    /// Tumours were annotated.
    Labelled,
    /// Organs at most.
    Unlabelled,
}

/// An organ of a case (healthy tissue and its tumours together).
#[derive(Clone, Debug, PartialEq, serde::Serialize, bincode::Encode, bincode::Decode)]
pub struct OrganRecord {
    /// The organ's label id.
    pub id: u8,
    /// Voxels of healthy tissue.
    pub voxels: u64,
    /// The box around them.
    pub region: Region,
    /// Diameter of the largest ball that fits, in mm: what the organ can hold whole.
    pub holds_mm: f32,
}

/// A connected real tumour of a case.
#[derive(Clone, Debug, PartialEq, serde::Serialize, bincode::Encode, bincode::Decode)]
pub struct TumourRecord {
    /// The tumour's label id.
    pub id: u8,
    /// Its voxels.
    pub voxels: u64,
    /// The box around it.
    pub region: Region,
    /// One of its voxels, the nearest to its centroid (z, y, x).
    pub centre: [i64; 3],
    /// Equivalent-sphere diameter in mm.
    pub diameter_mm: f32,
    /// Mean inside minus mean of the organ's healthy voxels within 10 mm, in HU; 0 where there are none.
    pub contrast_hu: f32,
}

impl TumourRecord {
    /// Returns the contrast where there is tissue to compare with. (Two means of rounded HU are hardly ever the same number.)
    pub fn known_contrast_hu(&self) -> Option<f32> {
        (self.contrast_hu != 0.0).then_some(self.contrast_hu)
    }
}

/// A voxel where a lesion may be centred.
#[derive(Clone, Copy, Debug, PartialEq, bincode::Encode, bincode::Decode)]
pub struct Candidate {
    /// The voxel (z, y, x).
    pub voxel: [u16; 3],
    /// Distance to the nearest voxel outside the organ or inside a real tumour, in mm.
    pub depth_mm: f32,
}

/// The grid a case came from, so that results can go back to it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, bincode::Encode, bincode::Decode)]
pub struct SourceGeometry {
    /// Voxels as stored in the file (first axis fastest).
    pub shape_xyz: Shape,
    /// The file's affine from (i, j, k) to RAS mm, row-major.
    pub affine_xyz: [[f64; 4]; 4],
    /// The file's axis codes, such as `LPS`.
    pub orientation: String,
}

/// Two cases that show the same scan, saved differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct NearDuplicate {
    /// The lower index among the store's cases.
    pub first: u32,
    /// The higher index.
    pub second: u32,
    /// How much speaks for it, see `docs/ingest.md`.
    pub score: u16,
}

/// Everything known of a case without reading its voxels; stands in the case's file and in the index.
#[derive(Clone, Debug, PartialEq, serde::Serialize, bincode::Encode, bincode::Decode)]
pub struct CaseRecord {
    /// The case's opaque id.
    pub id: String,
    /// Whether tumours were annotated.
    pub kind: CaseKind,
    /// The stored grid.
    pub grid: Grid,
    /// What the annotators looked for.
    pub annotation: Annotation,
    /// Whose scan it is, under a name without meaning; empty: the case is its own patient. Folds never divide a patient.
    pub patient: String,
    /// Who made the labels: empty for annotators, `pseudo:` and a model's hash for a model.
    pub labels_by: String,
    /// BLAKE3 of the canonically oriented source voxels and shape (see `ingest::source_hash`).
    pub source_hash: Digest,
    /// What the scan looks like, so that it is known again when it was saved differently.
    pub fingerprint: Fingerprint,
    /// BLAKE3 of everything stored that can change a patch.
    pub content_hash: Digest,
    /// Where the case came from.
    pub source: SourceGeometry,
    /// Organs with at least one voxel, by id.
    pub organs: Vec<OrganRecord>,
    /// Connected real tumours.
    pub tumours: Vec<TumourRecord>,
}

impl CaseRecord {
    /// Returns an organ's record.
    pub fn organ(&self, id: u8) -> Option<&OrganRecord> {
        self.organs.iter().find(|organ| organ.id == id)
    }

    /// Tells whether a model made the labels.
    pub fn has_pseudo_labels(&self) -> bool {
        self.labels_by.starts_with(PSEUDO_PREFIX)
    }

    /// Tells which field a reader should not believe, or nothing.
    pub(super) fn refusal(&self) -> Option<String> {
        if let Some(refusal) = self.fingerprint.refusal() {
            return Some(refusal.to_string());
        }
        let names = [("patient", &self.patient), ("labels_by", &self.labels_by)];
        let (field, name) = names.into_iter().find(|(_, name)| name.len() > MAX_NAME_BYTES)?;
        Some(format!(
            "{field}: expected at most {MAX_NAME_BYTES} bytes, got {}",
            name.len()
        ))
    }
}
