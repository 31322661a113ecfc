//! Lesions found, missed and invented: connected components of truth and prediction, matched one to one.

use std::collections::BTreeMap;

use ndarray::{Array3, ArrayView3};
use serde::{Deserialize, Serialize};

use crate::volume::{Connectivity, Shape, SizeClass, components};

/// One over the least intersection over union of a match: 0.1.
const LEAST_IOU: u64 = 10;

/// Counts of lesions of one size class, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LesionCounts {
    /// True lesions.
    pub truths: u32,
    /// True lesions that were matched with a predicted one.
    pub matched: u32,
    /// Predicted lesions that were matched with no true one.
    pub false_positives: u32,
    /// True lesions that share a voxel with any predicted one.
    pub touched: u32,
    /// Predicted lesions.
    pub predictions: u32,
    /// Predicted lesions that share no voxel with a true one.
    pub alone: u32,
}

impl LesionCounts {
    fn add(&mut self, other: &Self) {
        self.truths += other.truths;
        self.matched += other.matched;
        self.false_positives += other.false_positives;
        self.touched += other.touched;
        self.predictions += other.predictions;
        self.alone += other.alone;
    }

    /// Returns the sum of counts.
    pub fn sum<'a>(counts: impl IntoIterator<Item = &'a Self>) -> Self {
        counts.into_iter().fold(Self::default(), |mut sum, counts| {
            sum.add(counts);
            sum
        })
    }

    /// Returns the share of true lesions that were matched; nothing without true lesions.
    pub fn sensitivity(&self) -> Option<f64> {
        share(self.matched, self.truths)
    }

    /// Returns matches over matches and false positives; nothing without either.
    pub fn precision(&self) -> Option<f64> {
        share(self.matched, self.matched + self.false_positives)
    }

    /// Returns 2 matches over 2 matches, missed lesions and false positives; nothing without any of them.
    pub fn f1(&self) -> Option<f64> {
        share(2 * self.matched, self.matched + self.truths + self.false_positives)
    }

    /// Returns the share of true lesions that any prediction touches; nothing without true lesions.
    pub fn sensitivity_any_overlap(&self) -> Option<f64> {
        share(self.touched, self.truths)
    }

    /// Returns the share of predicted lesions that touch a true one; nothing without predicted lesions.
    pub fn precision_any_overlap(&self) -> Option<f64> {
        share(self.predictions - self.alone, self.predictions)
    }
}

fn share(part: u32, whole: u32) -> Option<f64> {
    (whole > 0).then(|| f64::from(part) / f64::from(whole))
}

/// Lesions of one organ in one or several cases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LesionScore {
    /// By size class: matched, missed and touched lesions by the true lesion's, the others by the predicted one's.
    pub by_size: BTreeMap<SizeClass, LesionCounts>,
    /// Predicted lesions that touch several true ones.
    pub merges: u32,
    /// True lesions that several predicted ones touch.
    pub splits: u32,
    /// Cases counted.
    pub cases: u32,
}

impl LesionScore {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        for (size, counts) in &other.by_size {
            self.by_size.entry(*size).or_default().add(counts);
        }
        self.merges += other.merges;
        self.splits += other.splits;
        self.cases += other.cases;
    }

    /// Returns the counts of all sizes together.
    pub fn all(&self) -> LesionCounts {
        LesionCounts::sum(self.by_size.values())
    }
}

/// Counts the lesions of one tumour class in one case.
///
/// Lesions are 26-connected components. Pairs with an intersection over union of at least 0.1 are matched, the best first;
/// of equal pairs the one whose true lesion comes first in scan order, then whose predicted one does. No lesion is matched
/// twice.
///
/// # Panics
/// Where the shapes differ.
///
/// # Source
/// The matching is panoptica's `NaiveThresholdMatching` (Kofler et al., arXiv 2312.02608).
pub fn lesion_level(prediction: ArrayView3<bool>, truth: ArrayView3<bool>, spacing_mm: [f64; 3]) -> LesionScore {
    assert_eq!(prediction.dim(), truth.dim(), "two masks of one case");
    let [truths, predictions] = [truth, prediction].map(|mask| components(mask.to_owned(), Connectivity::Corners));
    let shared = shared_voxels(&truths, &predictions, truth.dim().into());
    let (matched_truths, matched_predictions) = matched(&truths, &predictions, &shared);
    let touching = |side: usize, count: usize| {
        let mut touching = vec![0_u32; count];
        shared.keys().for_each(|pair| touching[pair[side]] += 1);
        touching
    };
    let (of_truths, of_predictions) = (touching(0, truths.len()), touching(1, predictions.len()));
    let mut score = LesionScore {
        merges: of_predictions.iter().filter(|count| **count > 1).count() as u32,
        splits: of_truths.iter().filter(|count| **count > 1).count() as u32,
        cases: 1,
        ..LesionScore::default()
    };
    for (n, voxels) in truths.iter().enumerate() {
        let counts = score.by_size.entry(size_of(voxels, spacing_mm)).or_default();
        counts.truths += 1;
        counts.matched += u32::from(matched_truths[n]);
        counts.touched += u32::from(of_truths[n] > 0);
    }
    for (n, voxels) in predictions.iter().enumerate() {
        let counts = score.by_size.entry(size_of(voxels, spacing_mm)).or_default();
        counts.predictions += 1;
        counts.false_positives += u32::from(!matched_predictions[n]);
        counts.alone += u32::from(of_predictions[n] == 0);
    }
    score
}

