//! Losses over voxels of which not every one has a known class.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::kernel::{self, LossForm};
use crate::volume::ClassSet;

/// What every voxel of a batch may be, shape `[B, D, H, W]` flattened.
///
/// One admissible class means that the voxel's class is known; all of them mean that nothing is.
#[derive(Clone, Debug)]
pub struct Targets {
    sets: Arc<[ClassSet]>,
}

impl Targets {
    /// Makes targets from the admissible sets of all voxels, sample after sample.
    ///
    /// # Panics
    /// When a set is empty: nothing could be right there.
    pub fn new(sets: Vec<ClassSet>) -> Self {
        assert!(
            sets.iter().all(|set| *set != ClassSet::default()),
            "an admissible class per voxel"
        );
        Self { sets: sets.into() }
    }

    /// Returns the targets of coarser logits: each voxel's are those of the voxel nearest to its centre, as PyTorch's
    /// `nearest-exact` picks it.
    ///
    /// # Shape
    /// full `[B, D, H, W]` of these targets, coarse `[D, H, W]`.
    pub fn coarser(&self, full: [usize; 4], coarse: [usize; 3]) -> Self {
        let [batch, size @ ..] = full;
        if size == coarse {
            return self.clone();
        }
        let nearest = |axis: usize| -> Vec<usize> {
            let (from, to) = (size[axis], coarse[axis]);
            // (i + 1/2) from / to, rounded down, in whole numbers.
            (0..to).map(|i| ((2 * i + 1) * from / (2 * to)).min(from - 1)).collect()
        };
        let [zs, ys, xs] = [0, 1, 2].map(nearest);
        let [d, h, w] = size;
        let mut sets = Vec::with_capacity(batch * coarse.iter().product::<usize>());
        for sample in 0..batch {
            for z in &zs {
                for y in &ys {
                    let row = ((sample * d + z) * h + y) * w;
                    sets.extend(xs.iter().map(|x| self.sets[row + x]));
                }
            }
        }
        Self { sets: sets.into() }
    }
}

/// Returns marginal cross-entropy plus marginal Dice loss, one number.
///
/// Cross-entropy is -log of the probability that the class is admissible; by default half of it is averaged over the voxels of
/// which something is known, half over the classes that the batch is known to hold, each averaged over its own voxels. Dice is
/// one number per class, by default for the whole batch, over the voxels of which it is known whether they are of that class,
/// averaged over the classes that the batch is known to hold. [`LossForm`] says what else there is: with a balance of 0, absent
/// classes counted and everything known it is MONAI's `DiceCELoss`, and without the background nnU-Net's, plus 1.
///
/// # Shape
/// logits `[B, C, D, H, W]`.
///
/// # Source
/// Shi et al., Medical Image Analysis 70 (2021) 101979: marginal loss. Departure: their Dice sums merged classes; ours
/// leaves undecided voxels out, so that a class is never rewarded for a voxel that may be another's. Departure: the
/// balanced half, since tumours are under 1 % of the voxels and a plain average hardly hears of them.
pub fn marginal_loss(logits: Tensor<5>, targets: &Targets, form: LossForm) -> Tensor<1> {
    kernel::marginal_loss(logits, targets.sets.clone(), form)
}

/// Returns the weighted sum of [`marginal_loss`] over resolutions, each against labels of that resolution.
///
/// # Shape
/// logits `[B, C, D, H, W]`, finest first; targets of the finest.
///
/// # Source
/// nnU-Net's `DeepSupervisionWrapper`: weights 1, 1/2, 1/4, ... of which the coarsest is 0 where there are several, divided by
/// their sum; labels by nearest neighbour.
///
/// # Panics
/// When there are no logits.
pub fn deep_supervision_loss(logits: Vec<Tensor<5>>, targets: &Targets, form: LossForm) -> Tensor<1> {
    let [batch, _, d, h, w] = logits[0].dims();
    let counted = logits.len().saturating_sub(1).max(1);
    let weights: Vec<f64> = (0..counted).map(|i| 1.0 / f64::from(1_u32 << i)).collect();
    let total: f64 = weights.iter().sum();
    let losses = logits.into_iter().zip(weights).map(|(logits, weight)| {
        let [_, _, coarse @ ..] = logits.dims();
        marginal_loss(logits, &targets.coarser([batch, d, h, w], coarse), form) * (weight / total)
    });
    losses.reduce(|sum, loss| sum + loss).expect("one resolution at least")
}

