//! Changes of sharpness and noise, so that a trainer sees more scanners than there are.

use ndarray::{Array3, ArrayViewMut1, Axis};

use super::Augmentation;
use super::augment::HU_RANGE;
use crate::rng::Rng;

/// One draw of sharpness and noise, the same for image and source.
#[derive(Clone, Debug)]
pub struct Grain {
    blurs: bool,
    noise_hu: f64,
    rng: Rng,
}

impl Grain {
    /// Draws a change; nothing where the settings ask for none.
    pub fn draw(settings: &Augmentation, mut rng: Rng) -> Option<Self> {
        let (blurs, noise_hu) = (rng.chance(settings.blur), rng.uniform() * settings.noise_hu);
        (blurs || noise_hu > 0.0).then_some(Self { blurs, noise_hu, rng })
    }

    /// Blurs and adds noise. In whole numbers until the noise: voxels that are equal as far as the blur reaches, one voxel
    /// along each axis, stay equal.
    pub fn apply(&self, image: &mut Array3<i16>) {
        let mut sums = image.mapv(i32::from);
        let mut weight = 1;
        for axis in (0..3).filter(|_| self.blurs) {
            sums.lanes_mut(Axis(axis)).into_iter().for_each(blur);
            weight *= 4;
        }
        let [low, high] = HU_RANGE.map(f64::from);
        let mut noise = self.rng.clone();
        let noise = if self.noise_hu > 0.0 {
            noise.normals(image.len())
        } else {
            vec![0.0; image.len()]
        };
        for ((to, sum), noise) in image.iter_mut().zip(&sums).zip(noise) {
            let hu = f64::from(*sum) / f64::from(weight) + self.noise_hu * f64::from(noise);
            *to = hu.round().clamp(low, high) as i16;
        }
    }
}

/// Replaces each value by itself twice and its neighbours once, the border repeated.
fn blur(mut lane: ArrayViewMut1<i32>) {
    let last = lane.len().saturating_sub(1);
    let mut before = lane.first().copied().unwrap_or(0);
    for i in 0..lane.len() {
        let (here, after) = (lane[i], lane[(i + 1).min(last)]);
        lane[i] = before + 2 * here + after;
        before = here;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    fn settings(blur: f64, noise_hu: f64) -> Augmentation {
        Augmentation {
            blur,
            noise_hu,
            ..Augmentation::off()
        }
    }

    fn rng() -> Rng {
        Rng::keyed(4, 0, 0, Purpose::Test)
    }

    #[test]
    fn nothing_is_drawn_where_nothing_is_asked_for() {
        assert!(Grain::draw(&settings(0.0, 0.0), rng()).is_none());
    }

    #[test]
    fn a_blur_spreads_one_voxel_by_its_weights() {
        let mut image = Array3::zeros([5; 3]);
        image[[2, 2, 2]] = 640;
        Grain::draw(&settings(1.0, 0.0), rng()).unwrap().apply(&mut image);
        let weight = |at: usize| [0, 1, 2, 1, 0][at];
        let expected = Array3::from_shape_fn([5; 3], |(z, y, x)| 10 * weight(z) * weight(y) * weight(x));
        assert_eq!(image, expected);
        let mut even = Array3::from_elem([3, 4, 5], -77);
        Grain::draw(&settings(1.0, 0.0), rng()).unwrap().apply(&mut even);
        assert!(even.iter().all(|hu| *hu == -77));
    }

    #[test]
    fn twins_stay_equal_where_they_were_and_noise_is_as_strong_as_drawn() {
        let grain = Grain::draw(&settings(1.0, 30.0), rng()).unwrap();
        let mut image = Array3::from_elem([24; 3], 40i16);
        let mut twin = image.clone();
        twin[[12, 12, 12]] = 400;
        grain.apply(&mut image);
        grain.apply(&mut twin);
        for ((z, y, x), hu) in image.indexed_iter() {
            let near = [z, y, x].iter().all(|v| v.abs_diff(12) <= 1);
            assert_eq!(*hu == twin[[z, y, x]], !near);
        }
        let squares = image.iter().map(|hu| f64::from(hu - 40).powi(2)).sum::<f64>();
        let deviation = (squares / image.len() as f64).sqrt();
        // 13,824 samples: the deviation is known to about 0.6 %.
        assert!(
            (deviation / grain.noise_hu - 1.0).abs() < 0.03,
            "{deviation} {}",
            grain.noise_hu
        );
    }
}