/// Voxels that a true and a predicted lesion share, by the pair's numbers.
type Shared = BTreeMap<[usize; 2], u64>;

fn shared_voxels(truths: &[Vec<Shape>], predictions: &[Vec<Shape>], shape: Shape) -> Shared {
    let mut numbers: Array3<u32> = Array3::zeros(shape);
    for (number, voxels) in (1..).zip(truths) {
        voxels.iter().for_each(|voxel| numbers[*voxel] = number);
    }
    let mut shared = Shared::new();
    for (n, voxels) in predictions.iter().enumerate() {
        for number in voxels.iter().map(|voxel| numbers[*voxel]).filter(|number| *number > 0) {
            *shared.entry([number as usize - 1, n]).or_default() += 1;
        }
    }
    shared
}

/// Tells which true and which predicted lesions are matched.
fn matched(truths: &[Vec<Shape>], predictions: &[Vec<Shape>], shared: &Shared) -> (Vec<bool>, Vec<bool>) {
    let united = |[t, p]: [usize; 2], both: u64| (truths[t].len() + predictions[p].len()) as u64 - both;
    let mut pairs: Vec<([usize; 2], u64, u64)> = shared
        .iter()
        .map(|(pair, both)| (*pair, *both, united(*pair, *both)))
        .filter(|(_, both, union)| both * LEAST_IOU >= *union)
        .collect();
    // Products of integers compare the ratios exactly, and the stable sort leaves equal ones in scan order.
    pairs.sort_by(|(_, both_a, union_a), (_, both_b, union_b)| {
        let [a, b] = [(*both_a, *union_b), (*both_b, *union_a)].map(|(x, y)| u128::from(x) * u128::from(y));
        b.cmp(&a)
    });
    let (mut of_truths, mut of_predictions) = (vec![false; truths.len()], vec![false; predictions.len()]);
    for ([t, p], _, _) in pairs {
        if !of_truths[t] && !of_predictions[p] {
            (of_truths[t], of_predictions[p]) = (true, true);
        }
    }
    (of_truths, of_predictions)
}

/// Returns the class of a lesion's equivalent-sphere diameter.
fn size_of(voxels: &[Shape], spacing_mm: [f64; 3]) -> SizeClass {
    let mm3 = voxels.len() as f64 * spacing_mm.iter().product::<f64>();
    SizeClass::of_diameter(libm::cbrt(mm3 * 6.0 / std::f64::consts::PI))
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;

    #[test]
    fn one_found_one_missed_one_false_alarm() {
        let mut truth = Array3::from_elem((16, 16, 40), false);
        let mut prediction = truth.clone();
        truth.slice_mut(s![2..6, 2..6, 2..6]).fill(true);
        truth[[12, 12, 12]] = true;
        prediction.slice_mut(s![3..5, 3..5, 3..5]).fill(true);
        prediction[[8, 8, 30]] = true;
        let score = lesion_level(prediction.view(), truth.view(), [3.0; 3]);
        // 64 voxels of 27 mm^3 are a sphere of 14.9 mm, 8 voxels one of 7.4 mm, one voxel one of 3.7 mm. 8 / 64 >= 0.1.
        let small = score.by_size[&SizeClass::Small];
        assert_eq!((small.truths, small.matched, small.predictions), (1, 1, 0));
        let tiny = score.by_size[&SizeClass::Tiny];
        assert_eq!(
            (tiny.truths, tiny.matched, tiny.false_positives, tiny.predictions),
            (1, 0, 1, 2)
        );
        let all = score.all();
        assert_eq!(
            (all.sensitivity(), all.precision(), all.f1()),
            (Some(0.5), Some(0.5), Some(0.5))
        );
        assert_eq!((all.touched, all.alone), (1, 1));
    }

    #[test]
    fn merges_and_splits_are_matched_once() {
        // Two true lesions under one prediction, and one true lesion under two predictions.
        let mut truth = Array3::from_elem((4, 4, 30), false);
        let mut prediction = truth.clone();
        truth.slice_mut(s![.., .., 0..4]).fill(true);
        truth.slice_mut(s![.., .., 5..8]).fill(true);
        prediction.slice_mut(s![.., .., 0..8]).fill(true);
        truth.slice_mut(s![.., .., 15..25]).fill(true);
        prediction.slice_mut(s![.., .., 15..19]).fill(true);
        prediction.slice_mut(s![.., .., 21..25]).fill(true);
        let score = lesion_level(prediction.view(), truth.view(), [1.0; 3]);
        assert_eq!((score.merges, score.splits), (1, 1));
        let all = score.all();
        assert_eq!((all.truths, all.matched, all.touched), (3, 2, 3));
        assert_eq!((all.predictions, all.false_positives, all.alone), (3, 1, 0));
    }

    #[test]
    fn a_match_needs_a_tenth_of_the_union() {
        let mask = |range: std::ops::Range<usize>| Array3::from_shape_fn((1, 1, 40), |(_, _, x)| range.contains(&x));
        // 2 of 20 voxels, and 2 of 21.
        for (end, matched) in [(20, 1), (21, 0)] {
            let score = lesion_level(mask(0..2).view(), mask(0..end).view(), [1.0; 3]).all();
            assert_eq!((score.matched, score.touched), (matched, 1), "{end}");
        }
        let none = lesion_level(mask(0..0).view(), mask(0..0).view(), [1.0; 3]).all();
        assert_eq!((none.sensitivity(), none.precision(), none.f1()), (None, None, None));
    }
}
