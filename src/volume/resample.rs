//! Resampling along the (z, y, x) axes: images linear, labels nearest.
//!
//! Grids of one field of view are aligned at the outer corner of the first voxel, as the field of view is what a scan
//! covers: sample `i` of the new grid lies at `(i + 0.5) * new / old - 0.5` of the old one. The affine follows exactly; the
//! new shape is `round(n * old / new)`, so the far border moves by at most half a new voxel.

use ndarray::{Array3, Axis};

use super::{Affine, Grid, Shape};

/// From this ratio of new to old spacing on, samples are averaged: plain interpolation would skip voxels.
const AVERAGE_FROM: f64 = 1.5;

/// Where the samples of a new axis lie on an old one: sample `i` at `(i + 0.5) * ratio - 0.5 + shift`, in old voxels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AxisMap {
    /// Samples of the new axis.
    pub count: usize,
    /// New spacing over old.
    pub ratio: f64,
    /// How far the outer corner of the first new voxel lies from that of the first old one, in old voxels.
    pub shift: f64,
}

impl AxisMap {
    /// Returns the place of a sample on the old axis.
    fn at(self, sample: usize) -> f64 {
        (sample as f64 + 0.5) * self.ratio - 0.5 + self.shift
    }

    /// Tells whether the new axis is the old one, of `side` voxels.
    fn is_identity(self, side: usize) -> bool {
        self.count == side && (self.ratio - 1.0).abs() < 1e-9 && self.shift.abs() < 1e-9
    }
}

/// Returns the grid that covers the same field of view at another spacing.
pub fn resampled_grid(grid: &Grid, spacing_mm: [f64; 3]) -> Grid {
    let old = grid.spacing_mm();
    let ratio: [f64; 3] = std::array::from_fn(|axis| spacing_mm[axis] / old[axis]);
    let shape: Shape = std::array::from_fn(|axis| {
        // Half to even, like numpy; never empty.
        ((grid.shape[axis] as f64 / ratio[axis]).round_ties_even() as usize).max(1)
    });
    let mut affine = grid.affine.0;
    let origin = grid.affine.to_mm(ratio.map(|r| 0.5 * r - 0.5));
    for (row, line) in affine.iter_mut().take(3).enumerate() {
        (0..3).for_each(|axis| line[axis] *= ratio[axis]);
        line[3] = origin[row];
    }
    Grid {
        shape,
        affine: Affine(affine),
    }
}

/// Resamples an image linearly; where the new voxels are much larger, with a triangle as wide as they are.
pub fn resample_image(image: &Array3<i16>, from: &Grid, to: &Grid) -> Array3<i16> {
    if from == to {
        return image.clone();
    }
    let values = image.as_standard_layout().mapv(f32::from);
    // Averages of 16-bit values have 16 bits. Adding and subtracting 1.5 * 2^23 leaves an f32 of that size rounded half to
    // even, in two vector instructions where the function is a call.
    const ROUNDING: f32 = 12_582_912.0;
    resample_values(values, axis_maps(from, to)).mapv(|hu| ((hu + ROUNDING) - ROUNDING) as i16)
}

/// Resamples values as [`resample_image`] does; beyond the old border its last value goes on.
///
/// # Shape
/// `[D, H, W]` in standard layout -> the maps' counts.
pub fn resample_values(mut values: Array3<f32>, maps: [AxisMap; 3]) -> Array3<f32> {
    // The axis that shrinks most goes first: less to do for the others. The order depends on the maps alone.
    let mut order = [0, 1, 2];
    order.sort_by(|a, b| maps[*b].ratio.total_cmp(&maps[*a].ratio));
    for axis in order {
        values = resample_axis(values, axis, maps[axis]);
    }
    values
}

/// Resamples labels to the nearest voxel.
pub fn resample_labels(labels: &Array3<u8>, from: &Grid, to: &Grid) -> Array3<u8> {
    if from == to {
        return labels.clone();
    }
    resample_nearest(labels, axis_maps(from, to))
}

/// Takes for every new voxel the old one whose extent holds its centre, or the nearest where none does.
///
/// # Shape
/// `[D, H, W]` -> the maps' counts.
pub fn resample_nearest(labels: &Array3<u8>, maps: [AxisMap; 3]) -> Array3<u8> {
    let (_, height, width) = labels.dim();
    let sides: Shape = labels.dim().into();
    let nearest: [Vec<usize>; 3] = std::array::from_fn(|axis| {
        let map = maps[axis];
        let at = |i: usize| (((i as f64 + 0.5) * map.ratio + map.shift).max(0.0) as usize).min(sides[axis] - 1);
        (0..map.count).map(at).collect()
    });
    let labels = labels.as_standard_layout();
    let old = labels.as_slice().expect("it is in standard layout");
    let mut new = Vec::with_capacity(maps.iter().map(|map| map.count).product());
    for (z, y) in nearest[0].iter().flat_map(|z| nearest[1].iter().map(move |y| (z, y))) {
        let row = &old[(z * height + y) * width..][..width];
        new.extend(nearest[2].iter().map(|x| row[*x]));
    }
    Array3::from_shape_vec(maps.map(|map| map.count), new).expect("one label per voxel")
}

fn axis_maps(from: &Grid, to: &Grid) -> [AxisMap; 3] {
    let (old, new) = (from.spacing_mm(), to.spacing_mm());
    std::array::from_fn(|axis| AxisMap {
        count: to.shape[axis],
        ratio: new[axis] / old[axis],
        shift: 0.0,
    })
}

