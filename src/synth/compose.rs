//! The synthesis equation x' = round(x + residual), and the contrast that came of it.

use ndarray::{Array3, Zip};

use super::LESION_FROM;
use crate::sampler::HU_RANGE;
use crate::volume::dilated;

/// How far from the lesion the organ counts as its surroundings, in mm.
const AROUND_MM: f64 = 10.0;

/// Adds a residual in HU to an image, on integers; where the soft mask is 0, the image is returned bit for bit (P5).
pub fn compose(image: &Array3<i16>, residual: &Array3<f32>, soft: &Array3<u8>) -> Array3<i16> {
    let [low, high] = HU_RANGE.map(f32::from);
    Zip::from(image).and(residual).and(soft).map_collect(|x, r, soft| {
        if *soft == 0 || !r.is_finite() {
            return *x;
        }
        (f32::from(*x) + r).round().clamp(low, high) as i16
    })
}

/// Adds to a residual in HU what its mean over the lesion lacks of `mean_hu`, each voxel as much as its mask says.
pub fn shift_mean(residual: &mut Array3<f32>, soft: &Array3<u8>, mean_hu: f64) {
    let (mut count, mut sum, mut masks) = (0u32, 0.0, 0.0);
    Zip::from(&*residual).and(soft).for_each(|r, soft| {
        if *soft >= LESION_FROM {
            count += 1;
            sum += f64::from(*r);
            masks += f64::from(*soft);
        }
    });
    if count > 0 {
        let lacking = (mean_hu * f64::from(count) - sum) / masks;
        Zip::from(residual)
            .and(soft)
            .for_each(|r, soft| *r += (lacking * f64::from(*soft)) as f32);
    }
}

/// Returns the mean inside the lesion minus the mean of the organ's healthy voxels within 10 mm, in HU; 0 where one of
/// them has no voxel.
pub fn realised_hu(
    image: &Array3<i16>,
    labels: &Array3<u8>,
    soft: &Array3<u8>,
    organ_id: u8,
    spacing_mm: [f64; 3],
) -> f64 {
    let lesion = soft.map(|soft| u8::from(*soft >= LESION_FROM));
    let around = dilated(&lesion, spacing_mm, AROUND_MM);
    let (mut inside, mut outside) = ([0i64; 2], [0i64; 2]);
    Zip::from(image)
        .and(labels)
        .and(soft)
        .and(&around)
        .for_each(|x, label, soft, around| {
            if *soft >= LESION_FROM {
                inside[0] += i64::from(*x);
                inside[1] += 1;
            } else if *soft == 0 && *around && *label == organ_id {
                outside[0] += i64::from(*x);
                outside[1] += 1;
            }
        });
    if inside[1] == 0 || outside[1] == 0 {
        return 0.0;
    }
    inside[0] as f64 / inside[1] as f64 - outside[0] as f64 / outside[1] as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_mask_changes_and_values_are_clamped() {
        let image = Array3::from_shape_vec([1, 1, 4], vec![10i16, 10, 3070, -1020]).unwrap();
        let residual = Array3::from_shape_vec([1, 1, 4], vec![5.0f32, -20.6, 50.0, -50.0]).unwrap();
        let soft = Array3::from_shape_vec([1, 1, 4], vec![0u8, 200, 255, 1]).unwrap();
        let out = compose(&image, &residual, &soft);
        assert_eq!(out.as_slice().unwrap(), [10, -11, 3071, -1024]);
    }

    #[test]
    fn a_mean_is_shifted_by_the_mask() {
        let soft = Array3::from_shape_vec([1, 1, 5], vec![0u8, 64, 128, 255, 255]).unwrap();
        let mut residual = Array3::from_shape_vec([1, 1, 5], vec![0.0f32, -5.0, -20.0, -50.0, -44.0]).unwrap();
        shift_mean(&mut residual, &soft, -50.0);
        // 36 HU are lacking over masks of 638 in all.
        let shift = |soft: f32| -36.0 * soft / 638.0;
        let wanted = [
            0.0,
            -5.0 + shift(64.0),
            -20.0 + shift(128.0),
            -50.0 + shift(255.0),
            -44.0 + shift(255.0),
        ];
        assert!(
            residual
                .iter()
                .zip(wanted)
                .all(|(got, wanted)| (got - wanted).abs() < 1e-4),
            "{residual}"
        );
        let nothing = Array3::zeros([1, 1, 5]);
        let mut residual = Array3::zeros([1, 1, 5]);
        shift_mean(&mut residual, &nothing, -50.0);
        assert_eq!(residual, Array3::<f32>::zeros([1, 1, 5]));
    }

    #[test]
    fn contrast_is_measured_against_the_healthy_organ() {
        let labels = Array3::from_shape_fn([1, 1, 20], |(_, _, x)| u8::from(x > 2));
        let soft = Array3::from_shape_fn([1, 1, 20], |(_, _, x)| if (8..11).contains(&x) { 255 } else { 0 });
        let image = Array3::from_shape_fn([1, 1, 20], |(_, _, x)| match x {
            0..3 => -900,
            8..11 => 60,
            _ => 100,
        });
        assert_eq!(realised_hu(&image, &labels, &soft, 1, [1.0; 3]), -40.0);
        assert_eq!(realised_hu(&image, &labels, &soft, 3, [1.0; 3]), 0.0);
    }
}
