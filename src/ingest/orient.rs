//! Any axis orientation to the canonical one: indices (z, y, x) that grow to Superior, Anterior and Right.

use ndarray::{Array3, Axis};

use super::nifti::Scan;
use crate::digest::{Digest, update_i16};
use crate::store::SourceGeometry;
use crate::volume::{Affine, Grid};

/// A volume on the canonical axes.
#[derive(Clone, Debug)]
pub struct Oriented<T> {
    /// Shape and affine of the reoriented voxels; oblique axes stay oblique.
    pub grid: Grid,
    /// Voxels (z, y, x).
    pub voxels: Array3<T>,
    /// The file's own grid.
    pub source: SourceGeometry,
}

/// For each file axis (i, j, k): the patient axis (0 right, 1 anterior, 2 superior) it runs along, and its sign.
type Orientation = [(usize, bool); 3];

/// Reorders and flips axes so that they grow to Superior, Anterior, Right; no voxel value changes.
pub fn orient<T: Clone>(scan: Scan<T>) -> Oriented<T> {
    let orientation = orientation_of(&scan.affine_xyz);
    let shape_kji = scan.voxels.dim();
    let source = SourceGeometry {
        shape_xyz: [shape_kji.2, shape_kji.1, shape_kji.0],
        affine_xyz: scan.affine_xyz,
        orientation: axis_codes(&orientation),
    };
    let mut voxels = scan.voxels;
    flip(&mut voxels, &orientation);
    let mut order = [0; 3];
    for (file_axis, (patient_axis, _)) in orientation.into_iter().enumerate() {
        // Arrays hold (k, j, i) and (S, A, R): both in reverse.
        order[2 - patient_axis] = 2 - file_axis;
    }
    let voxels = voxels.permuted_axes(order).as_standard_layout().into_owned();
    Oriented {
        grid: oriented_grid(&source),
        voxels,
        source,
    }
}

/// Returns the grid of a file's voxels after [`orient`].
pub fn oriented_grid(source: &SourceGeometry) -> Grid {
    let m = &source.affine_xyz;
    let mut affine = [[0.0; 4]; 4];
    for (row, line) in affine.iter_mut().enumerate() {
        line[3] = m[row][3];
    }
    let mut shape = [0; 3];
    for (file_axis, (patient_axis, is_forward)) in orientation_of(m).into_iter().enumerate() {
        let (side, target_axis) = (source.shape_xyz[file_axis], 2 - patient_axis);
        shape[target_axis] = side;
        for (row, line) in affine.iter_mut().take(3).enumerate() {
            let step = m[row][file_axis];
            line[target_axis] = if is_forward { step } else { -step };
            line[3] += if is_forward { 0.0 } else { step * (side - 1) as f64 };
        }
    }
    Grid {
        shape,
        affine: Affine(affine),
    }
}

/// Undoes [`orient`]: voxels (z, y, x) back to the file's (k, j, i).
pub fn file_order<T: Clone>(voxels: Array3<T>, source: &SourceGeometry) -> Array3<T> {
    let orientation = orientation_of(&source.affine_xyz);
    let mut order = [0; 3];
    for (file_axis, (patient_axis, _)) in orientation.into_iter().enumerate() {
        order[2 - file_axis] = 2 - patient_axis;
    }
    let mut voxels = voxels.permuted_axes(order);
    flip(&mut voxels, &orientation);
    voxels.as_standard_layout().into_owned()
}

/// Turns round the axes of a file's voxels (k, j, i) that run backwards.
fn flip<T>(voxels: &mut Array3<T>, orientation: &Orientation) {
    for (file_axis, (_, is_forward)) in orientation.iter().enumerate() {
        if !is_forward {
            voxels.invert_axis(Axis(2 - file_axis));
        }
    }
}

/// Finds the patient axis nearest to each file axis.
///
/// # Source
/// The rule of nibabel's `io_orientation`: take the rotation nearest to the affine without its zooms, then let the file
/// axis that is nearest to any patient axis choose first.
fn orientation_of(affine_xyz: &[[f64; 4]; 4]) -> Orientation {
    let columns = nearest_rotation(affine_xyz);
    let mut order = [0, 1, 2];
    let strongest = |column: &[f64; 3]| column.iter().fold(0.0, |best: f64, value| best.max(value * value));
    // A stable sort, as numpy's: the lower axis wins a tie.
    order.sort_by(|a, b| strongest(&columns[*b]).total_cmp(&strongest(&columns[*a])));
    let mut orientation = [(0, true); 3];
    let mut free = vec![0, 1, 2];
    for file_axis in order {
        let column = columns[file_axis];
        // The first of equals, as numpy's argmax.
        let mut best = 0;
        for candidate in 1..free.len() {
            if column[free[candidate]].abs() > column[free[best]].abs() {
                best = candidate;
            }
        }
        let patient_axis = free.remove(best);
        orientation[file_axis] = (patient_axis, column[patient_axis] >= 0.0);
    }
    orientation
}

