//! Augmentation: mirrors, quarter turns and intensity changes that keep every array of a patch aligned and exact.

use ndarray::Array3;

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

    /// Tells whether every voxel stays where it is.
    fn keeps_order(&self) -> bool {
        self.turns == 0 && self.flip == [false; 3]
    }

    /// Returns the array with its voxels reordered.
    pub fn reorder<T: Copy + Default>(&self, array: &Array3<T>) -> Array3<T> {
        let shape = <[usize; 3]>::from(array.dim());
        if self.keeps_order() {
            return array.clone();
        }
        let old = array.as_standard_layout();
        let old = old.as_slice().expect("it is in standard layout");
        let axes = self.axes(shape);
        let size: Shape = axes.map(|NewAxis(axis, ..)| shape[axis]);
        let mut new = vec![T::default(); old.len()];
        // A new plane lies in one old plane: axis z is only mirrored.
        for (z, plane) in new.chunks_exact_mut((size[1] * size[2]).max(1)).enumerate() {
            let from = axes[0].old(z) * shape[1] * shape[2];
            let old = &old[from..from + shape[1] * shape[2]];
            if axes[2].0 == 2 {
                copy_rows(old, plane, [axes[1], axes[2]], size[2]);
            } else {
                transpose(old, plane, [axes[1], axes[2]], [size[2], shape[2]]);
            }
        }
        Array3::from_shape_vec(size, new).expect("one element per voxel")
    }

    /// Returns for each new axis the old one it runs along, whether it is mirrored, and that one's last index.
    fn axes(&self, patch: Shape) -> [NewAxis; 3] {
        let mut axes = [0, 1, 2].map(|axis| NewAxis(axis, false, patch[axis].saturating_sub(1)));
        for _ in 0..self.turns {
            axes.swap(1, 2);
            axes[1].1 = !axes[1].1;
        }
        for (axis, flip) in axes.iter_mut().zip(self.flip) {
            axis.1 ^= flip;
        }
        axes
    }

    /// Returns the affine of the reordered array: its (z, y, x) indices to the same millimetres.
    pub fn affine(&self, affine: &Affine, patch: Shape) -> Affine {
        let mut to_old = [[0.0; 4]; 4];
        to_old[3][3] = 1.0;
        for (new, NewAxis(old, is_mirrored, last)) in self.axes(patch).into_iter().enumerate() {
            to_old[old][new] = if is_mirrored { -1.0 } else { 1.0 };
            to_old[old][3] = if is_mirrored { last as f64 } else { 0.0 };
        }
        affine.compose(&Affine(to_old))
    }

    /// Changes intensities, each rounded once; equal voxels stay equal, so image and source differ where they did.
    pub fn recolour(&self, image: &mut Array3<i16>) {
        let Some([scale, shift]) = self.intensity else { return };
        let [low, high] = HU_RANGE.map(f64::from);
        let change = |hu: i16| {
            let changed = self.centre_hu + scale * (f64::from(hu) - self.centre_hu) + shift;
            changed.round().clamp(low, high) as i16
        };
        let range = image.iter().fold(None, |range, hu| match range {
            None => Some((*hu, *hu)),
            Some((least, most)) => Some((least.min(*hu), most.max(*hu))),
        });
        let Some((least, most)) = range else { return };
        // A patch holds hundreds of voxels for every value: each is worked out once.
        let table: Vec<i16> = (least..=most).map(change).collect();
        image.mapv_inplace(|hu| table[usize::from(hu.wrapping_sub(least) as u16)]);
    }
}

/// The old axis that a new one runs along, whether it is mirrored, and the old one's last index.
#[derive(Clone, Copy)]
struct NewAxis(usize, bool, usize);

impl NewAxis {
    /// Returns the old index at a new one.
    fn old(self, new: usize) -> usize {
        if self.1 { self.2 - new } else { new }
    }
}

/// Fills a plane whose rows are old rows, perhaps in another order or mirrored.
fn copy_rows<T: Copy>(old: &[T], new: &mut [T], [y_axis, x_axis]: [NewAxis; 2], width: usize) {
    for (y, row) in new.chunks_exact_mut(width.max(1)).enumerate() {
        let from = y_axis.old(y) * width;
        let old = &old[from..from + width];
        if x_axis.1 {
            row.iter_mut().zip(old.iter().rev()).for_each(|(to, from)| *to = *from);
        } else {
            row.copy_from_slice(old);
        }
    }
}

/// Fills a plane whose rows are old columns, in blocks that stay in the first-level cache.
fn transpose<T: Copy>(old: &[T], new: &mut [T], [y_axis, x_axis]: [NewAxis; 2], [width, old_width]: [usize; 2]) {
    const BLOCK: usize = 16;
    let height = new.len() / width.max(1);
    for y_block in (0..height).step_by(BLOCK) {
        for x_block in (0..width).step_by(BLOCK) {
            for y in y_block..(y_block + BLOCK).min(height) {
                let column = y_axis.old(y);
                for x in x_block..(x_block + BLOCK).min(width) {
                    new[y * width + x] = old[x_axis.old(x) * old_width + column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Axis;

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

    /// What a change means, as views: the oracle of the copies by rows and blocks.
    fn reordered<T: Copy>(change: &Change, array: &Array3<T>) -> Array3<T> {
        let mut view = array.view();
        for _ in 0..change.turns {
            view.swap_axes(1, 2);
            view.invert_axis(Axis(1));
        }
        (0..3)
            .filter(|axis| change.flip[*axis])
            .for_each(|axis| view.invert_axis(Axis(axis)));
        view.as_standard_layout().into_owned()
    }

    #[test]
    fn copies_are_what_views_say_and_tables_what_arithmetic_says() {
        let mut rng = Rng::keyed(9, 0, 0, Purpose::Test);
        for (flips, turns) in (0..8).flat_map(|flips| (0..4).map(move |turns| (flips, turns))) {
            let change = Change {
                flip: [0, 1, 2].map(|axis| flips >> axis & 1 == 1),
                turns,
                intensity: Some([rng.range(0.8, 1.2), rng.range(-40.0, 40.0)]),
                centre_hu: 37.5,
            };
            for shape in [[3, 20, 37], [2, 33, 33], [1, 1, 1], [0, 4, 4]] {
                let array = Array3::from_shape_fn(shape, |_| rng.below(6000) as i16 - 1024);
                let mut moved = change.reorder(&array);
                assert_eq!(moved, reordered(&change, &array), "{change:?} {shape:?}");
                let [scale, shift] = change.intensity.unwrap();
                let expected = moved.mapv(|hu| {
                    let changed = 37.5 + scale * (f64::from(hu) - 37.5) + shift;
                    changed.round().clamp(-1024.0, 3071.0) as i16
                });
                change.recolour(&mut moved);
                assert_eq!(moved, expected);
            }
        }
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
