//! What a lesion's texture shall be: as strong as real lesions' textures are, as bright or dark at its edge, another one for other noise,
//! and smooth.
//!
//! Strength is the standard deviation over the lesion of means over 3 x 3 x 3 voxels. Means, because single voxels are mostly
//! the scanner's noise, which a painted lesion has from its host already.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};

use super::LearnError;
use super::augment::Look;
use super::cubes::{Catalogue, lesion_of, read_cube, side_of, stack};
use super::painted::HostBatch;
use crate::kernel::{self, total};
use crate::nn::Generator;
use crate::rng::Rng;
use crate::volume::SizeClass;

/// Added to variances in HU^2, so that the root's slope stays finite where a lesion is flat.
const LEAST_VARIANCE: f64 = 0.01;

/// Averages the lesion's voxels among 3 x 3 x 3, 0 outside the lesion.
///
/// # Shape
/// image and lesion (1 inside) `[B, 1, D, H, W]` -> `[B, 1, D, H, W]`.
pub(super) fn coarse(image: Tensor<5>, lesion: Tensor<5>) -> Tensor<5> {
    let device = image.device();
    let sum = |x: Tensor<5>| {
        let ones = Tensor::ones([1, 1, 3, 3, 3], &device);
        kernel::conv3d(x, ones, Tensor::zeros([1], &device), 1)
    };
    sum(image * lesion.clone()) / sum(lesion.clone()).clamp_min(1.0) * lesion
}

/// Sums over all but the batch.
pub(super) fn per_lesion(x: Tensor<5>) -> Tensor<1> {
    let [b, c, d, h, w] = x.dims();
    x.reshape([b, c * d * h * w]).sum_dim(1).reshape([b])
}

/// Returns the texture's strength of every lesion, in HU.
///
/// # Shape
/// image in HU and lesion (1 inside) `[B, 1, D, H, W]` -> `[B]`.
pub(super) fn strength(image_hu: Tensor<5>, lesion: Tensor<5>) -> Tensor<1> {
    let b = lesion.dims()[0];
    let size = per_lesion(lesion.clone()).clamp_min(1.0);
    let smooth = coarse(image_hu, lesion.clone());
    let mean = (per_lesion(smooth.clone()) / size.clone()).reshape([b, 1, 1, 1, 1]);
    let squares = ((smooth - mean) * lesion).powi_scalar(2);
    (per_lesion(squares) / size + LEAST_VARIANCE).sqrt()
}

/// Returns by how much a lesion's outermost voxels are brighter than those inside, in HU, and 1 where it has some inside, else 0 and 0.
/// Outermost are those that have one of their six neighbours outside; beyond the cube is outside, too.
///
/// # Shape
/// image in HU and lesion (1 inside) `[B, 1, D, H, W]` -> twice `[B]`.
pub(super) fn edge(image_hu: Tensor<5>, lesion: Tensor<5>) -> [Tensor<1>; 2] {
    let device = lesion.device();
    // A voxel and its six neighbours in 3 x 3 x 3.
    let cross = (0..27).map(|at: i32| f32::from((at / 9 - 1).abs() + (at / 3 % 3 - 1).abs() + (at % 3 - 1).abs() <= 1));
    let cross = Tensor::from_data(TensorData::new(cross.collect::<Vec<f32>>(), [1, 1, 3, 3, 3]), &device);
    let around = kernel::conv3d(lesion.clone(), cross, Tensor::zeros([1], &device), 1);
    let core = around.greater_elem(6.5).float() * lesion.clone();
    let outer = lesion - core.clone();
    let mean = |mask: Tensor<5>| per_lesion(image_hu.clone() * mask.clone()) / per_lesion(mask).clamp_min(1.0);
    let has_core = per_lesion(core.clone()).clamp_max(1.0);
    [(mean(outer) - mean(core)) * has_core.clone(), has_core]
}

/// Returns by how much neighbours differ, which share all but their noise, over the wanted strength: one number per pair.
pub(super) fn diversity(batch: &HostBatch, residual: Tensor<5>, wanted: Tensor<1>) -> Tensor<1> {
    let [b, ..] = residual.dims();
    let [d, h, w] = [2, 3, 4].map(|axis| residual.dims()[axis]);
    let of_pairs = |x: Tensor<5>, i: usize| -> Tensor<5> {
        let x: Tensor<5> = x.reshape([b / 2, 2, d, h, w]);
        x.narrow(1, i, 1)
    };
    let lesion = of_pairs(batch.lesion.clone(), 0);
    let difference = of_pairs(residual.clone(), 0) - of_pairs(residual, 1);
    let change = per_lesion(coarse(difference, lesion.clone()).abs()) / per_lesion(lesion).clamp_min(1.0);
    let wanted: Tensor<2> = wanted.reshape([b / 2, 2]);
    change / wanted.narrow(1, 0, 1).reshape([b / 2]).clamp_min(1.0)
}