/// The old samples that make up a new one: the first, and a weight for each from there on.
struct Taps {
    first: usize,
    weights: Vec<f32>,
}

fn taps(side: usize, map: AxisMap) -> Vec<Taps> {
    let reach = if map.ratio > AVERAGE_FROM { map.ratio } else { 1.0 };
    let last = side - 1;
    (0..map.count)
        .map(|i| {
            // Beyond the border the last voxel goes on.
            let centre = map.at(i).clamp(0.0, last as f64);
            let first = (centre - reach).ceil().max(0.0) as usize;
            let end = ((centre + reach).floor() as usize).min(last);
            let raw: Vec<f64> = (first..=end)
                .map(|j| (1.0 - (j as f64 - centre).abs() / reach).max(0.0))
                .collect();
            let total: f64 = raw.iter().sum();
            Taps {
                first,
                weights: raw.into_iter().map(|weight| (weight / total) as f32).collect(),
            }
        })
        .collect()
}

fn resample_axis(values: Array3<f32>, axis: usize, map: AxisMap) -> Array3<f32> {
    let side = values.len_of(Axis(axis));
    if map.is_identity(side) {
        return values;
    }
    let (count, taps) = (map.count, taps(side, map));
    let mut shape: Shape = values.dim().into();
    // Samples of the axis lie `inner` values apart: one along x, a row along y, a plane along z.
    let inner: usize = shape[axis + 1..].iter().product();
    let old = values.as_slice().expect("made in standard layout");
    shape[axis] = count;
    let mut new = vec![0.0; shape.iter().product()];
    for (old, new) in old.chunks_exact(side * inner).zip(new.chunks_exact_mut(count * inner)) {
        if inner == 1 {
            for (value, tap) in new.iter_mut().zip(&taps) {
                let weighted = tap.weights.iter().zip(&old[tap.first..]);
                *value = weighted.fold(0.0, |sum, (weight, old)| sum + weight * old);
            }
            continue;
        }
        for (slab, tap) in new.chunks_exact_mut(inner).zip(&taps) {
            for (offset, weight) in tap.weights.iter().enumerate() {
                let from = (tap.first + offset) * inner;
                add_weighted(slab, &old[from..from + inner], *weight);
            }
        }
    }
    Array3::from_shape_vec(shape, new).expect("one value per voxel")
}

fn add_weighted(sum: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += weight * value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(shape: Shape, spacing_mm: [f64; 3]) -> Grid {
        Grid {
            shape,
            affine: Affine::axis_aligned(spacing_mm, [10.0, -20.0, 30.0]),
        }
    }

    /// A field that is linear in patient mm must survive linear resampling wherever the old grid surrounds it.
    #[test]
    fn a_linear_field_is_reproduced_in_place() {
        let field = |mm: [f64; 3]| 3.0 * mm[0] - 2.0 * mm[1] + 4.0 * mm[2];
        for (spacing_mm, wanted) in [([5.0, 0.8, 0.8], [1.5; 3]), ([1.0, 1.0, 1.0], [3.0, 2.0, 1.6])] {
            let from = grid([20, 40, 44], spacing_mm);
            let to = resampled_grid(&from, wanted);
            assert!((0..3).all(|axis| (to.spacing_mm()[axis] - wanted[axis]).abs() < 1e-12));
            let at = |grid: &Grid, z, y, x| field(grid.affine.to_mm([z as f64, y as f64, x as f64]));
            let image = Array3::from_shape_fn(from.shape, |(z, y, x)| at(&from, z, y, x).round() as i16);
            let got = resample_image(&image, &from, &to);
            for ((z, y, x), hu) in got.indexed_iter() {
                let margin = [z, y, x]
                    .into_iter()
                    .zip(to.shape)
                    .all(|(i, side)| i >= 4 && i + 4 < side);
                // Rounding of the input, weighted, and of the output.
                assert!(
                    !margin || (f64::from(*hu) - at(&to, z, y, x)).abs() <= 1.01,
                    "{z} {y} {x}"
                );
            }
        }
    }

    #[test]
    fn coarse_grids_average_and_labels_take_the_voxel_below() {
        let from = grid([9, 4, 4], [1.0, 1.0, 1.0]);
        let to = resampled_grid(&from, [3.0, 1.0, 1.0]);
        assert_eq!(to.shape, [3, 4, 4]);
        // The centre of three voxels: the first new sample lies on old voxel 1.
        assert_eq!(to.affine.to_mm([0.0; 3]), [10.0, -20.0, 31.0]);
        let checker = Array3::from_shape_fn(from.shape, |(z, _, _)| if z % 2 == 0 { 90 } else { 0 });
        let got = resample_image(&checker, &from, &to);
        assert_eq!(got[[1, 0, 0]], 50); // (1 * 0 + 2 * 90 ...): weights 1/9, 2/9, 3/9, 2/9, 1/9 around voxel 4
        let labels = Array3::from_shape_fn(from.shape, |(z, _, _)| z as u8);
        assert_eq!(
            resample_labels(&labels, &from, &to)
                .index_axis(Axis(1), 0)
                .column(0)
                .to_vec(),
            [1, 4, 7]
        );
    }

    #[test]
    fn sizes_never_vanish() {
        assert_eq!(resampled_grid(&grid([2, 2, 2], [1.0; 3]), [20.0; 3]).shape, [1, 1, 1]);
    }
}
