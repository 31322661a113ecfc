//! Losses over voxels of which not every one has a known class.

use burn::tensor::{Device, Tensor, TensorData, activation};

use crate::volume::ClassSet;

/// What every voxel of a batch may be: 1 for an admissible class, else 0, shape `[B, C, D, H, W]`.
///
/// One admissible class means that the voxel's class is known; all of them mean that nothing is.
#[derive(Clone, Debug)]
pub struct Targets {
    admissible: Tensor<5>,
}

impl Targets {
    /// Makes targets from the admissible sets of all voxels, sample after sample.
    ///
    /// # Panics
    /// When `sets` does not fill `[batch, size]`.
    pub fn new(sets: &[ClassSet], classes: usize, shape: [usize; 4], device: &Device) -> Self {
        let [batch, d, h, w] = shape;
        let voxels = d * h * w;
        assert_eq!(sets.len(), batch * voxels, "one set per voxel");
        let mut values = vec![0.0_f32; batch * classes * voxels];
        for (sample, sets) in sets.chunks_exact(voxels).enumerate() {
            for class in 0..classes {
                let row = &mut values[(sample * classes + class) * voxels..][..voxels];
                for (value, set) in row.iter_mut().zip(sets) {
                    *value = f32::from(set.contains(class as u8));
                }
            }
        }
        Self {
            admissible: Tensor::from_data(TensorData::new(values, [batch, classes, d, h, w]), device),
        }
    }
}

/// Returns log sum exp over the classes, safe for large logits.
fn log_sum_exp(logits: Tensor<5>) -> Tensor<5> {
    // The gradient does not depend on the shift, so none needs to flow through it.
    let shift = logits.clone().max_dim(1).detach();
    (logits - shift.clone()).exp().sum_dim(1).log() + shift
}

/// Sums all elements, axis by axis: in one fixed order, which the CPU backend's `sum` leaves to work stealing from four
/// million elements on, and with less rounding than one long sum.
pub fn total(x: Tensor<5>) -> Tensor<1> {
    x.sum_dim(4).sum_dim(3).sum_dim(2).sum_dim(1).sum_dim(0).reshape([1])
}

/// Returns marginal cross-entropy plus marginal Dice loss, one number.
///
/// Cross-entropy is -log of the probability that the class is admissible; half of it is averaged over the voxels of which
/// something is known, half over the classes that the batch is known to hold, each averaged over its own voxels. Dice is one number per class for the whole batch, over the voxels of which it is known whether they are of
/// that class, averaged over the classes that the batch is known to hold.
///
/// # Shape
/// logits `[B, C, D, H, W]`.
///
/// # Source
/// Shi et al., Medical Image Analysis 70 (2021) 101979: marginal loss. Departure: their Dice sums merged classes; ours
/// leaves undecided voxels out, so that a class is never rewarded for a voxel that may be another's. Departure: the
/// balanced half, since tumours are under 1 % of the voxels and a plain average hardly hears of them. Not shown to matter
/// by itself: 500 steps of the demo's critic with mirrors left tumour Dice at 0 with it and without it.
pub fn marginal_loss(logits: Tensor<5>, targets: &Targets) -> Tensor<1> {
    let admissible = targets.admissible.clone();
    let classes = logits.dims()[1];
    let members = admissible.clone().sum_dim(1);
    let informed = members.clone().lower_elem(classes as f64 - 0.5).float();
    let known = members.lower_elem(1.5).float();

    let excluded = (admissible.clone() - 1.0) * 1e4;
    let entropy = log_sum_exp(logits.clone()) - log_sum_exp(logits.clone() + excluded);
    let plain = total(entropy.clone() * informed.clone()) / total(informed).clamp_min(1.0);

    // [C, N]: one row per class. Decided: known to be of the class (the only admissible one), or known not to be.
    let rows = |x: Tensor<5>| -> Tensor<2> { x.swap_dims(0, 1).flatten(1, 4) };
    let truth = rows(admissible.clone() * known);
    let decided = truth.clone() + rows(admissible.neg() + 1.0);
    let chance = rows(activation::softmax(logits, 1)) * decided;
    let overlap = (chance.clone() * truth.clone()).sum_dim(1);
    let size = truth.clone().sum_dim(1);
    let present = size.clone().greater_elem(0.5).float();
    let classes_present = present.clone().sum().clamp_min(1.0);
    let of_class = (truth.clone() * rows(entropy)).sum_dim(1) / size.clone().clamp_min(1.0);
    let balanced = of_class.sum() / classes_present.clone();
    let dice: Tensor<2> = (overlap * 2.0 + 1e-5) / (chance.sum_dim(1) + size + 1e-5);
    let dice_loss = ((dice.neg() + 1.0) * present).sum() / classes_present;
    (plain + balanced) * 0.5 + dice_loss
}

/// Returns - sum of weight x log softmax: a cross-entropy whose weights (`[B, C, D, H, W]`, 0 where a class is not
/// meant) say how much each voxel counts.
pub fn weighted_cross_entropy(logits: Tensor<5>, weights: Tensor<5>) -> Tensor<1> {
    let log = logits.clone() - log_sum_exp(logits);
    total(log * weights).neg()
}

#[cfg(test)]
mod tests {
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
        let targets = Targets::new(&sets, 3, [2, 2, 2, 2], &device);
        let loss: f32 = marginal_loss(tensor(&logits, &device), &targets).into_scalar();
        // Single precision over 16 voxels.
        assert!((f64::from(loss) - reference(&logits, &sets, 3, 2)).abs() < 1e-5);
    }

    #[test]
    fn the_gradient_equals_finite_differences() {
        let (logits, sets) = sample();
        let device = Device::flex().autodiff();
        let targets = Targets::new(&sets, 3, [2, 2, 2, 2], &device);
        let x = tensor(&logits, &device).require_grad();
        let gradients = marginal_loss(x.clone(), &targets).backward();
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
    fn voxels_of_which_nothing_is_known_do_not_count() {
        let device = Device::flex();
        let (logits, _) = sample();
        let targets = Targets::new(&[ClassSet(0b111); 16], 3, [2, 2, 2, 2], &device);
        let loss: f32 = marginal_loss(tensor(&logits, &device), &targets).into_scalar();
        assert_eq!(loss, 0.0);
    }
}