/// Returns how much the texture changes from voxel to voxel inside lesions, relative to 10 HU: real tissue brings the
/// scanner's noise already, what is painted shall be smooth.
pub(super) fn roughness(batch: &HostBatch, generator: &Generator, residual: Tensor<5>) -> Tensor<1> {
    let [.., d, h, w] = residual.dims();
    let full_hu = generator.full_hu(&batch.soft, batch.contrast_hu.clone());
    let texture = (residual - batch.soft.clone() * full_hu) * batch.lesion.clone();
    let change = |axis: usize, n: usize| {
        let pair = |x: &Tensor<5>| (x.clone().narrow(axis, 0, n - 1), x.clone().narrow(axis, 1, n - 1));
        let (t, l) = (pair(&texture), pair(&batch.lesion));
        let inside = l.0 * l.1;
        total((t.1 - t.0).powi_scalar(2) * inside.clone()) / total(inside).clamp_min(1.0)
    };
    (change(2, d) + change(3, h) + change(4, w)) / (3.0 * 100.0)
}

/// A real lesion's texture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Texture {
    /// See [`strength`].
    pub strength: f32,
    /// See [`edge`]; nothing where nothing lies inside.
    pub edge: Option<f32>,
}

/// The textures of real lesions by organ and size.
pub(super) struct Textures {
    of: BTreeMap<(usize, SizeClass), Vec<Texture>>,
}

impl Textures {
    /// Measures every real lesion of a catalogue.
    pub fn measure(catalogue: &Catalogue, max_cube: usize, device: &Device) -> Result<Self, LearnError> {
        let mut of: BTreeMap<_, Vec<Texture>> = BTreeMap::new();
        for (case, organ, tumour) in catalogue.all_tumours() {
            let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
            let side = side_of(size, max_cube);
            let cube = read_cube(catalogue.cases, case, tumour.centre, side, &Look::none())?;
            let lesion = lesion_of(&cube, tumour.id).mapv(f32::from);
            let [image, lesion] = [&cube.image, &lesion].map(|array| stack(std::iter::once(array), device));
            let [edge, has_core] = edge(image.clone(), lesion.clone()).map(|x| x.into_scalar::<f32>());
            of.entry((organ, size)).or_default().push(Texture {
                strength: strength(image, lesion).into_scalar(),
                edge: (has_core > 0.0).then_some(edge),
            });
        }
        Ok(Self { of })
    }

    /// Draws a real lesion's: of the organ and the size, else of the organ, else of the size, else of any. A store without
    /// real lesions has none.
    pub fn draw(&self, rng: &mut Rng, organ: usize, size: SizeClass) -> Option<Texture> {
        let alike = |same_organ: bool, same_size: bool| -> Vec<Texture> {
            let kept =
                (self.of.iter()).filter(|((o, s), _)| (!same_organ || *o == organ) && (!same_size || *s == size));
            kept.flat_map(|(_, values)| values).copied().collect()
        };
        let choices = [(true, true), (true, false), (false, true), (false, false)];
        let mut choices = choices.into_iter().map(|(organ, size)| alike(organ, size));
        let values = choices.find(|values| !values.is_empty())?;
        Some(values[rng.below(values.len())])
    }

