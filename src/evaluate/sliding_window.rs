//! A network over a whole volume, window by window.

use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array3, Array4, Axis, s};
use serde::{Deserialize, Serialize};

use crate::nn::VoxelClassifier;
use crate::store::{Cases, StoreError};
use crate::volume::{Region, Shape};

/// How overlapping windows are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Blending {
    /// All voxels alike.
    Constant,
    /// The centre more than the rim: a Gaussian of an eighth of the window.
    #[default]
    Gaussian,
}

/// How a volume is covered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SlidingWindow {
    /// The window (z, y, x) in voxels.
    pub window: Shape,
    /// Share of a window that the next one covers again, 0 to 0.9.
    pub overlap: f64,
    /// How overlapping windows are weighed.
    pub blending: Blending,
}

impl Default for SlidingWindow {
    fn default() -> Self {
        Self {
            window: [96; 3],
            overlap: 0.5,
            blending: Blending::default(),
        }
    }
}

impl SlidingWindow {
    /// Returns where windows start along an axis of `length` voxels: evenly spread, the ends covered.
    fn starts(&self, length: usize, window: usize) -> Vec<i64> {
        let free = length.saturating_sub(window);
        let step = ((window as f64 * (1.0 - self.overlap.clamp(0.0, 0.9))) as usize).max(1);
        let count = free.div_ceil(step);
        (0..=count).map(|i| (free * i / count.max(1)) as i64).collect()
    }

    fn weights(&self) -> Array3<f32> {
        let [d, h, w] = self.window;
        let weigh = |i: usize, n: usize| match self.blending {
            Blending::Constant => 1.0,
            Blending::Gaussian => {
                let offset = (i as f64 + 0.5 - n as f64 / 2.0) / (n as f64 / 8.0);
                libm::exp(-0.5 * offset * offset).max(1e-3)
            }
        };
        Array3::from_shape_fn((d, h, w), |(z, y, x)| (weigh(z, d) * weigh(y, h) * weigh(x, w)) as f32)
    }
}

/// Returns the class of the largest logit, the lowest id where several are largest.
pub fn argmax(logits: &Array4<f32>) -> Array3<u8> {
    logits.map_axis(Axis(0), |voxel| {
        let mut best = 0;
        for (class, value) in voxel.iter().enumerate() {
            if *value > voxel[best] {
                best = class;
            }
        }
        best as u8
    })
}

/// Predicts the label ids of a whole case; windows reaching past the volume see air.
///
/// # Errors
/// [`StoreError`] where the case cannot be read.
pub fn predict(
    net: &dyn VoxelClassifier,
    cases: &dyn Cases,
    case: usize,
    settings: &SlidingWindow,
    device: &Device,
) -> Result<Array3<u8>, StoreError> {
    let plan = cases.plan();
    let classes = plan.labels.class_count();
    let [d, h, w] = cases.records()[case].grid.shape;
    let weights = settings.weights();
    let mut sums: Array4<f32> = Array4::zeros((classes, d, h, w));
    let [zs, ys, xs] = std::array::from_fn(|axis| settings.starts([d, h, w][axis], settings.window[axis]));
    for (z, y, x) in zs
        .iter()
        .flat_map(|z| ys.iter().flat_map(|y| xs.iter().map(|x| (*z, *y, *x))))
    {
        let region = Region {
            start: [z, y, x],
            size: settings.window,
        };
        let crop = cases.read(case, region)?;
        let logits = forward(net, &crop.image.mapv(|hu| plan.window_hu.normalise(hu)), device);
        let part = region.intersect(&Region::whole([d, h, w]));
        let from = part.start.map(|v| v as usize);
        let [pd, ph, pw] = part.size;
        for class in 0..classes {
            let mut target = sums.slice_mut(s![
                class,
                from[0]..from[0] + pd,
                from[1]..from[1] + ph,
                from[2]..from[2] + pw
            ]);
            target += &(&logits.slice(s![class, ..pd, ..ph, ..pw]) * &weights.slice(s![..pd, ..ph, ..pw]));
        }
    }
    // The same weights divide all classes of a voxel, so the largest sum is the largest mean.
    Ok(argmax(&sums))
}

/// Runs a network on one cube of intensities in [0, 1]; returns logits `[C, D, H, W]`.
pub(crate) fn forward(net: &dyn VoxelClassifier, image: &Array3<f32>, device: &Device) -> Array4<f32> {
    let (d, h, w) = image.dim();
    let values: Vec<f32> = image.iter().copied().collect();
    let x = Tensor::<5>::from_data(TensorData::new(values, [1, 1, d, h, w]), device);
    let logits = net.logits(x);
    let classes = logits.dims()[1];
    let values: Vec<f32> = logits
        .into_data()
        .convert::<f32>()
        .try_to_vec()
        .expect("converted to this type");
    Array4::from_shape_vec((classes, d, h, w), values).expect("the network keeps the shape")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_voxel() {
        let settings = SlidingWindow {
            window: [32; 3],
            overlap: 0.25,
            ..SlidingWindow::default()
        };
        for length in [8, 32, 33, 57, 100] {
            let starts = settings.starts(length, 32);
            let covered = |v: usize| starts.iter().any(|s| (*s..s + 32).contains(&(v as i64)));
            assert!((0..length).all(covered), "{length} {starts:?}");
            assert!(starts.iter().all(|s| *s + 32 <= length.max(32) as i64));
        }
    }
}
