//! Marginal cross-entropy plus marginal Dice of a batch of logits, and its gradient, in two passes over the voxels.
//!
//! Legend, per voxel: z its logits, A the set of its admissible classes, p = softmax(z), q = softmax(z) among A alone
//! and 0 elsewhere, e = log sum exp(z) - log sum over A of exp(z) the cross-entropy. `crate::nn::marginal_loss` has the
//! definition of the sums. Sums are `f64`, first within blocks of a fixed number of voxels, then block after block: their
//! order depends on the shape alone.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::isa::Isa;
use super::layout::{Shared, from_zeros};
use super::norm::for_every_isa;
use super::reduce;
use crate::volume::ClassSet;

/// Voxels that a thread works on at a time: seven classes of them fit the first-level cache.
const BLOCK: usize = 1024;
/// Added above and below the bar of Dice.
pub const DICE_EPSILON: f64 = 1e-5;

/// Over which voxels one bar of Dice sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiceOver {
    /// Those of the whole batch: a small structure is weighed against all that is taken for it.
    #[default]
    Batch,
    /// Those of every sample by itself.
    Sample,
}

/// How the marginal loss weighs its parts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossForm {
    /// Share of the cross-entropy that is averaged over classes instead of voxels; 0 is nnU-Net's and MONAI's.
    pub balance: f64,
    /// Over which voxels one bar of Dice sums.
    pub dice: DiceOver,
    /// Whether Dice counts the background, class 0.
    pub background: bool,
    /// Whether Dice counts classes that the voxels hold none of, as nnU-Net's and MONAI's do: 0 where none is predicted either,
    /// nearly 1 where any is.
    pub absent: bool,
}

impl Default for LossForm {
    fn default() -> Self {
        Self {
            balance: 0.5,
            dice: DiceOver::Batch,
            background: true,
            absent: false,
        }
    }
}

/// What the batch, or a sample, sums to.
#[derive(Clone, Debug, PartialEq)]
struct Sums {
    /// Of e over informed voxels, and their number.
    entropy: f64,
    informed: f64,
    /// Per class, over the voxels known to be of it: of p, their number, of e.
    overlap: Vec<f64>,
    size: Vec<f64>,
    of_class: Vec<f64>,
    /// Per class, of p over the voxels of which it is known whether they are of it.
    chance: Vec<f64>,
}

impl Sums {
    fn zero(classes: usize) -> Self {
        let zeros = || vec![0.0; classes];
        Self {
            entropy: 0.0,
            informed: 0.0,
            overlap: zeros(),
            size: zeros(),
            of_class: zeros(),
            chance: zeros(),
        }
    }

    fn add(mut self, other: &Self) -> Self {
        self.entropy += other.entropy;
        self.informed += other.informed;
        let lists = [
            (&mut self.overlap, &other.overlap),
            (&mut self.size, &other.size),
            (&mut self.of_class, &other.of_class),
            (&mut self.chance, &other.chance),
        ];
        for (own, others) in lists {
            own.iter_mut().zip(others).for_each(|(own, other)| *own += other);
        }
        self
    }
}

/// What a voxel contributes to the loss: factors of its gradient that the sums decide.
#[derive(Clone)]
struct Factors {
    /// d loss / d e of every informed voxel.
    plain: f64,
    /// The same, on top, of voxels known to be of a class.
    balanced: Vec<f64>,
    /// d loss / d p of a class where the voxel is known to be of it, and where it is known not to be.
    inside: Vec<f64>,
    outside: Vec<f64>,
}