    /// Returns the mean strength and edge over an organ's real lesions; nothing where none has one.
    pub fn mean(&self, organ: usize) -> [Option<f64>; 2] {
        let of_organ = (self.of.iter()).filter(|((o, _), _)| *o == organ);
        let textures: Vec<Texture> = of_organ.flat_map(|(_, textures)| textures.iter().copied()).collect();
        let mean = |of: fn(&Texture) -> Option<f32>| {
            let values: Vec<f64> = textures.iter().filter_map(of).map(f64::from).collect();
            (!values.is_empty()).then(|| super::numbers::mean(values))
        };
        [mean(|texture| Some(texture.strength)), mean(|texture| texture.edge)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Condition, ContrastOver, GeneratorConfig};
    use crate::rng::Purpose;
    use crate::volume::Plan;

    fn field(values: Vec<f32>, side: usize) -> Tensor<5> {
        Tensor::from_data(TensorData::new(values, [1, 1, side, side, side]), &Device::flex())
    }

    #[test]
    fn noise_hardly_counts_and_a_slope_does() {
        let side = 12;
        let voxels = side * side * side;
        let whole = field(vec![1.0; voxels], side);
        let noise = Rng::keyed(1, 0, 0, Purpose::Test).normals(voxels);
        let of = |values: Vec<f32>| f64::from(strength(field(values, side), whole.clone()).into_scalar::<f32>());
        // White noise of 10 HU over 27 voxels: 10 / sqrt(27) = 1.9, more at the rim, where fewer voxels are averaged.
        let rough = of(noise.iter().map(|n| 10.0 * n).collect());
        assert!((1.9..2.6).contains(&rough), "{rough}");
        // A slope along x of 1 HU per voxel has the standard deviation sqrt((12^2 - 1) / 12) = 3.45, less what the rim's means lose.
        let slope = of((0..voxels).map(|at| (at % side) as f32).collect());
        assert!((3.2..3.46).contains(&slope), "{slope}");
        assert!(of(vec![40.0; voxels]) < 0.11);
    }

    #[test]
    fn a_flat_lesion_is_smooth_whatever_has_its_contrast() {
        let device = Device::flex();
        // A column whose mask fades along x, and nothing to draw on it with.
        let soft: Vec<f32> = (0..512)
            .map(|at| (1.2 - 0.2 * (at % 8) as f32).clamp(0.0, 1.0))
            .collect();
        let lesion = soft.iter().map(|soft| f32::from(*soft >= 0.5)).collect();
        let batch = HostBatch {
            image_hu: field(vec![100.0; 512], 8),
            soft: field(soft, 8),
            lesion: field(lesion, 8),
            contrast_hu: Tensor::from_data([-50.0], &device),
            condition: Tensor::zeros([1, Condition::len(1)], &device),
        };
        for contrast_over in [ContrastOver::Lesion, ContrastOver::FullMask] {
            let of = |spread_hu: f64| {
                let config = GeneratorConfig {
                    widths: vec![4, 8],
                    organs: 1,
                    spread_hu,
                    contrast_over,
                };
                let generator = config.init(&device, 3);
                let residual = batch.residual(
                    &generator,
                    &Plan::default().window_hu,
                    Tensor::ones([1, 1, 8, 8, 8], &device),
                );
                f64::from(roughness(&batch, &generator, residual).into_scalar::<f32>())
            };
            assert!(of(0.0) < 1e-9 && of(30.0) > 1e-4, "{} {}", of(0.0), of(30.0));
        }
    }

    #[test]
    fn an_edge_is_the_outermost_layer() {
        // A cube of 4 voxels: 8 of its 64 are inside. One of 2 is all outermost.
        let is_in = |at: usize, least: usize, most: usize| {
            [at / 64, at / 8 % 8, at % 8].iter().all(|x| (least..most).contains(x))
        };
        let cube = |least, most, inside: f32, outside: f32| -> Tensor<5> {
            let value = |at| if is_in(at, least, most) { inside } else { outside };
            field((0..512).map(value).collect(), 8)
        };
        let image = cube(3, 5, 20.0, 50.0);
        let of = |least, most| {
            let lesion = cube(least, most, 1.0, 0.0);
            edge(image.clone(), lesion).map(|x| x.into_scalar::<f32>())
        };
        assert_eq!(of(2, 6), [30.0, 1.0]);
        assert_eq!(of(3, 5), [0.0, 0.0]);
    }

    #[test]
    fn an_organ_without_real_lesions_borrows_from_those_of_others() {
        let [weak, strong] = [4.0, 9.0].map(|strength| Texture { strength, edge: None });
        let of = [
            ((0, SizeClass::Small), vec![weak]),
            ((0, SizeClass::Large), vec![strong]),
        ];
        let textures = Textures { of: of.into() };
        let draw = |organ, size| textures.draw(&mut Rng::keyed(1, 0, 0, Purpose::Test), organ, size);
        assert_eq!(draw(0, SizeClass::Large), Some(strong));
        assert_eq!(draw(1, SizeClass::Large), Some(strong));
        assert!([Some(weak), Some(strong)].contains(&draw(1, SizeClass::Tiny)));
        assert_eq!(
            [0, 1].map(|organ| textures.mean(organ)),
            [[Some(6.5), None], [None, None]]
        );
        let none = Textures { of: BTreeMap::new() };
        assert_eq!(
            none.draw(&mut Rng::keyed(1, 0, 0, Purpose::Test), 0, SizeClass::Tiny),
            None
        );
    }

    #[test]
    fn voxels_outside_the_lesion_do_not_count() {
        let side = 8;
        let lesion: Vec<f32> = (0..512).map(|at| f32::from(u8::from(at % 8 < 4))).collect();
        let image = |outside: f32| -> Vec<f32> {
            (0..512)
                .map(|at| if at % 8 < 4 { (at / 64) as f32 } else { outside })
                .collect()
        };
        let of = |outside| strength(field(image(outside), side), field(lesion.clone(), side)).into_scalar::<f32>();
        assert_eq!(of(0.0), of(1000.0));
    }
}
