//! Models on another grid than the store's: they see a resampled view, and only their residual comes back (promise P5).
//!
//! ```text
//! store's grid:   host cube, soft mask ----------------------------> compose: x' = round(x + residual) ---> patch
//!                      | view: what ingest at the models' grid             ^                 | view
//!                      v would have made of the cube                       | residual        v
//! models' grid:   cube of 32, 48, 64 or 96 voxels ---> generator ----------+            critic: scores
//! ```
//!
//! A generator that keeps a lesion's mean contrast does so on its own grid; `stream::residual` shifts the mean on the store's.

use ndarray::{Array3, Zip};

use super::LesionCube;
use crate::volume::Shape;
use crate::volume::resample::{AxisMap, resample_nearest, resample_values};

/// How much coarser or finer than the store's the models' voxels may be along an axis: it bounds the box that is read.
pub const MAX_GRID_RATIO: f64 = 4.0;

/// The way between a cube of the models' voxels and the box of the store's voxels that it covers. Both have their middle
/// voxel in the same place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridBridge {
    /// The models' voxel size (z, y, x) in mm.
    models_mm: [f64; 3],
    /// The models' voxel size over the store's.
    ratio: [f64; 3],
    /// Side of the cube in the models' voxels.
    cube: usize,
}

impl GridBridge {
    /// Bridges the grids for cubes of `cube` voxels of the models; nothing where the grids are one.
    pub fn new(store_mm: [f64; 3], models_mm: [f64; 3], cube: usize) -> Option<Self> {
        let ratio = std::array::from_fn(|axis| models_mm[axis] / store_mm[axis]);
        let is_other = |ratio: f64| (ratio - 1.0).abs() > 1e-6;
        ratio
            .into_iter()
            .any(is_other)
            .then_some(Self { models_mm, ratio, cube })
    }

    /// Tells whether grids are near enough to be bridged.
    pub fn spans(store_mm: [f64; 3], models_mm: [f64; 3]) -> bool {
        let ratios = store_mm
            .into_iter()
            .zip(models_mm)
            .map(|(store, models)| models / store);
        ratios
            .into_iter()
            .all(|ratio| (1.0 / MAX_GRID_RATIO..=MAX_GRID_RATIO).contains(&ratio))
    }

    /// Returns the size of the store's box that surrounds the cube, with a voxel to interpolate from on every side.
    pub fn host_size(&self) -> Shape {
        self.ratio
            .map(|ratio| 2 * (libm::ceil(self.cube as f64 / 2.0 * ratio) as usize + 1))
    }

    /// Returns what the models see of an image in HU.
    pub fn view(&self, image: &Array3<i16>) -> Array3<i16> {
        let values = image.as_standard_layout().mapv(f32::from);
        resample_values(values, self.to_models(image.dim())).mapv(|hu| hu.round_ties_even() as i16)
    }

    /// Returns what the models see of a soft mask in 1/255.
    pub fn soft_view(&self, soft: &Array3<u8>) -> Array3<u8> {
        let values = soft.as_standard_layout().mapv(f32::from);
        resample_values(values, self.to_models(soft.dim())).mapv(|soft| soft.round_ties_even() as u8)
    }

    /// Returns label ids, or a mask of 0 and 1, on the models' grid.
    pub fn labels_view(&self, labels: &Array3<u8>) -> Array3<u8> {
        resample_nearest(labels, self.to_models(labels.dim()))
    }

    /// Returns label ids of the models' grid in the box of [`Self::host_size`].
    pub fn labels_back(&self, labels: &Array3<u8>) -> Array3<u8> {
        let host = self.host_size();
        resample_nearest(
            labels,
            std::array::from_fn(|axis| map(self.cube, host[axis], 1.0 / self.ratio[axis])),
        )
    }

    /// Returns a lesion as the models see it.
    pub fn lesion_view(&self, lesion: &LesionCube) -> LesionCube {
        LesionCube {
            image: self.view(&lesion.image),
            soft: self.soft_view(&lesion.soft),
            host: self.labels_view(&lesion.host),
            spacing_mm: self.models_mm,
            ..lesion.clone()
        }
    }

    /// Returns the residual that the models painted into [`Self::lesion_view`], on the store's grid.
    ///
    /// residual = mask x value, so R(residual) / R(mask) is the value between the models' voxels, R being the resampling; it
    /// is multiplied by the store's own mask. R(residual) alone would have its edge smoothed twice, which takes a third of
    /// the contrast of a lesion that is three voxels wide.
    pub fn residual(&self, residual: &Array3<f32>, seen: &LesionCube, lesion: &LesionCube) -> Array3<f32> {
        let share = |soft: &Array3<u8>| soft.as_standard_layout().mapv(|soft| f32::from(soft) / 255.0);
        let [residual, mask] = [residual.as_standard_layout().into_owned(), share(&seen.soft)].map(|values| {
            let host: Shape = lesion.soft.dim().into();
            let maps = std::array::from_fn(|axis| map(self.cube, host[axis], 1.0 / self.ratio[axis]));
            resample_values(values, maps)
        });
        Zip::from(&residual)
            .and(&mask)
            .and(&share(&lesion.soft))
            .map_collect(|residual, mask, soft| if *mask > 0.0 { residual / mask * soft } else { 0.0 })
    }

    fn to_models(self, host: (usize, usize, usize)) -> [AxisMap; 3] {
        let host: Shape = host.into();
        std::array::from_fn(|axis| map(host[axis], self.cube, self.ratio[axis]))
    }
}

