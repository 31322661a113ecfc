//! Marginal cross-entropy plus marginal Dice of a batch of logits, and its gradient, in two passes over the voxels.
//!
//! Legend, per voxel: z its logits, A the set of its admissible classes, p = softmax(z), q = softmax(z) among A alone
//! and 0 elsewhere, e = log sum exp(z) - log sum over A of exp(z) the cross-entropy. `crate::nn::marginal_loss` has the
//! definition of the sums. Sums are `f64`, first within blocks of a fixed number of voxels, then block after block: their
//! order depends on the shape alone.

use rayon::prelude::*;

use crate::volume::ClassSet;

/// Voxels whose sums are made by one thread.
const BLOCK: usize = 4096;
/// Added above and below the bar of Dice.
pub const DICE_EPSILON: f64 = 1e-5;

/// What the whole batch sums to.
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
    /// Returns the loss and the factors of its gradient.
    fn new(sums: &Sums) -> (f64, Self) {
        let held = sums.size.iter().filter(|size| **size > 0.0).count().max(1) as f64;
        let informed = sums.informed.max(1.0);
        let classes = sums.size.len();
        let mut loss = 0.5 * sums.entropy / informed;
        let mut factors = Self {
            plain: 0.5 / informed,
            balanced: vec![0.0; classes],
            inside: vec![0.0; classes],
            outside: vec![0.0; classes],
        };
        for class in (0..classes).filter(|class| sums.size[*class] > 0.0) {
            let above = 2.0 * sums.overlap[class] + DICE_EPSILON;
            let below = sums.chance[class] + sums.size[class] + DICE_EPSILON;
            loss += (0.5 * sums.of_class[class] / sums.size[class] + 1.0 - above / below) / held;
            factors.balanced[class] = 0.5 / (sums.size[class] * held);
            factors.outside[class] = above / (below * below * held);
            factors.inside[class] = factors.outside[class] - 2.0 / (below * held);
        }
        (loss, factors)
    }
}

/// The logits of one voxel among those of its sample, `[C, N]`.
struct Voxel<'a> {
    logits: &'a [f32],
    voxels: usize,
    at: usize,
}

impl Voxel<'_> {
    fn logit(&self, class: usize) -> f32 {
        self.logits[class * self.voxels + self.at]
    }

    /// Writes exp(z - m) of the classes chosen, 0 of the others; returns m, their largest z, and the sum.
    fn exponentials(&self, chosen: impl Fn(usize) -> bool, out: &mut [f32]) -> (f32, f32) {
        let classes = (0..out.len()).filter(|class| chosen(*class));
        let largest = classes.map(|class| self.logit(class)).fold(f32::MIN, f32::max);
        let mut sum = 0.0;
        for (class, out) in out.iter_mut().enumerate() {
            *out = if chosen(class) {
                libm::expf(self.logit(class) - largest)
            } else {
                0.0
            };
            sum += *out;
        }
        (largest, sum)
    }
}

/// Returns e, and writes p and q.
fn chances(voxel: &Voxel, set: ClassSet, p: &mut [f32], q: &mut [f32]) -> f32 {
    let (largest, sum) = voxel.exponentials(|_| true, p);
    p.iter_mut().for_each(|p| *p /= sum);
    let (shift, part) = match set.single() {
        Some(class) => {
            q.fill(0.0);
            q[usize::from(class)] = 1.0;
            (voxel.logit(usize::from(class)), 1.0)
        }
        None => {
            let (shift, part) = voxel.exponentials(|class| set.contains(class as u8), q);
            q.iter_mut().for_each(|q| *q /= part);
            (shift, part)
        }
    };
    (largest - shift) + (libm::logf(sum) - libm::logf(part))
}

/// Returns the loss and its gradient with respect to the logits `[B, C, N]`; `sets` are the admissible classes of every
/// voxel, `[B, N]`, each with at least one member.
///
/// # Source
/// See `crate::nn::marginal_loss`. With w = d loss / d e and g = d loss / d p, the gradient of a logit is
/// w (p - q) + p (g - sum over the classes of p g).
pub fn marginal(logits: &[f32], sets: &[ClassSet], classes: usize, voxels: usize) -> (f32, Vec<f32>) {
    let all = ClassSet((1 << classes) - 1);
    let blocks_of = |sample: usize| (0..voxels).step_by(BLOCK).map(move |start| (sample, start));
    let blocks: Vec<(usize, usize)> = (0..sets.len() / voxels).flat_map(blocks_of).collect();
    // Calls `f` with every voxel of a block: its position in the block, set, e, p and q.
    let visit = |(sample, start): (usize, usize), f: &mut dyn FnMut(usize, ClassSet, f32, &[f32], &[f32])| {
        let (mut p, mut q) = (vec![0.0; classes], vec![0.0; classes]);
        let own = &logits[sample * classes * voxels..][..classes * voxels];
        for at in start..(start + BLOCK).min(voxels) {
            let set = sets[sample * voxels + at];
            let voxel = Voxel {
                logits: own,
                voxels,
                at,
            };
            let entropy = chances(&voxel, set, &mut p, &mut q);
            f(at - start, set, entropy, &p, &q);
        }
    };
    let of_block = |block: &(usize, usize)| {
        let mut sums = Sums::zero(classes);
        visit(*block, &mut |_, set, entropy, p, _| {
            if set != all {
                sums.entropy += f64::from(entropy);
                sums.informed += 1.0;
            }
            if let Some(class) = set.single().map(usize::from) {
                sums.overlap[class] += f64::from(p[class]);
                sums.size[class] += 1.0;
                sums.of_class[class] += f64::from(entropy);
                p.iter()
                    .zip(&mut sums.chance)
                    .for_each(|(p, sum)| *sum += f64::from(*p));
            } else {
                for class in (0..classes).filter(|class| !set.contains(*class as u8)) {
                    sums.chance[class] += f64::from(p[class]);
                }
            }
        });
        sums
    };
    let parts: Vec<Sums> = blocks.par_iter().map(of_block).collect();
    let sums = parts.iter().fold(Sums::zero(classes), Sums::add);
    let (loss, factors) = Factors::new(&sums);

    let gradient_of_block = |block: &(usize, usize)| {
        let length = BLOCK.min(voxels - block.1);
        let mut out = vec![0.0_f32; classes * length];
        let mut g = vec![0.0; classes];
        visit(*block, &mut |at, set, _, p, q| {
            let single = set.single().map(usize::from);
            let weight = if set == all { 0.0 } else { factors.plain } + single.map_or(0.0, |c| factors.balanced[c]);
            let mut mean = 0.0;
            for (class, g) in g.iter_mut().enumerate() {
                *g = match single {
                    Some(own) if own == class => factors.inside[class],
                    _ if set.contains(class as u8) => 0.0,
                    _ => factors.outside[class],
                };
                mean += *g * f64::from(p[class]);
            }
            for class in 0..classes {
                let (p, q) = (f64::from(p[class]), f64::from(q[class]));
                out[class * length + at] = (weight * (p - q) + p * (g[class] - mean)) as f32;
            }
        });
        out
    };
    let parts: Vec<Vec<f32>> = blocks.par_iter().map(gradient_of_block).collect();
    let mut gradient = vec![0.0; logits.len()];
    for ((sample, start), part) in blocks.into_iter().zip(parts) {
        for (class, row) in part.chunks_exact(part.len() / classes).enumerate() {
            gradient[(sample * classes + class) * voxels + start..][..row.len()].copy_from_slice(row);
        }
    }
    (loss as f32, gradient)
}
