//! Labels from their own grid onto an image's, through both affines, oblique axes included.

use ndarray::Array3;

use super::orient::Oriented;
use crate::volume::{Affine, Grid, Shape};

/// Labels on another grid, and what that cost.
#[derive(Clone, Debug)]
pub struct Regridded {
    /// The labels, on the grid that was asked for; 0 where the file has none.
    pub voxels: Array3<u8>,
    /// Voxels of the file with a label.
    pub labelled: usize,
    /// Those of them whose centre lies outside the grid.
    pub outside: usize,
}

/// Brings labels onto a grid: every voxel takes the label in whose voxel its centre lies.
///
/// Departure: scipy's order 0, which nibabel's `resample_from_to` calls, takes the outer half of a border voxel to lie
/// outside the file; here a voxel is whole wherever it lies.
pub fn regrid_labels(labels: &Oriented<u8>, grid: &Grid) -> Regridded {
    let to_labels = inverse(&labels.grid.affine).compose(&grid.affine);
    let side = labels.grid.shape;
    let voxels = Array3::from_shape_fn(grid.shape, |(z, y, x)| {
        nearest(&to_labels, [z, y, x], side).map_or(0, |at| labels.voxels[at])
    });
    let to_grid = inverse(&grid.affine).compose(&labels.grid.affine);
    let (mut labelled, mut outside) = (0, 0);
    for ((z, y, x), _) in labels.voxels.indexed_iter().filter(|(_, id)| **id != 0) {
        labelled += 1;
        outside += usize::from(nearest(&to_grid, [z, y, x], grid.shape).is_none());
    }
    Regridded {
        voxels,
        labelled,
        outside,
    }
}

/// Returns the voxel of the other grid that holds a voxel's centre, or nothing outside it.
fn nearest(to_other: &Affine, voxel: [usize; 3], side: Shape) -> Option<[usize; 3]> {
    let at = to_other.to_mm(voxel.map(|v| v as f64)).map(|v| libm::floor(v + 0.5));
    let is_inside = (0..3).all(|axis| at[axis] >= 0.0 && at[axis] < side[axis] as f64);
    is_inside.then(|| at.map(|v| v as usize))
}

/// Returns the inverse of an affine; readers have refused those whose axes lie in a plane.
pub(super) fn inverse(affine: &Affine) -> Affine {
    let m = &affine.0;
    let minor = |r: usize, c: usize| {
        let [r1, r2] = [(r + 1) % 3, (r + 2) % 3];
        let [c1, c2] = [(c + 1) % 3, (c + 2) % 3];
        m[r1][c1] * m[r2][c2] - m[r1][c2] * m[r2][c1]
    };
    let determinant: f64 = (0..3).map(|c| m[0][c] * minor(0, c)).sum();
    let mut out = [[0.0; 4]; 4];
    for (row, line) in out.iter_mut().take(3).enumerate() {
        for (column, value) in line.iter_mut().take(3).enumerate() {
            *value = minor(column, row) / determinant;
        }
        line[3] = -(0..3).map(|column| line[column] * m[column][3]).sum::<f64>();
    }
    out[3][3] = 1.0;
    Affine(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_affine_times_its_inverse_changes_nothing() {
        let affine = Affine([
            [0.1, -0.2, 0.9, 10.0],
            [0.3, 1.4, 0.1, -20.0],
            [2.5, 0.2, -0.3, 30.0],
            [0.0, 0.0, 0.0, 1.0],
        ]);
        let one = inverse(&affine).compose(&affine);
        for (row, line) in one.0.iter().enumerate() {
            for (column, value) in line.iter().enumerate() {
                let expected = f64::from(u8::from(row == column));
                assert!((value - expected).abs() < 1e-12, "{row} {column}: {value}");
            }
        }
    }
}