impl Factors {
    /// Returns the loss and, per sample, the factors of its gradient.
    fn new(samples: &[Sums], form: &LossForm) -> (f64, Vec<Self>) {
        let classes = samples[0].size.len();
        let batch = samples.iter().fold(Sums::zero(classes), Sums::add);
        let informed = batch.informed.max(1.0);
        let mut loss = (1.0 - form.balance) * batch.entropy / informed;
        let mut entropy = Self {
            plain: (1.0 - form.balance) / informed,
            balanced: vec![0.0; classes],
            inside: vec![0.0; classes],
            outside: vec![0.0; classes],
        };
        let held = batch.size.iter().filter(|size| **size > 0.0).count().max(1) as f64;
        for class in (0..classes).filter(|class| batch.size[*class] > 0.0) {
            loss += form.balance * batch.of_class[class] / (batch.size[class] * held);
            entropy.balanced[class] = form.balance / (batch.size[class] * held);
        }
        let mut factors = vec![entropy; samples.len()];
        match form.dice {
            DiceOver::Batch => {
                let bars = Bars::new(std::slice::from_ref(&batch), form);
                loss += bars.loss();
                factors.iter_mut().for_each(|factors| bars.slopes(&batch, factors));
            }
            DiceOver::Sample => {
                let bars = Bars::new(samples, form);
                loss += bars.loss();
                factors
                    .iter_mut()
                    .zip(samples)
                    .for_each(|(factors, sums)| bars.slopes(sums, factors));
            }
        }
        (loss, factors)
    }
}

/// The bars of Dice that are averaged.
struct Bars<'a> {
    sums: &'a [Sums],
    form: &'a LossForm,
    count: f64,
}

impl<'a> Bars<'a> {
    fn new(sums: &'a [Sums], form: &'a LossForm) -> Self {
        let mut bars = Self { sums, form, count: 1.0 };
        let count: usize = sums.iter().map(|sums| bars.classes(sums).count()).sum();
        bars.count = count.max(1) as f64;
        bars
    }

    fn classes<'s>(&'s self, sums: &'s Sums) -> impl Iterator<Item = usize> + 's {
        let first = usize::from(!self.form.background);
        (first..sums.size.len()).filter(|class| self.form.absent || sums.size[*class] > 0.0)
    }

    /// Twice the overlap, and the sizes together.
    fn of(sums: &Sums, class: usize) -> (f64, f64) {
        (
            2.0 * sums.overlap[class] + DICE_EPSILON,
            sums.chance[class] + sums.size[class] + DICE_EPSILON,
        )
    }

    fn loss(&self) -> f64 {
        let bar = |sums, class| {
            let (above, below) = Self::of(sums, class);
            1.0 - above / below
        };
        let all = self
            .sums
            .iter()
            .flat_map(|sums| self.classes(sums).map(move |class| bar(sums, class)));
        all.sum::<f64>() / self.count
    }

    fn slopes(&self, sums: &Sums, factors: &mut Factors) {
        for class in self.classes(sums) {
            let (above, below) = Self::of(sums, class);
            factors.outside[class] = above / (below * below * self.count);
            factors.inside[class] = factors.outside[class] - 2.0 / (below * self.count);
        }
    }
}

/// Returns exp(x) for x <= 0 with a relative error under 3e-7; 0 below -87.
///
/// # Source
/// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, the latter by its Taylor polynomial of degree 7. Only additions and
/// multiplications, none of them fused, so that every instruction set gives the same bits, in vectors.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // ln 2 in two parts, of which n times the first is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // Adding and subtracting 1.5 x 2^23 rounds to the nearest whole number, whose bits are then the lowest.
    const ROUND: f32 = 12_582_912.0;
    let vanishes = x < -87.0;
    let x = if vanishes { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + coefficient;
    }
    let exponent = (shifted.to_bits() << 23).wrapping_add(127 << 23);
    let scaled = sum * f32::from_bits(exponent);
    if vanishes { 0.0 } else { scaled }
}

for_every_isa! {
    /// Replaces the larger numbers in `out`.
    fn maximum(x: &[f32], out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = if x > *out { x } else { *out };
        }
    }
}

for_every_isa! {
    /// Writes exp(z - largest) and adds it to the sums.
    fn exponentials(z: &[f32], largest: &[f32], out: &mut [f32], sums: &mut [f32]) {
        for (((out, sum), &z), &largest) in out.iter_mut().zip(sums).zip(z).zip(largest) {
            *out = exp(z - largest);
            *sum += *out;
        }
    }
}

