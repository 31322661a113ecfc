//! Counter-based random numbers: every draw is a function of (seed, index, attempt, purpose) and nothing else.
//!
//! The four numbers are the key of a ChaCha8 stream, whose output is specified and portable; no state is shared between
//! patches, attempts or purposes, so the order in which threads ask never changes what they get (promise P1).
//! Distributions are our own few lines because those of `rand` may change between releases; transcendental functions
//! come from `libm`, whose results do not depend on the platform.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng};

/// What random numbers are drawn for. Values are part of the bytes we promise: never renumber, only add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Order of the cases in a pool.
    Pool = 1,
    /// Where a patch is cut out.
    Crop = 2,
    /// A lesion's form.
    Shape = 3,
    /// A lesion's place.
    Place = 4,
    /// A lesion's contrast.
    Contrast = 5,
    /// The noise field given to a generator, or an analytic texture.
    Noise = 6,
    /// Flips, rotations and intensity changes.
    Augment = 7,
    /// Initial weights of networks.
    Weights = 8,
    /// Anatomy of the phantom.
    Phantom = 9,
    /// Tumours of the phantom.
    PhantomTumour = 10,
    /// Noise of the phantom's scanners.
    Scanner = 11,
    /// Folds and splits.
    Split = 12,
    /// Choices of a training loop.
    Training = 13,
    /// Tests.
    Test = 14,
    /// Rotations, zooms and elastic deformations.
    Warp = 15,
    /// Resamples of patients for a score's interval.
    Bootstrap = 16,
    /// The piece of texture that the published synthesizer takes.
    Texture = 17,
    /// Benign nodules of the phantom.
    PhantomNodule = 18,
}

/// A stream of random numbers under one key.
#[derive(Clone, Debug)]
pub struct Rng {
    stream: ChaCha8Rng,
}

impl Rng {
    /// Opens the stream of (seed, index, attempt, purpose).
    pub fn keyed(seed: u64, index: u64, attempt: u64, purpose: Purpose) -> Self {
        let mut key = [0; 32];
        for (slot, word) in key.chunks_exact_mut(8).zip([seed, index, attempt, purpose as u64]) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        Self {
            stream: ChaCha8Rng::from_seed(key),
        }
    }

    /// Draws 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.stream.next_u64()
    }

    /// Draws uniformly from [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Draws uniformly from [low, high).
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Draws uniformly from 0..n without bias.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "a draw from an empty range");
        // Lemire's multiplication method; the rejection makes it exact.
        let n = n as u64;
        loop {
            let product = u128::from(self.bits()) * u128::from(n);
            if (product as u64) >= n.wrapping_neg() % n {
                return (product >> 64) as usize;
            }
        }
    }

    /// Tells true with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    /// Draws from the standard normal distribution (Box-Muller, one of the pair).
    pub fn normal(&mut self) -> f64 {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
        radius * libm::cos(std::f64::consts::TAU * self.uniform())
    }

    /// Returns `n` standard normal values in single precision.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(n + 1);
        while values.len() < n {
            let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
            let (sine, cosine) = libm::sincos(std::f64::consts::TAU * self.uniform());
            values.extend([(radius * cosine) as f32, (radius * sine) as f32]);
        }
        values.truncate(n);
        values
    }

    /// Puts the items in random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// Draws an index with probability proportional to its weight; nothing where all weights are 0.
    pub fn weighted(&mut self, weights: &[f64]) -> Option<usize> {
        let total: f64 = weights.iter().sum();
        let mut left = self.uniform() * total;
        let last = weights.iter().rposition(|weight| *weight > 0.0)?;
        for (i, weight) in weights.iter().enumerate() {
            left -= weight;
            if left < 0.0 && *weight > 0.0 {
                return Some(i);
            }
        }
        Some(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_independent_and_repeat() {
        let draw = |seed, index, attempt, purpose| Rng::keyed(seed, index, attempt, purpose).bits();
        let base = draw(1, 2, 3, Purpose::Shape);
        assert_eq!(base, draw(1, 2, 3, Purpose::Shape));
        let others = [
            draw(2, 2, 3, Purpose::Shape),
            draw(1, 3, 3, Purpose::Shape),
            draw(1, 2, 4, Purpose::Shape),
        ];
        assert!(!others.contains(&base) && base != draw(1, 2, 3, Purpose::Place));
    }

    #[test]
    fn the_stream_never_changes() {
        // Golden: the first draw of key (0, 0, 0, Test). A change here changes every patch ever streamed.
        assert_eq!(Rng::keyed(0, 0, 0, Purpose::Test).bits(), 3_080_293_928_316_750_974);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut rng = Rng::keyed(7, 0, 0, Purpose::Test);
        let n = 40_000;
        let values = rng.normals(n);
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
        let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
        // Four standard errors: 1 / sqrt(n) and sqrt(2 / n).
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let mut counts = [0; 3];
        (0..9000).for_each(|_| counts[rng.below(3)] += 1);
        assert!(counts.iter().all(|count| (2800..3200).contains(count)), "{counts:?}");
        assert_eq!(rng.weighted(&[0.0, 0.0]), None);
        assert_eq!(rng.weighted(&[0.0, 2.0]), Some(1));
    }
}