/// Returns - sum of weight x log softmax: a cross-entropy whose weights (`[B, C, D, H, W]`, 0 where a class is not
/// meant) say how much each voxel counts.
pub fn weighted_cross_entropy(logits: Tensor<5>, weights: Tensor<5>) -> Tensor<1> {
    let log = logits.clone() - kernel::log_sum_exp(logits);
    kernel::total(log * weights).neg()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::rng::{Purpose, Rng};

    /// The same definition, voxel by voxel in f64.
    fn reference(logits: &[f64], sets: &[ClassSet], classes: usize, batch: usize) -> f64 {
        let voxels = sets.len() / batch;
        let (mut entropy, mut informed) = (0.0_f64, 0.0_f64);
        let (mut overlap, mut chance, mut truth) = (vec![0.0; classes], vec![0.0; classes], vec![0.0_f64; classes]);
        let mut of_class = vec![0.0_f64; classes];
        for (i, set) in sets.iter().enumerate() {
            let at = |c: usize| logits[(i / voxels * classes + c) * voxels + i % voxels].exp();
            let total: f64 = (0..classes).map(at).sum();
            let admissible: f64 = set.iter().map(|c| at(usize::from(c))).sum();
            if set.iter().count() < classes {
                entropy -= (admissible / total).ln();
                informed += 1.0;
            }
            for c in 0..classes {
                if set.single() == Some(c as u8) {
                    of_class[c] -= (at(c) / total).ln();
                    overlap[c] += at(c) / total;
                    truth[c] += 1.0;
                    chance[c] += at(c) / total;
                } else if !set.contains(c as u8) {
                    chance[c] += at(c) / total;
                }
            }
        }
        let present: Vec<usize> = (0..classes).filter(|c| truth[*c] > 0.0).collect();
        let dice: f64 = present
            .iter()
            .map(|&c| 1.0 - (2.0 * overlap[c] + 1e-5) / (chance[c] + truth[c] + 1e-5))
            .sum();
        let balanced: f64 = present.iter().map(|&c| of_class[c] / truth[c]).sum();
        let held = present.len().max(1) as f64;
        (entropy / informed.max(1.0) + balanced / held) / 2.0 + dice / held
    }

    fn sample() -> (Vec<f64>, Vec<ClassSet>) {
        let mut rng = Rng::keyed(3, 0, 0, Purpose::Test);
        let logits = (0..2 * 3 * 8).map(|_| 2.0 * rng.normal()).collect();
        // Singletons, pairs and full sets.
        let sets = (0..16)
            .map(|i| ClassSet([0b001, 0b010, 0b101, 0b111, 0b100][i % 5]))
            .collect();
        (logits, sets)
    }

    fn tensor(logits: &[f64], device: &Device) -> Tensor<5> {
        let values: Vec<f32> = logits.iter().map(|v| *v as f32).collect();
        Tensor::from_data(TensorData::new(values, [2, 3, 2, 2, 2]), device)
    }

    #[test]
    fn the_loss_equals_its_definition() {
        let (logits, sets) = sample();
        let device = Device::flex();
        let targets = Targets::new(sets.clone());
        let loss: f32 = marginal_loss(tensor(&logits, &device), &targets, LossForm::default()).into_scalar();
        // Single precision over 16 voxels.
        assert!((f64::from(loss) - reference(&logits, &sets, 3, 2)).abs() < 1e-5);
    }

    #[test]
    fn the_gradient_equals_finite_differences() {
        let (logits, sets) = sample();
        let device = Device::flex().autodiff();
        let targets = Targets::new(sets.clone());
        let x = tensor(&logits, &device).require_grad();
        let gradients = marginal_loss(x.clone(), &targets, LossForm::default()).backward();
        let gradient: Vec<f32> = x.grad(&gradients).unwrap().into_data().try_to_vec().unwrap();
        for i in 0..logits.len() {
            let moved = |by: f64| {
                let mut moved = logits.clone();
                moved[i] += by;
                reference(&moved, &sets, 3, 2)
            };
            let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!(
                (f64::from(gradient[i]) - expected).abs() < 1e-5,
                "{i}: {} {expected}",
                gradient[i]
            );
        }
    }

    #[test]
    fn coarser_targets_are_the_nearest_voxels() {
        // Two samples of 1 x 2 x 5 voxels, each its own set.
        let sets: Vec<ClassSet> = (1..=20).map(ClassSet).collect();
        let coarse = Targets::new(sets.clone()).coarser([2, 1, 2, 5], [1, 1, 2]);
        // torch.nn.functional.interpolate(..., mode="nearest-exact") of 0..4 to 2 is [1, 3], of 0..1 to 1 is [1].
        let at = |sample: usize, y: usize, x: usize| sets[sample * 10 + y * 5 + x];
        assert_eq!(coarse.sets[..], [at(0, 1, 1), at(0, 1, 3), at(1, 1, 1), at(1, 1, 3)]);
        let same = Targets::new(sets.clone()).coarser([2, 1, 2, 5], [1, 2, 5]);
        assert_eq!(same.sets[..], sets[..]);
    }

    #[test]
    fn voxels_of_which_nothing_is_known_do_not_count() {
        let device = Device::flex();
        let (logits, _) = sample();
        let targets = Targets::new(vec![ClassSet(0b111); 16]);
        let loss: f32 = marginal_loss(tensor(&logits, &device), &targets, LossForm::default()).into_scalar();
        assert_eq!(loss, 0.0);
    }
}
