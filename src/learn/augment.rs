//! How a training cube's look is changed, so that networks do not learn one scanner by heart.

use ndarray::{Array3, Axis, Zip};
use serde::{Deserialize, Serialize};

use super::LearnError;
use super::check::Section;
use crate::rng::Rng;

/// How strongly looks vary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LookSettings {
    /// Probability of a mirror along each axis (z, y, x).
    pub flip: [f64; 3],
    /// Largest relative change of contrast about 0 HU.
    pub scale: f64,
    /// Largest shift in HU.
    pub shift_hu: f64,
    /// Largest standard deviation of added noise in HU.
    pub noise_hu: f64,
    /// Probability of a blur by one voxel.
    pub blur: f64,
}

impl Default for LookSettings {
    fn default() -> Self {
        Self {
            flip: [0.5; 3],
            scale: 0.15,
            shift_hu: 20.0,
            noise_hu: 12.0,
            blur: 0.25,
        }
    }
}

impl LookSettings {
    /// Refuses what is out of range.
    pub(super) fn check(&self, section: &Section) -> Result<(), LearnError> {
        self.flip.iter().try_for_each(|p| section.unit("look.flip", *p))?;
        let Self {
            scale,
            shift_hu,
            noise_hu,
            ..
        } = *self;
        section.check("look.scale", (0.0..=0.5).contains(&scale), "0 to 0.5", scale)?;
        section.check("look.shift_hu", (0.0..=500.0).contains(&shift_hu), "0 to 500", shift_hu)?;
        section.check("look.noise_hu", (0.0..=200.0).contains(&noise_hu), "0 to 200", noise_hu)?;
        section.unit("look.blur", self.blur)
    }
}

/// One drawn look.
#[derive(Clone, Debug)]
pub(super) struct Look {
    flip: [bool; 3],
    scale: f32,
    shift: f32,
    noise_hu: f32,
    blur: bool,
    rng: Rng,
}

impl Look {
    /// Draws a look; the noise comes from a copy of the generator, so that its length does not shift later draws.
    pub fn draw(rng: &mut Rng, settings: &LookSettings) -> Self {
        Self {
            flip: settings.flip.map(|p| rng.chance(p)),
            scale: (1.0 + rng.range(-1.0, 1.0) * settings.scale) as f32,
            shift: (rng.range(-1.0, 1.0) * settings.shift_hu) as f32,
            noise_hu: (rng.uniform() * settings.noise_hu) as f32,
            blur: rng.chance(settings.blur),
            rng: rng.clone(),
        }
    }

    /// Returns the look that changes nothing.
    pub fn none() -> Self {
        Self {
            flip: [false; 3],
            scale: 1.0,
            shift: 0.0,
            noise_hu: 0.0,
            blur: false,
            rng: Rng::keyed(0, 0, 0, crate::rng::Purpose::Training),
        }
    }

    /// Changes image and labels; mirrors move both alike.
    pub fn apply(&self, mut image: Array3<f32>, mut labels: Array3<u8>) -> (Array3<f32>, Array3<u8>) {
        for axis in (0..3).filter(|axis| self.flip[*axis]) {
            image.invert_axis(Axis(axis));
            labels.invert_axis(Axis(axis));
        }
        if self.blur {
            (0..3).for_each(|axis| blur_axis(&mut image, Axis(axis)));
        }
        image.mapv_inplace(|hu| hu * self.scale + self.shift);
        if self.noise_hu > 0.0 {
            let noise = self.rng.clone().normals(image.len());
            image.iter_mut().zip(noise).for_each(|(hu, n)| *hu += n * self.noise_hu);
        }
        (
            image.as_standard_layout().into_owned(),
            labels.as_standard_layout().into_owned(),
        )
    }
}

/// Blurs along one axis with the weights 1/4, 1/2, 1/4, the border repeated.
fn blur_axis(image: &mut Array3<f32>, axis: Axis) {
    for mut lane in image.lanes_mut(axis) {
        let old = lane.to_vec();
        let last = old.len() - 1;
        for (i, value) in lane.iter_mut().enumerate() {
            *value = 0.25 * old[i.saturating_sub(1)] + 0.5 * old[i] + 0.25 * old[(i + 1).min(last)];
        }
    }
}

/// Draws the slab exchange of a batch: one axis and, per patch, the share that comes from the next patch.
///
/// Image and label are cut by the same draw (the released FreeTumor code tosses separate coins for them and so gives a
/// third of its batches labels of other voxels; method, section 7, item 9).
///
/// Departure: the share is uniform in [0, 1) and the axis one of three, where the released code draws Beta(0.2, 0.2) and x or y: that
/// leaves most patches all but whole.
pub(super) struct SlabMix {
    axis: Axis,
    shares: Vec<f64>,
    /// Whose slab a patch gets.
    partners: Vec<usize>,
}