/// Returns the columns of the orthogonal matrix nearest to the affine's axes of unit length (its polar factor).
fn nearest_rotation(affine_xyz: &[[f64; 4]; 4]) -> [[f64; 3]; 3] {
    let mut columns: [[f64; 3]; 3] = std::array::from_fn(|column| {
        let axis: [f64; 3] = std::array::from_fn(|row| affine_xyz[row][column]);
        let length = libm::sqrt(axis.iter().map(|v| v * v).sum());
        axis.map(|v| v / length)
    });
    // Newton's iteration X <- (X + X^-T) / 2 squares the error each time; unit columns start it close by.
    for _ in 0..60 {
        let next = newton_step(&columns);
        let change: f64 = (0..9).map(|n| (next[n / 3][n % 3] - columns[n / 3][n % 3]).abs()).sum();
        columns = next;
        if change < 1e-15 {
            break;
        }
    }
    columns
}

fn newton_step(columns: &[[f64; 3]; 3]) -> [[f64; 3]; 3] {
    let cross = |a: [f64; 3], b: [f64; 3]| {
        [
            a[1] * b[2] - a[2] * b[1],
            a[2] * b[0] - a[0] * b[2],
            a[0] * b[1] - a[1] * b[0],
        ]
    };
    let [a, b, c] = *columns;
    // The columns of the inverse transpose are the cross products over the determinant.
    let cofactors = [cross(b, c), cross(c, a), cross(a, b)];
    let determinant: f64 = (0..3).map(|row| a[row] * cofactors[0][row]).sum();
    std::array::from_fn(|column| {
        std::array::from_fn(|row| 0.5 * (columns[column][row] + cofactors[column][row] / determinant))
    })
}

/// Returns the letters towards which the file's axes grow, such as `LPS`.
fn axis_codes(orientation: &Orientation) -> String {
    let letter =
        |&(axis, is_forward): &(usize, bool)| [["L", "R"], ["P", "A"], ["I", "S"]][axis][usize::from(is_forward)];
    orientation.iter().map(letter).collect()
}

/// Returns the identity of a source volume: BLAKE3 of its shape and HU on the canonical axes, before any resampling.
///
/// `python/freetumor/source_hash.py` computes the same. Promise P7 compares these hashes.
pub fn source_hash(voxels: &Array3<i16>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"freetumor.source.v1");
    for side in voxels.shape() {
        hasher.update(&u32::try_from(*side).expect("sides are bounded at 2048").to_le_bytes());
    }
    for plane in voxels.outer_iter() {
        update_i16(&mut hasher, plane.iter());
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_and_permuted_scan_keeps_every_voxel_in_place() {
        // File axes: i to Inferior (2 mm), j to Left (1 mm), k to Anterior (3 mm).
        let affine_xyz = [
            [0.0, -1.0, 0.0, 40.0],
            [0.0, 0.0, 3.0, -10.0],
            [-2.0, 0.0, 0.0, 70.0],
            [0.0, 0.0, 0.0, 1.0],
        ];
        let voxels = Array3::from_shape_fn((4, 5, 6), |(k, j, i)| (100 * k + 10 * j + i) as i16);
        let oriented = orient(Scan {
            affine_xyz,
            voxels: voxels.clone(),
        });
        assert_eq!(file_order(oriented.voxels.clone(), &oriented.source), voxels);
        assert_eq!(oriented.source.orientation, "ILA");
        assert_eq!(oriented.grid.shape, [6, 4, 5]);
        assert_eq!(oriented.grid.spacing_mm(), [2.0, 3.0, 1.0]);
        for ((z, y, x), value) in oriented.voxels.indexed_iter() {
            let (k, j, i) = (
                f64::from(value / 100),
                f64::from(value / 10 % 10),
                f64::from(value % 10),
            );
            let expected = [40.0 - j, -10.0 + 3.0 * k, 70.0 - 2.0 * i];
            assert_eq!(oriented.grid.affine.to_mm([z as f64, y as f64, x as f64]), expected);
        }
    }

    #[test]
    fn the_hash_of_a_known_volume_never_changes() {
        let voxels = Array3::from_shape_fn((2, 3, 4), |(z, y, x)| (z * 12 + y * 4 + x) as i16 - 5);
        let mut bytes = b"freetumor.source.v1".to_vec();
        for side in [2_u32, 3, 4] {
            bytes.extend(side.to_le_bytes());
        }
        (-5_i16..19).for_each(|hu| bytes.extend(hu.to_le_bytes()));
        assert_eq!(source_hash(&voxels), Digest::of(&bytes));
    }
}
