//! A network over a whole volume, window by window.

use std::collections::BTreeSet;
use std::ops::AddAssign;

use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array3, Array4, Axis, Zip, s};
use serde::{Deserialize, Serialize};

use crate::nn::VoxelClassifier;
use crate::store::{Cases, StoreError, cut};
use crate::volume::{AIR_HU, Plan, Region, Shape};

/// How overlapping windows are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Blending {
    /// All voxels alike.
    Constant,
    /// The centre more than the rim: a Gaussian of an eighth of the window, centred between its middle voxels (nnU-Net's lies half a
    /// voxel further), at least a thousandth along each axis (MONAI: altogether).
    #[default]
    Gaussian,
}

/// An axis of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlipAxis {
    /// Towards Superior.
    Z,
    /// Towards Anterior.
    Y,
    /// Towards Right.
    X,
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
    /// Axes along which every window is also seen in the mirror, alone and together; the logits are averaged.
    pub flips: Vec<FlipAxis>,
}

impl Default for SlidingWindow {
    fn default() -> Self {
        Self {
            window: [96; 3],
            overlap: 0.5,
            blending: Blending::default(),
            flips: Vec::new(),
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

/// A network with what it needs to predict a volume.
pub struct Predictor<'a> {
    /// The network.
    pub net: &'a dyn VoxelClassifier,
    /// Its classes and intensity window.
    pub plan: &'a Plan,
    /// How a volume is covered; windows reaching past it see air.
    pub settings: &'a SlidingWindow,
    /// Where the network runs.
    pub device: &'a Device,
}

impl Predictor<'_> {
    /// Predicts the label ids of an image in HU.
    pub fn labels(&self, image: &Array3<i16>) -> Array3<u8> {
        // The same weights divide all classes of a voxel, so the largest sum is the largest mean.
        argmax(&self.weighted_logits(image).0)
    }

    /// Predicts the classes' probabilities: the softmax of the windows' weighted mean logits.
    ///
    /// # Shape
    /// `[D, H, W]` -> `[C, D, H, W]`
    pub fn probabilities(&self, image: &Array3<i16>) -> Array4<f32> {
        let (mut values, weights) = self.weighted_logits(image);
        Zip::from(values.lanes_mut(Axis(0)))
            .and(&weights)
            .for_each(|mut voxel, weight| {
                let most = voxel.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                voxel.mapv_inplace(|sum| libm::expf((sum - most) / weight));
                let total = voxel.sum();
                voxel.mapv_inplace(|value| value / total);
            });
        values
    }

    /// Adds up the logits of all windows by their weights; returns the sums `[C, D, H, W]` and the weights'.
    fn weighted_logits(&self, image: &Array3<i16>) -> (Array4<f32>, Array3<f32>) {
        let settings = self.settings;
        let classes = self.plan.labels.class_count();
        let [d, h, w]: Shape = image.dim().into();
        let weights = settings.weights();
        let mut sums: Array4<f32> = Array4::zeros((classes, d, h, w));
        let mut total: Array3<f32> = Array3::zeros((d, h, w));
        let [zs, ys, xs] = std::array::from_fn(|axis| settings.starts([d, h, w][axis], settings.window[axis]));
        for (z, y, x) in zs
            .iter()
            .flat_map(|z| ys.iter().flat_map(|y| xs.iter().map(|x| (*z, *y, *x))))
        {
            let region = Region {
                start: [z, y, x],
                size: settings.window,
            };
            let seen = cut(image, region, AIR_HU).mapv(|hu| self.plan.window_hu.normalise(hu));
            let logits = forward_flipped(self.net, &seen, &settings.flips, self.device);
            let part = region.intersect(&Region::whole([d, h, w]));
            let [z, y, x] = part.start.map(|v| v as usize);
            let [pd, ph, pw] = part.size;
            let inside = weights.slice(s![..pd, ..ph, ..pw]);
            total.slice_mut(s![z..z + pd, y..y + ph, x..x + pw]).add_assign(&inside);
            for class in 0..classes {
                let mut target = sums.slice_mut(s![class, z..z + pd, y..y + ph, x..x + pw]);
                target += &(&logits.slice(s![class, ..pd, ..ph, ..pw]) * &inside);
            }
        }
        (sums, total)
    }
}

/// Predicts the label ids of a whole case.
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
    let image = cases.read(case, Region::whole(cases.records()[case].grid.shape))?.image;
    let predictor = Predictor {
        net,
        plan: cases.plan(),
        settings,
        device,
    };
    Ok(predictor.labels(&image))
}

