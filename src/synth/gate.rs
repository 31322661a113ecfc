//! The gate's scores: how well a critic recognises a lesion where it was painted.

use ndarray::Array3;

/// What the critic saw in a lesion's cube, and where the lesion is.
pub struct Judged<'a> {
    /// The critic's label ids before synthesis.
    pub before: &'a Array3<u8>,
    /// The critic's label ids after it.
    pub after: &'a Array3<u8>,
    /// The lesion: {soft mask >= 0.5}, 1 inside.
    pub lesion: &'a Array3<u8>,
    /// Real tumours and other lesions of the cube, 1 inside.
    pub others: &'a Array3<u8>,
    /// The label id of the organ's tumour.
    pub tumour_id: u8,
    /// Voxel size (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
    /// Radius of the lesion's equivalent sphere in mm.
    pub radius_mm: f64,
}

/// The three scores, each in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// |P_after and L| / |L|.
    pub recall: f64,
    /// |P_after and N and L dilated by one voxel| / |P_after and N|; 0 where P_after misses N.
    pub precision: f64,
    /// |P_before and L| / |L|; above 0.1 the host is suspect.
    pub before: f64,
}