for_every_isa! {
    /// Divides.
    fn divide(x: &mut [f32], by: &[f32]) {
        for (x, &by) in x.iter_mut().zip(by) {
            *x /= by;
        }
    }
}

for_every_isa! {
    /// Adds a multiple.
    fn add_multiple(x: &[f32], factor: f32, out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out += x * factor;
        }
    }
}

for_every_isa! {
    /// Turns p into p (outside + tilt): the gradient of every class but the voxel's own.
    fn tilt(p: &mut [f32], outside: f32, tilts: &[f32]) {
        for (p, &tilt) in p.iter_mut().zip(tilts) {
            *p *= outside + tilt;
        }
    }
}

/// Some voxels of one sample: row by row of the classes, the logits, and what becomes of them.
struct Block<'a> {
    isa: Isa,
    sets: &'a [ClassSet],
    /// One row per class.
    logits: Vec<&'a [f32]>,
    /// p, then the gradient; one row per class.
    rows: Vec<&'a mut [f32]>,
}

impl Block<'_> {
    /// Writes p; returns what the block adds to the sums.
    fn softmax(&mut self) -> Sums {
        let (classes, n) = (self.rows.len(), self.sets.len());
        let (mut largest, mut sums) = (vec![f32::NEG_INFINITY; n], vec![0.0; n]);
        self.logits.iter().for_each(|z| maximum(self.isa, z, &mut largest));
        for (z, p) in self.logits.iter().zip(&mut self.rows) {
            exponentials(self.isa, z, &largest, p, &mut sums);
        }
        self.rows.iter_mut().for_each(|p| divide(self.isa, p, &sums));

        let mut out = Sums::zero(classes);
        let mut known = vec![0.0_f32; n];
        for (at, set) in self.sets.iter().enumerate() {
            let whole = f64::from(largest[at]) + f64::from(libm::logf(sums[at]));
            if let Some(class) = set.single().map(usize::from) {
                known[at] = 1.0;
                let entropy = whole - f64::from(self.logits[class][at]);
                out.entropy += entropy;
                out.informed += 1.0;
                out.overlap[class] += f64::from(self.rows[class][at]);
                out.size[class] += 1.0;
                out.of_class[class] += entropy;
            } else if set.iter().count() < classes {
                let (shift, part) = self.among(*set, at, &mut vec![0.0; classes]);
                out.entropy += whole - f64::from(shift) - f64::from(libm::logf(part));
                out.informed += 1.0;
                for class in (0..classes).filter(|class| !set.contains(*class as u8)) {
                    out.chance[class] += f64::from(self.rows[class][at]);
                }
            }
        }
        for (p, chance) in self.rows.iter().zip(&mut out.chance) {
            *chance += reduce::sum_of(
                [&**p, &known],
                #[inline(always)]
                |[p, known]| p * known,
            );
        }
        out
    }

    /// Writes exp(z - m) of the set's classes at a voxel, 0 of the others; returns m, their largest z, and the sum.
    fn among(&self, set: ClassSet, at: usize, out: &mut [f32]) -> (f32, f32) {
        let members = || set.iter().map(usize::from);
        let largest = members().map(|class| self.logits[class][at]).fold(f32::MIN, f32::max);
        out.fill(0.0);
        members().for_each(|class| out[class] = exp(self.logits[class][at] - largest));
        (largest, out.iter().sum())
    }

    /// Turns p into the gradient.
    fn gradient(&mut self, factors: &Factors) {
        let (classes, n) = (self.rows.len(), self.sets.len());
        // Sum of p g where the voxel is known not to be of any class, to be corrected for what it is.
        let mut means = vec![0.0; n];
        for (p, &outside) in self.rows.iter().zip(&factors.outside) {
            add_multiple(self.isa, p, outside as f32, &mut means);
        }
        let mut own = vec![(0.0, 0.0); n];
        let mut several = Vec::new();
        let mut tilts = means;
        for (at, set) in self.sets.iter().enumerate() {
            if let Some(class) = set.single().map(usize::from) {
                let step = factors.inside[class] - factors.outside[class];
                let weight = (factors.plain + factors.balanced[class]) as f32;
                let p = self.rows[class][at];
                own[at] = (weight, p * step as f32);
                tilts[at] = weight - tilts[at] - own[at].1;
            } else {
                several.push((at, self.of_several(factors, *set, at)));
            }
        }
        for (p, &outside) in self.rows.iter_mut().zip(&factors.outside) {
            tilt(self.isa, p, outside as f32, &tilts);
        }
        for (at, set) in self.sets.iter().enumerate() {
            if let Some(class) = set.single().map(usize::from) {
                self.rows[class][at] += own[at].1 - own[at].0;
            }
        }
        for (at, gradient) in several {
            (0..classes).for_each(|class| self.rows[class][at] = gradient[class]);
        }
    }

    /// Returns the gradient of a voxel that may be of several classes.
    fn of_several(&self, factors: &Factors, set: ClassSet, at: usize) -> Vec<f32> {
        let classes = self.rows.len();
        let mut q = vec![0.0; classes];
        let (_, part) = self.among(set, at, &mut q);
        let weight = if set.iter().count() < classes {
            factors.plain
        } else {
            0.0
        };
        let g = |class: usize| match set.contains(class as u8) {
            true => 0.0,
            false => factors.outside[class],
        };
        let p = |class: usize| f64::from(self.rows[class][at]);
        let mean: f64 = (0..classes).map(|class| p(class) * g(class)).sum();
        let gradient =
            |class: usize| weight * (p(class) - f64::from(q[class]) / f64::from(part)) + p(class) * (g(class) - mean);
        (0..classes).map(|class| gradient(class) as f32).collect()
    }
}