impl SlabMix {
    /// Draws for a batch.
    pub fn draw(rng: &mut Rng, batch: usize) -> Self {
        Self {
            axis: Axis(rng.below(3)),
            shares: (0..batch).map(|_| rng.uniform()).collect(),
            partners: (0..batch).map(|i| (i + 1) % batch).collect(),
        }
    }

    /// Exchanges slabs of one kind of array.
    pub fn apply<T: Clone>(&self, arrays: &[Array3<T>]) -> Vec<Array3<T>> {
        let pairs = arrays.iter().zip(&self.partners).zip(&self.shares);
        pairs
            .map(|((own, partner), share)| {
                let mut mixed = own.clone();
                let cut = (share * own.len_of(self.axis) as f64) as usize;
                let (mut head, _) = mixed.view_mut().split_at(self.axis, cut);
                let (other, _) = arrays[*partner].view().split_at(self.axis, cut);
                Zip::from(&mut head).and(&other).for_each(|a, b| *a = b.clone());
                mixed
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learn::npz;
    use crate::rng::Purpose;

    /// Two patches whose images say which patch and voxel they are, and whose labels say the same.
    fn coded() -> (Vec<Array3<f32>>, Vec<Array3<u8>>) {
        let labels: Vec<Array3<u8>> = (0..3_u8)
            .map(|patch| Array3::from_shape_fn((4, 4, 4), |(z, y, x)| patch * 64 + (z * 16 + y * 4 + x) as u8))
            .collect();
        (labels.iter().map(|l| l.mapv(f32::from)).collect(), labels)
    }

    #[test]
    fn image_and_label_are_always_cut_alike() {
        let (images, labels) = coded();
        let mut changed = 0;
        for index in 0..50 {
            let mix = SlabMix::draw(&mut Rng::keyed(1, index, 0, Purpose::Test), 3);
            let (mixed_images, mixed_labels) = (mix.apply(&images), mix.apply(&labels));
            for (image, label) in mixed_images.iter().zip(&mixed_labels) {
                assert_eq!(image, &label.mapv(f32::from));
            }
            changed += usize::from(mixed_labels != labels);
        }
        assert!(changed > 40, "{changed}");
    }

    /// The released exchange with one coin for image and label: heads of the patches, tails of their partners.
    #[test]
    fn slabs_are_exchanged_as_published() {
        let Some(golden) = npz::golden("06_slabmix.npz") else {
            return;
        };
        let patches = |name: &str| -> Vec<Array3<f32>> {
            let npz::Array { shape, values } = &golden[name];
            let shape = (shape[2], shape[3], shape[4]);
            let patches = values.chunks_exact(shape.0 * shape.1 * shape.2);
            patches
                .map(|v| Array3::from_shape_vec(shape, v.to_vec()).unwrap())
                .collect()
        };
        let tails: Vec<usize> = golden["perm"].values.iter().map(|v| *v as usize).collect();
        let heads: Vec<usize> = (0..4)
            .map(|i| tails.iter().position(|tail| *tail == i).unwrap())
            .collect();
        for (cut, axis) in [0, 5, 9, 11].into_iter().flat_map(|cut| [(cut, 0), (cut, 1)]) {
            let length = [12.0, 10.0][axis];
            let mix = SlabMix {
                axis: Axis(axis),
                shares: vec![(f64::from(cut) + 0.5).min(length) / length; 4],
                partners: heads.clone(),
            };
            for kind in ["image", "label"] {
                let mixed = mix.apply(&patches(kind));
                let expected = patches(&format!("cut{cut}_axis{axis}_{kind}"));
                for (i, tail) in tails.iter().enumerate() {
                    assert_eq!(mixed[*tail], expected[i], "{kind} cut {cut} axis {axis}");
                }
            }
        }
    }

    #[test]
    fn a_look_moves_image_and_labels_alike() {
        let (images, labels) = coded();
        let settings = LookSettings {
            scale: 0.0,
            shift_hu: 0.0,
            noise_hu: 0.0,
            blur: 0.0,
            ..LookSettings::default()
        };
        for index in 0..20 {
            let look = Look::draw(&mut Rng::keyed(2, index, 0, Purpose::Test), &settings);
            let (image, label) = look.apply(images[0].clone(), labels[0].clone());
            assert_eq!(image, label.mapv(f32::from));
        }
    }
}