/// Maps an axis of `new` voxels onto one of `old` so that their middle voxels coincide; `ratio` is new spacing over old.
fn map(old: usize, new: usize, ratio: f64) -> AxisMap {
    let [old_middle, new_middle] = [old, new].map(|side| (side / 2) as f64 + 0.5);
    AxisMap {
        count: new,
        ratio,
        shift: old_middle - new_middle * ratio,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cancelled;
    use super::*;

    const STORE_MM: [f64; 3] = [2.5, 0.8, 0.9];
    const MODELS_MM: [f64; 3] = [1.5; 3];

    #[test]
    fn one_grid_needs_no_bridge_and_far_ones_are_told() {
        assert_eq!(GridBridge::new([1.5; 3], [1.5; 3], 32), None);
        assert!(GridBridge::spans(STORE_MM, MODELS_MM));
        assert!(!GridBridge::spans([0.3, 1.5, 1.5], MODELS_MM) && !GridBridge::spans([7.0, 1.5, 1.5], MODELS_MM));
    }

    /// A field that is linear in mm around the middle voxel is the same field on both grids.
    #[test]
    fn what_is_linear_in_mm_crosses_the_bridge_unchanged() {
        let bridge = GridBridge::new(STORE_MM, MODELS_MM, 32).unwrap();
        let host = bridge.host_size();
        assert_eq!(host, [22, 62, 56]);
        let field = |shape: Shape, mm: [f64; 3], slope: [f64; 3]| {
            Array3::from_shape_fn(shape, |(z, y, x)| {
                let at = [z, y, x];
                (0..3)
                    .map(|a| slope[a] * mm[a] * (at[a] as f64 - (shape[a] / 2) as f64))
                    .sum::<f64>()
            })
        };
        let slope = [3.0, -2.0, 1.5];
        let cube = field([32; 3], MODELS_MM, slope);
        let seen = bridge.view(&field(host, STORE_MM, slope).mapv(|v| v.round() as i16));
        // Rounding on the store's grid, interpolated, and on the models'; the triangle of the finer axes is symmetric.
        assert!(
            seen.iter()
                .zip(&cube)
                .all(|(got, want)| (f64::from(*got) - want).abs() <= 1.01)
        );
    }

    /// A lesion all of one value comes back with exactly that value times the store's own mask.
    #[test]
    fn a_residual_keeps_its_contrast() {
        let bridge = GridBridge::new(STORE_MM, MODELS_MM, 32).unwrap();
        let soft = ball(bridge.host_size(), STORE_MM, 5.0).mapv(|inside| 200 * inside);
        let lesion = LesionCube {
            image: Array3::zeros(bridge.host_size()),
            soft: soft.clone(),
            organ: 0,
            host: soft.mapv(|soft| u8::from(soft > 0)),
            diameter_mm: 10.0,
            contrast_hu: -50.0,
            spacing_mm: STORE_MM,
            key: [1, 2, 3],
            cancelled: Cancelled::default(),
        };
        let seen = bridge.lesion_view(&lesion);
        assert_eq!((seen.soft.dim(), seen.spacing_mm), ((32, 32, 32), MODELS_MM));
        let painted = seen.soft.mapv(|soft| f32::from(soft) / 255.0 * -50.0);
        let back = bridge.residual(&painted, &seen, &lesion);
        Zip::from(&back).and(&soft).for_each(|residual, soft| {
            assert!(
                (residual - f32::from(*soft) / 255.0 * -50.0).abs() < 1e-3,
                "{residual} {soft}"
            );
        });
    }

    fn ball(shape: Shape, mm: [f64; 3], radius_mm: f64) -> Array3<u8> {
        Array3::from_shape_fn(shape, |(z, y, x)| {
            let at = [z, y, x];
            let squared: f64 = (0..3)
                .map(|a| (mm[a] * (at[a] as f64 - (shape[a] / 2) as f64)).powi(2))
                .sum();
            u8::from(squared <= radius_mm * radius_mm)
        })
    }

    #[test]
    fn masks_keep_their_volume_and_their_place() {
        let bridge = GridBridge::new(STORE_MM, MODELS_MM, 32).unwrap();
        let host = bridge.host_size();
        let (seen, want) = (
            bridge.labels_view(&ball(host, STORE_MM, 12.0)),
            ball([32; 3], MODELS_MM, 12.0),
        );
        let soft = bridge.soft_view(&ball(host, STORE_MM, 12.0).mapv(|inside| 255 * inside));
        let count = |mask: &Array3<u8>| mask.iter().filter(|value| **value != 0).count() as f64;
        let volume = count(&want);
        assert!((count(&seen) / volume - 1.0).abs() < 0.06);
        assert!((count(&soft.mapv(|soft| u8::from(soft >= 128))) / volume - 1.0).abs() < 0.06);
        let both = Zip::from(&seen).and(&want).map_collect(|a, b| a & b);
        // Slices of 2.5 mm put the ball's caps up to half a slice away.
        assert!(2.0 * count(&both) / (count(&seen) + volume) > 0.93);
        let back = bridge.labels_back(&want);
        let here = ball(host, STORE_MM, 12.0);
        let both = Zip::from(&back).and(&here).map_collect(|a, b| a & b);
        assert!(2.0 * count(&both) / (count(&back) + count(&here)) > 0.93);
    }
}