/// Returns the loss and its gradient with respect to the logits `[B, C, N]`; `sets` are the admissible classes of every
/// voxel, `[B, N]`, each with at least one member.
///
/// # Source
/// See `crate::nn::marginal_loss`. With w = d loss / d e and g = d loss / d p, the gradient of a logit is
/// w (p - q) + p (g - sum over the classes of p g).
pub fn marginal(
    isa: Isa,
    logits: &[f32],
    (sets, form): (&[ClassSet], &LossForm),
    [classes, voxels]: [usize; 2],
) -> (f32, Vec<f32>) {
    let starts: Vec<(usize, usize)> = (0..sets.len() / voxels)
        .flat_map(|sample| (0..voxels).step_by(BLOCK).map(move |start| (sample, start)))
        .collect();
    let mut gradient = from_zeros(logits.len(), voxels, |_, _| ());
    let shared = Shared::new(&mut gradient);
    let block = |(sample, start): (usize, usize)| {
        let length = BLOCK.min(voxels - start);
        let row = |class: usize| (sample * classes + class) * voxels + start;
        Block {
            isa,
            sets: &sets[sample * voxels + start..][..length],
            logits: (0..classes).map(|class| &logits[row(class)..][..length]).collect(),
            rows: (0..classes)
                // SAFETY: sample, class and start name one part, and each pass visits every start once.
                .map(|class| unsafe { shared.slice(row(class), length) })
                .collect(),
        }
    };
    let parts: Vec<Sums> = starts.par_iter().map(|start| block(*start).softmax()).collect();
    let of_samples: Vec<Sums> = (parts.chunks(voxels.div_ceil(BLOCK)))
        .map(|parts| parts.iter().fold(Sums::zero(classes), Sums::add))
        .collect();
    let (loss, factors) = Factors::new(&of_samples, form);
    starts
        .par_iter()
        .for_each(|start| block(*start).gradient(&factors[start.0]));
    (loss as f32, gradient)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_to_the_last_bits() {
        for i in 0..=87_000 {
            let x = -f64::from(i) / 1000.0;
            let (got, expected) = (f64::from(exp(x as f32)), f64::from(x as f32).exp());
            assert!((got / expected - 1.0).abs() < 3e-7, "{x}: {got} {expected}");
        }
        assert_eq!([exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan());
    }
}
