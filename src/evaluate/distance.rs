//! Distances in millimetres from the voxels of a mask.

use ndarray::{Array3, Axis};

/// Returns every voxel's squared distance to the nearest voxel of the mask, in mm^2; infinite where there is none.
///
/// Exact: the minimum over one axis after the other of the distance so far plus the squared step. The plain quadratic
/// form is enough for cubes of at most 96 voxels.
pub fn squared_distance_mm(mask: &Array3<u8>, spacing_mm: [f64; 3]) -> Array3<f32> {
    let mut distance = mask.mapv(|value| if value != 0 { 0.0 } else { f32::INFINITY });
    for (axis, spacing) in spacing_mm.into_iter().enumerate() {
        let squared: Vec<f32> = (0..distance.len_of(Axis(axis)))
            .map(|step| (step as f64 * spacing).powi(2) as f32)
            .collect();
        for mut lane in distance.lanes_mut(Axis(axis)) {
            let old = lane.to_vec();
            if old.iter().all(|value| value.is_infinite()) {
                continue;
            }
            for (i, value) in lane.iter_mut().enumerate() {
                let costs = old.iter().enumerate().map(|(j, cost)| cost + squared[i.abs_diff(j)]);
                *value = costs.fold(f32::INFINITY, f32::min);
            }
        }
    }
    distance
}

/// Returns the mask grown by `radius_mm` (1 inside).
pub fn dilated(mask: &Array3<u8>, spacing_mm: [f64; 3], radius_mm: f64) -> Array3<u8> {
    // A hair more, so that a voxel at exactly the radius is inside whatever the rounding.
    let limit = (radius_mm * radius_mm * (1.0 + 1e-6)) as f32;
    squared_distance_mm(mask, spacing_mm).mapv(|squared| u8::from(squared <= limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_euclidean_in_mm() {
        let mut mask = Array3::zeros((4, 4, 4));
        mask[[0, 0, 0]] = 1;
        let squared = squared_distance_mm(&mask, [5.0, 2.0, 1.0]);
        assert_eq!(squared[[1, 2, 3]], 25.0 + 16.0 + 9.0);
        assert_eq!(
            dilated(&mask, [5.0, 2.0, 1.0], 2.0).iter().filter(|v| **v == 1).count(),
            4
        );
        assert!(
            squared_distance_mm(&Array3::zeros((2, 2, 2)), [1.0; 3])
                .iter()
                .all(|v| v.is_infinite())
        );
    }
}
