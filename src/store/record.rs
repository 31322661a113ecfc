//! What is known of a case without reading its voxels.

use crate::digest::Digest;
use crate::volume::{Annotation, Grid, Region, Shape};

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
    /// Mean inside minus mean of the organ's healthy voxels within 10 mm, in HU.
    pub contrast_hu: f32,
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
    /// BLAKE3 of the canonically oriented source voxels and shape (see `ingest::source_hash`).
    pub source_hash: Digest,
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
}
