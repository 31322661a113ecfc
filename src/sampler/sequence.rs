//! Low-discrepancy sequences: which of several choices the n-th draw takes, so that shares hold in every stretch.

/// The longest period, in draws: shares are kept to 1/1000.
const LONGEST_PERIOD: u32 = 1000;

/// Choices in an order in which every prefix is as near to the shares as whole numbers allow.
///
/// # Source
/// Smooth weighted round robin: every draw credits each choice its weight and takes the richest, which pays the total.
#[derive(Clone, Debug)]
pub struct Sequence<T> {
    choices: Vec<T>,
    /// The choice at each position of a period.
    order: Vec<usize>,
    /// How often the choice of a position appears before it in the period.
    before: Vec<u64>,
    /// How often each choice appears in a period.
    weights: Vec<u32>,
    /// How often each choice appears before the offset.
    skipped: Vec<u64>,
    offset: u64,
}

impl<T: Copy> Sequence<T> {
    /// Makes the sequence of the choices with a share above 0; nothing where there is none. It starts `offset` draws
    /// into its period, so that sequences that are read together do not run in step.
    pub fn new(shares: &[(T, f64)], offset: u64) -> Option<Self> {
        let shares: Vec<(T, f64)> = shares.iter().copied().filter(|(_, share)| *share > 0.0).collect();
        if shares.is_empty() {
            return None;
        }
        let weights = whole_weights(&shares.iter().map(|(_, share)| *share).collect::<Vec<_>>());
        let order = smooth_order(&weights);
        let mut counts = vec![0; weights.len()];
        let mut before = Vec::with_capacity(order.len());
        let offset = offset % order.len() as u64;
        let mut skipped = counts.clone();
        for (position, choice) in order.iter().enumerate() {
            if position as u64 == offset {
                skipped.clone_from(&counts);
            }
            before.push(counts[*choice]);
            counts[*choice] += 1;
        }
        Some(Self {
            choices: shares.into_iter().map(|(choice, _)| choice).collect(),
            order,
            before,
            weights,
            skipped,
            offset,
        })
    }

    /// Returns the choice of draw `n` and how many earlier draws took it.
    pub fn at(&self, n: u64) -> (T, u64) {
        let (position, period) = (n + self.offset, self.order.len() as u64);
        let in_period = (position % period) as usize;
        let choice = self.order[in_period];
        let before = position / period * u64::from(self.weights[choice]) + self.before[in_period];
        (self.choices[choice], before - self.skipped[choice])
    }

    /// Returns the choices that are ever taken.
    pub fn choices(&self) -> &[T] {
        &self.choices
    }
}

/// Returns whole weights in the ratio of the shares, with the smallest sum up to 1000 that keeps it exactly; where none
/// does, 1000 is divided by largest remainders and every share gets at least 1.
fn whole_weights(shares: &[f64]) -> Vec<u32> {
    let total: f64 = shares.iter().sum();
    let least = shares.len() as u32;
    for period in least..=LONGEST_PERIOD {
        let scaled = shares.iter().map(|share| share / total * f64::from(period));
        if scaled
            .clone()
            .all(|value| (value - value.round()).abs() < 1e-6 && value.round() >= 1.0)
        {
            return scaled.map(|value| value.round() as u32).collect();
        }
    }
    let scaled: Vec<f64> = shares
        .iter()
        .map(|share| share / total * f64::from(LONGEST_PERIOD))
        .collect();
    let mut weights: Vec<u32> = scaled.iter().map(|value| (value.floor() as u32).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..shares.len()).collect();
    by_remainder.sort_by(|a, b| scaled[*b].fract().total_cmp(&scaled[*a].fract()).then(a.cmp(b)));
    let missing = LONGEST_PERIOD.saturating_sub(weights.iter().sum()) as usize;
    by_remainder.iter().take(missing).for_each(|i| weights[*i] += 1);
    weights
}

fn smooth_order(weights: &[u32]) -> Vec<usize> {
    let total: i64 = weights.iter().map(|weight| i64::from(*weight)).sum();
    let mut credit = vec![0i64; weights.len()];
    (0..total)
        .map(|_| {
            credit
                .iter_mut()
                .zip(weights)
                .for_each(|(c, weight)| *c += i64::from(*weight));
            // The first of equals, so that the order does not depend on the library's `max`.
            let richest = (1..credit.len()).fold(0, |best, i| if credit[i] > credit[best] { i } else { best });
            credit[richest] -= total;
            richest
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_is_near_its_shares() {
        let shares = [('a', 0.25), ('b', 0.35), ('c', 0.35), ('d', 0.05), ('e', 0.0)];
        for offset in [0, 7, 19, 1003] {
            let sequence = Sequence::new(&shares, offset).unwrap();
            assert_eq!(sequence.order.len(), 20);
            let mut counts = std::collections::BTreeMap::new();
            for n in 0..400 {
                let (choice, before) = sequence.at(n);
                let count = counts.entry(choice).or_insert(0u64);
                assert_eq!(before, *count, "draw {n}");
                *count += 1;
                for (choice, share) in &shares[..4] {
                    let got = counts.get(choice).copied().unwrap_or(0) as f64;
                    assert!((got - share * (n + 1) as f64).abs() < 2.0, "{choice} after {n}");
                }
            }
            assert_eq!(counts[&'b'], 140);
        }
    }

    #[test]
    fn shares_without_a_common_measure_are_kept_to_a_thousandth() {
        let weights = whole_weights(&[1.0, std::f64::consts::PI, 1e-9]);
        assert_eq!(weights.iter().sum::<u32>(), 1000);
        assert!(weights[2] == 1 && weights[1].abs_diff(758) <= 1, "{weights:?}");
        assert!(Sequence::<u8>::new(&[(1, 0.0)], 0).is_none());
    }
}
