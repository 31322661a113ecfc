//! What the discriminator shall say of a cube's voxels, and what it says of lesions.

use burn::tensor::{Tensor, TensorData};
use ndarray::Array3;

use super::LearnError;
use super::cubes::{Catalogue, Cube, admissible};
use super::texture::per_lesion;
use crate::nn::{REAL, SYNTHETIC, Unet};
use crate::rng::Rng;

/// Returns the discriminator's target classes of a cube: organ-normalised, so that every organ's background is 0 and
/// every organ's tumour 1; nothing where it is not known whether a voxel is a real tumour.
///
/// (The released FreeTumor code feeds raw ids here, which teaches healthy pancreas as fake; method, section 7, item 6.)
pub(super) fn discriminator_classes(
    catalogue: &Catalogue,
    cube: &Cube,
    lesion: Option<&Array3<u8>>,
) -> Result<Vec<Option<usize>>, LearnError> {
    let sets = admissible(catalogue.cases, cube)?;
    let is_tumour = |id: u8| catalogue.organs.iter().any(|organ| organ.tumour_id == id);
    let class = |set: crate::volume::ClassSet| match (set.iter().any(is_tumour), set.iter().all(is_tumour)) {
        (false, _) => Some(0),
        (true, true) => Some(REAL),
        (true, false) => None,
    };
    let mut classes: Vec<Option<usize>> = sets.into_iter().map(class).collect();
    if let Some(lesion) = lesion {
        let painted = classes.iter_mut().zip(lesion).filter(|(_, lesion)| **lesion == 1);
        painted.for_each(|(class, _)| *class = Some(SYNTHETIC));
    }
    Ok(classes)
}

/// Weighs a cube's voxels so that every class that it shows counts the same in all, whatever its volume.
///
/// # Shape
/// classes `[D, H, W]` flattened -> `[3, D, H, W]` flattened.
pub(super) fn class_weights(classes: &[Option<usize>], share: f32) -> Vec<f32> {
    let mut counts = [0_usize; 3];
    classes.iter().flatten().for_each(|class| counts[*class] += 1);
    let mut weights = vec![0.0; 3 * classes.len()];
    for (voxel, class) in classes.iter().enumerate() {
        if let Some(class) = class {
            weights[class * classes.len() + voxel] = share / counts[*class] as f32;
        }
    }
    weights
}

/// Returns the log odds of real over painted, voxel by voxel.
///
/// # Shape
/// logits `[B, 3, D, H, W]` -> `[B, 1, D, H, W]`.
pub(super) fn log_odds(logits: Tensor<5>) -> Tensor<5> {
    logits.clone().narrow(1, REAL, 1) - logits.narrow(1, SYNTHETIC, 1)
}

/// Returns the mean of every lesion's voxels.
///
/// # Shape
/// values and masks (1 inside) `[B, 1, D, H, W]` -> `[B]`.
pub(super) fn lesion_means(values: Tensor<5>, masks: Tensor<5>) -> Tensor<1> {
    per_lesion(values * masks.clone()) / per_lesion(masks).clamp_min(1.0)
}

/// Noise of [`unsteadiness`] in units of the window: 8.5 HU of the abdominal one.
const SHAKE: f64 = 0.02;

/// Returns how much the discriminator's view of real lesions changes when a little noise is added.
///
/// # Shape
/// images `[B, 1, D, H, W]`, the discriminator's logits of them, masks of the real lesions -> `[1]`.
///
/// # Source
/// The approximated R1 penalty of Lin et al., arXiv 2501.08316: the gradient's norm without a second derivative. Spectral
/// norm would do nothing here, as every convolution but the last is followed by a norm.
pub(super) fn unsteadiness(discriminator: &Unet, [images, logits, real]: [Tensor<5>; 3], rng: &mut Rng) -> Tensor<1> {
    let shape = images.dims();
    let values = rng.normals(shape.iter().product());
    let noise = Tensor::from_data(TensorData::new(values, shape), &images.device());
    let shaken = discriminator.forward(images + noise * SHAKE, None);
    lesion_means((log_odds(logits) - log_odds(shaken)).powi_scalar(2), real).mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toy;

    #[test]
    fn the_discriminator_sees_organ_normalised_classes() {
        let store = toy::store(1, 1);
        let catalogue = Catalogue::new(&store, &[0, 1]);
        let cube = |case: usize, labels: Vec<u8>| Cube {
            case,
            image: Array3::zeros((1, 1, 4)),
            labels: Array3::from_shape_vec((1, 1, labels.len()), labels).unwrap(),
        };
        let classes =
            |cube: &Cube, lesion: Option<&Array3<u8>>| discriminator_classes(&catalogue, cube, lesion).unwrap();
        // Liver, its tumour, healthy pancreas and its tumour; the annotators looked for the liver's tumours alone.
        let labelled = cube(0, vec![1, 2, 3, 4]);
        assert_eq!(classes(&labelled, None), [Some(0), Some(REAL), None, Some(REAL)]);
        let lesion = Array3::from_shape_vec((1, 1, 4), vec![1, 0, 0, 0]).unwrap();
        assert_eq!(classes(&labelled, Some(&lesion))[0], Some(SYNTHETIC));
        // Where nobody looked for tumours, the organ may hide one; what was painted is known all the same.
        let unlabelled = cube(1, vec![1, 1, 0, 255]);
        assert_eq!(classes(&unlabelled, Some(&lesion)), [Some(SYNTHETIC), None, None, None]);
    }

    #[test]
    fn every_class_of_a_cube_counts_the_same() {
        let weights = class_weights(&[Some(0), Some(0), Some(2), None], 0.5);
        assert_eq!(weights, [0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0]);
    }
}