/// Runs a network on a cube and on its mirror images along all choices of some axes; returns the mean logits.
fn forward_flipped(net: &dyn VoxelClassifier, image: &Array3<f32>, flips: &[FlipAxis], device: &Device) -> Array4<f32> {
    let axes: BTreeSet<FlipAxis> = flips.iter().copied().collect();
    let mut sum = forward(net, image, device);
    let choices = 1_usize << axes.len();
    for choice in 1..choices {
        let turned = || {
            (0..)
                .zip(&axes)
                .filter(|(bit, _)| choice >> bit & 1 == 1)
                .map(|(_, axis)| *axis as usize)
        };
        let mut mirrored = image.clone();
        turned().for_each(|axis| mirrored.invert_axis(Axis(axis)));
        let mut logits = forward(net, &mirrored, device);
        turned().for_each(|axis| logits.invert_axis(Axis(axis + 1)));
        sum += &logits;
    }
    sum / choices as f32
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
    use std::collections::BTreeMap;

    use super::*;
    use crate::rng::{Purpose, Rng};
    use crate::volume::{HuWindow, LabelMap};

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

    #[test]
    fn averaged_over_mirrors_a_prediction_turns_with_its_image() {
        let device = Device::flex();
        let plan = Plan::default();
        let net = crate::nn::UnetConfig {
            in_channels: 1,
            out_channels: plan.labels.class_count(),
            widths: vec![4, 6],
            condition: 0,
        }
        .init(&device, 5);
        let mut rng = Rng::keyed(6, 0, 0, Purpose::Test);
        let image = Array3::from_shape_fn((16, 20, 24), |_| rng.range(-200.0, 300.0) as i16);
        let probabilities = |image: &Array3<i16>, flips: Vec<FlipAxis>| {
            let settings = SlidingWindow {
                window: [12, 12, 16],
                flips,
                ..SlidingWindow::default()
            };
            let predictor = Predictor {
                net: &net,
                plan: &plan,
                settings: &settings,
                device: &device,
            };
            let probabilities = predictor.probabilities(image);
            assert_eq!(argmax(&probabilities), predictor.labels(image));
            assert!(
                probabilities
                    .sum_axis(Axis(0))
                    .iter()
                    .all(|sum| (sum - 1.0).abs() < 1e-5)
            );
            probabilities
        };
        let mut mirrored = image.clone();
        mirrored.invert_axis(Axis(0));
        mirrored.invert_axis(Axis(2));
        let largest_change = |flips: Vec<FlipAxis>| {
            let mut back = probabilities(&mirrored, flips.clone());
            back.invert_axis(Axis(1));
            back.invert_axis(Axis(3));
            let change = &back - &probabilities(&image, flips);
            change.iter().fold(0.0_f32, |most, value| most.max(value.abs()))
        };
        // The windows lie symmetrically, so only rounding of single precision is left; without mirrors the net is not symmetric.
        assert!(largest_change(vec![FlipAxis::Z, FlipAxis::X]) < 1e-4);
        assert!(largest_change(vec![FlipAxis::Z]) > 1e-2);
    }

    /// The formula of tests/golden/evaluate/make_window.py: it depends on where in its window a voxel lies.
    struct Pattern;

    impl VoxelClassifier for Pattern {
        fn logits(&self, x: Tensor<5>) -> Tensor<5> {
            let [_, _, d, h, w] = x.dims();
            let pattern = Array3::from_shape_fn((d, h, w), |(z, y, x)| ((7 * z + 3 * y + 5 * x) % 11) as f32 / 11.0);
            let pattern = TensorData::new(pattern.into_iter().collect::<Vec<f32>>(), [1, 1, d, h, w]);
            let pattern = Tensor::<5>::from_data(pattern, &x.device());
            Tensor::cat(vec![x.clone(), x * pattern], 1)
        }
    }

    #[derive(Deserialize)]
    struct Golden {
        blending: Blending,
        by: String,
        window: Shape,
        shape: Shape,
        hu: Vec<i16>,
        second_class: Vec<f64>,
    }

    #[test]
    fn overlapping_windows_are_weighed_as_monai_and_scipy_weigh_them() {
        let text = include_str!("../../tests/golden/evaluate/sliding_window.json");
        let goldens: Vec<Golden> = serde_json::from_str(text).unwrap();
        assert_eq!(goldens.len(), 5);
        let plan = Plan {
            labels: LabelMap::try_from(BTreeMap::from([("background".into(), 0), ("liver".into(), 1)])).unwrap(),
            window_hu: HuWindow { low: 0.0, high: 1000.0 },
            ..Plan::default()
        };
        for golden in goldens {
            let settings = SlidingWindow {
                window: golden.window,
                overlap: 0.5,
                blending: golden.blending,
                flips: Vec::new(),
            };
            let predictor = Predictor {
                net: &Pattern,
                plan: &plan,
                settings: &settings,
                device: &Device::flex(),
            };
            let image = Array3::from_shape_vec(golden.shape, golden.hu).unwrap();
            let found = predictor.probabilities(&image);
            let second = found.index_axis(Axis(0), 1);
            assert_eq!(second.len(), golden.second_class.len());
            for (ours, theirs) in second.iter().zip(&golden.second_class) {
                // Sums of up to eight windows in single precision, and seven digits in the file.
                let apart = (f64::from(*ours) - theirs).abs();
                assert!(apart < 1e-6, "{} {:?}: {ours} for {theirs}", golden.by, golden.window);
            }
        }
    }
}
