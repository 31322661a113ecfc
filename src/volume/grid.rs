//! Where voxels lie in the patient: shape and affine of a sampling grid.

use serde::{Deserialize, Serialize};

/// A size or an index in voxels, ordered (z, y, x).
pub type Shape = [usize; 3];

/// A 4x4 matrix from homogeneous (z, y, x) voxel indices to RAS+ millimetres (right, anterior, superior).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, bincode::Encode, bincode::Decode)]
pub struct Affine(pub [[f64; 4]; 4]);

impl Affine {
    /// Returns the affine of an axis-aligned grid: spacing (z, y, x) in mm, origin (right, anterior, superior) in mm.
    pub fn axis_aligned(spacing_mm: [f64; 3], origin_mm: [f64; 3]) -> Self {
        let [sz, sy, sx] = spacing_mm;
        let [r, a, s] = origin_mm;
        Self([
            [0.0, 0.0, sx, r],
            [0.0, sy, 0.0, a],
            [sz, 0.0, 0.0, s],
            [0.0, 0.0, 0.0, 1.0],
        ])
    }

    /// Returns the RAS position in mm of a fractional (z, y, x) index.
    pub fn to_mm(&self, index: [f64; 3]) -> [f64; 3] {
        let [z, y, x] = index;
        std::array::from_fn(|row| {
            let m = self.0[row];
            m[0] * z + m[1] * y + m[2] * x + m[3]
        })
    }

    /// Returns the affine of the same grid seen from voxel `start`, which becomes index 0.
    pub fn shifted(&self, start: [i64; 3]) -> Self {
        let origin = self.to_mm(start.map(|v| v as f64));
        let mut out = *self;
        for (row, value) in origin.into_iter().enumerate() {
            out.0[row][3] = value;
        }
        out
    }

    /// Returns `self * other`: the affine of a grid whose indices `other` maps to indices of this grid.
    pub fn compose(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|row| {
            std::array::from_fn(|column| (0..4).map(|k| self.0[row][k] * other.0[k][column]).sum())
        }))
    }

    /// Returns the voxel size along (z, y, x) in mm: the lengths of the affine's columns.
    pub fn spacing_mm(&self) -> [f64; 3] {
        std::array::from_fn(|column| (0..3).map(|row| self.0[row][column].powi(2)).sum::<f64>().sqrt())
    }
}

/// A sampling grid: how many voxels, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, bincode::Encode, bincode::Decode)]
pub struct Grid {
    /// Voxels along (z, y, x).
    pub shape: Shape,
    /// From (z, y, x) indices to RAS mm.
    pub affine: Affine,
}

impl Grid {
    /// Returns the voxel size along (z, y, x) in mm.
    pub fn spacing_mm(&self) -> [f64; 3] {
        self.affine.spacing_mm()
    }

    /// Returns the number of voxels.
    pub fn voxels(&self) -> usize {
        self.shape.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_moves_the_origin_along_the_axes() {
        let affine = Affine::axis_aligned([5.0, 2.0, 1.0], [10.0, 20.0, 30.0]);
        let shifted = affine.shifted([1, 2, 3]);
        assert_eq!(shifted.to_mm([0.0; 3]), [13.0, 24.0, 35.0]);
        assert_eq!(shifted.spacing_mm(), [5.0, 2.0, 1.0]);
    }
}
