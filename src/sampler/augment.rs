//! Augmentation: mirrors, quarter turns and intensity changes that keep every array of a patch aligned and exact.

use ndarray::{Array3, Axis};

use super::Augmentation;
use crate::rng::Rng;
use crate::volume::{Affine, Shape};

/// The range of HU that patches keep: what CT files with 12 bits hold.
pub const HU_RANGE: [i16; 2] = [-1024, 3071];

/// One draw of an augmentation: the same voxels in another order, and one intensity map for image and source.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Mirrors along (z, y, x), after the turn.
    flip: [bool; 3],
    /// Quarter turns in the axial plane, 0 to 3.
    turns: usize,
    /// Scale about the centre, and shift in HU.
    intensity: Option<[f64; 2]>,
    centre_hu: f64,
}

impl Change {
    /// Draws a change. A patch whose axial sides differ is turned by half turns only, so that it keeps its shape.
    pub fn draw(settings: &Augmentation, patch: Shape, centre_hu: f64, rng: &mut Rng) -> Self {
        // All numbers are drawn in any case: settings that change one choice leave the others alone.
        let flip = settings.flip.map(|p| rng.chance(p));
        let (turned, quarter) = (rng.chance(settings.rotate90), rng.below(3) + 1);
        let (changed, scale, shift) = (
            rng.chance(settings.intensity),
            rng.range(-1.0, 1.0),
            rng.range(-1.0, 1.0),
        );
        let turns = match (turned, patch[1] == patch[2]) {
            (false, _) => 0,
            (true, true) => quarter,
            (true, false) => 2,
        };
        Self {
            flip,
            turns,
            intensity: changed.then_some([1.0 + scale * settings.scale, shift * settings.shift_hu]),
            centre_hu,
        }
    }

    /// Returns the array with its voxels reordered.
    pub fn reorder<T: Copy>(&self, array: &Array3<T>) -> Array3<T> {
        let mut view = array.view();
        for _ in 0..self.turns {
            view.swap_axes(1, 2);
            view.invert_axis(Axis(1));
        }
        (0..3)
            .filter(|axis| self.flip[*axis])
            .for_each(|axis| view.invert_axis(Axis(axis)));
        view.as_standard_layout().into_owned()
    }

    /// Returns the affine of the reordered array: its (z, y, x) indices to the same millimetres.
    pub fn affine(&self, affine: &Affine, patch: Shape) -> Affine {
        // For each new axis: the old axis it runs along, its direction, and where it starts.
        let mut axes: [(usize, f64, f64); 3] = [(0, 1.0, 0.0), (1, 1.0, 0.0), (2, 1.0, 0.0)];
        let invert = |axis: &mut (usize, f64, f64)| {
            axis.2 += axis.1 * (patch[axis.0] - 1) as f64;
            axis.1 = -axis.1;
        };
        for _ in 0..self.turns {
            axes.swap(1, 2);
            invert(&mut axes[1]);
        }
        (0..3)
            .filter(|axis| self.flip[*axis])
            .for_each(|axis| invert(&mut axes[axis]));
        let mut to_old = [[0.0; 4]; 4];
        to_old[3][3] = 1.0;
        for (new, (old, sign, start)) in axes.into_iter().enumerate() {
            to_old[old][new] = sign;
            to_old[old][3] = start;
        }
        affine.compose(&Affine(to_old))
    }

    /// Changes intensities, each rounded once; equal voxels stay equal, so image and source differ where they did.
    pub fn recolour(&self, image: &mut Array3<i16>) {
        let Some([scale, shift]) = self.intensity else { return };
        let [low, high] = HU_RANGE.map(f64::from);
        image.mapv_inplace(|hu| {
            let changed = self.centre_hu + scale * (f64::from(hu) - self.centre_hu) + shift;
            changed.round().clamp(low, high) as i16
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    #[test]
    fn voxels_keep_their_place_in_the_patient() {
        let all = Augmentation {
            flip: [0.5; 3],
            rotate90: 0.7,
            ..Augmentation::off()
        };
        let mut kinds = std::collections::BTreeSet::new();
        for (seed, patch) in (0..40).flat_map(|seed| [(seed, [4, 6, 6]), (seed, [4, 6, 8])]) {
            // Every voxel is its own position, so that a wrong affine shows.
            let array = Array3::from_shape_fn(patch, |(z, y, x)| [z, y, x]);
            let affine = Affine::axis_aligned([3.0, 2.0, 1.0], [-7.0, 5.0, 11.0]);
            let change = Change::draw(&all, patch, 0.0, &mut Rng::keyed(seed, 0, 0, Purpose::Test));
            kinds.insert((change.flip, change.turns));
            let moved = change.reorder(&array);
            let shape = moved.dim();
            assert_eq!([shape.0, shape.1, shape.2], patch);
            let new = change.affine(&affine, patch);
            for ((z, y, x), from) in moved.indexed_iter() {
                let at = new.to_mm([z, y, x].map(|v| v as f64));
                assert_eq!(at, affine.to_mm(from.map(|v| v as f64)), "{change:?}");
            }
        }
        assert!(kinds.len() > 15, "{kinds:?}");
    }

    #[test]
    fn off_changes_nothing_and_intensity_keeps_equality() {
        let mut rng = Rng::keyed(5, 0, 0, Purpose::Test);
        let off = Change::draw(&Augmentation::off(), [2, 2, 2], 37.0, &mut rng);
        assert!(off.turns == 0 && off.flip == [false; 3] && off.intensity.is_none());
        let settings = Augmentation {
            intensity: 1.0,
            ..Augmentation::default()
        };
        let change = Change::draw(&settings, [2, 2, 2], 37.0, &mut rng);
        let mut image = Array3::from_shape_fn([2, 2, 2], |(z, _, x)| if z == 0 { 3071 } else { x as i16 * 40 });
        let before = image.clone();
        change.recolour(&mut image);
        assert_ne!(image, before);
        assert!(image.iter().all(|hu| (HU_RANGE[0]..=HU_RANGE[1]).contains(hu)));
        assert_eq!(image[[1, 0, 0]], image[[1, 1, 0]]);
    }
}
