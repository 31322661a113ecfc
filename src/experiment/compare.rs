//! How much better one arm is than another: paired over seeds and cases, with a hierarchical bootstrap interval.

use serde::Serialize;

use crate::rng::{Purpose, Rng};

/// Fewer seeds say too little of how much seeds differ for an interval.
const MIN_SEEDS: usize = 3;
/// How often seeds and cases are drawn anew.
const RESAMPLES: u64 = 5000;
/// The shares of the resamples below the interval's ends.
const ENDS: [f64; 2] = [0.025, 0.975];

/// A paired difference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairedDifference {
    /// Mean over seeds and cases of the first arm's value less the second's.
    pub difference: f64,
    /// 95 % percentile interval: seeds are drawn with replacement, then cases, the same ones for every drawn seed. Absent below
    /// three seeds; with five, where seeds differ more than cases do, it covers the truth in about 85 % of experiments.
    pub interval: Option<[f64; 2]>,
    /// Mean over the cases, for each seed.
    pub of_each_seed: Vec<f64>,
    /// Seeds that both arms have.
    pub seeds: usize,
    /// Test cases.
    pub cases: usize,
}

/// Compares two arms, each with a value per seed and case, in the same order; nothing where one has none.
///
/// Seeds and cases are crossed (every seed's model sees the same cases), so both are drawn once per resample.
///
/// # Panics
/// When two rows have different lengths.
pub fn paired_difference(first: &[Vec<f64>], second: &[Vec<f64>]) -> Option<PairedDifference> {
    let (seeds, cases) = (first.len().min(second.len()), first.first()?.len());
    if seeds == 0 || cases == 0 {
        return None;
    }
    let difference = |seed: usize, case: usize| first[seed][case] - second[seed][case];
    assert!(
        (0..seeds).all(|seed| first[seed].len() == cases && second[seed].len() == cases),
        "every seed's model was tested on the same cases"
    );
    let over = |seeds: &[usize], cases: &[usize]| {
        let sum: f64 = seeds
            .iter()
            .flat_map(|seed| cases.iter().map(|case| difference(*seed, *case)))
            .sum();
        sum / (seeds.len() * cases.len()) as f64
    };
    let mut resamples: Vec<f64> = (0..RESAMPLES)
        .map(|resample| {
            let mut rng = Rng::keyed(0, resample, 0, Purpose::Bootstrap);
            let drawn_seeds: Vec<usize> = (0..seeds).map(|_| rng.below(seeds)).collect();
            let drawn_cases: Vec<usize> = (0..cases).map(|_| rng.below(cases)).collect();
            over(&drawn_seeds, &drawn_cases)
        })
        .collect();
    resamples.sort_by(f64::total_cmp);
    let all: [Vec<usize>; 2] = [(0..seeds).collect(), (0..cases).collect()];
    let end = |share: f64| resamples[(share * (RESAMPLES - 1) as f64).round() as usize];
    Some(PairedDifference {
        difference: over(&all[0], &all[1]),
        interval: (seeds >= MIN_SEEDS).then(|| ENDS.map(end)),
        of_each_seed: (0..seeds).map(|seed| over(&[seed], &all[1])).collect(),
        seeds,
        cases,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_difference_has_a_point_for_an_interval() {
        let second = vec![vec![0.2, 0.4, 0.6], vec![0.1, 0.3, 0.5], vec![0.0, 0.1, 0.2]];
        let first: Vec<Vec<f64>> = second
            .iter()
            .map(|row| row.iter().map(|v| v + 0.25).collect())
            .collect();
        let found = paired_difference(&first, &second).unwrap();
        assert!((found.difference - 0.25).abs() < 1e-12);
        let ends = found.interval.unwrap();
        assert!(
            ends.iter()
                .chain(&found.of_each_seed)
                .all(|value| (value - 0.25).abs() < 1e-12)
        );
        assert_eq!((found.seeds, found.cases), (3, 3));
        assert_eq!(paired_difference(&first[..2], &second).unwrap().interval, None);
        assert_eq!(paired_difference(&[], &second), None);
    }

    /// Differences of a seed's and a case's own part: the mean's variance is known, and the interval shows it.
    #[test]
    fn the_interval_is_as_wide_as_seeds_and_cases_make_it() {
        let (seeds, cases) = (40, 60);
        let mut rng = Rng::keyed(5, 0, 0, Purpose::Test);
        let of_seed: Vec<f64> = (0..seeds).map(|_| 0.3 * rng.normal()).collect();
        let of_case: Vec<f64> = (0..cases).map(|_| 0.2 * rng.normal()).collect();
        let first: Vec<Vec<f64>> = of_seed
            .iter()
            .map(|s| of_case.iter().map(|c| s + c).collect())
            .collect();
        let second = vec![vec![0.0; cases]; seeds];
        let found = paired_difference(&first, &second).unwrap();
        let variance = |values: &[f64]| {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64
        };
        let deviation = (variance(&of_seed) / seeds as f64 + variance(&of_case) / cases as f64).sqrt();
        let [low, high] = found.interval.unwrap();
        let width = high - low;
        // 5000 resamples put the ends of a normal interval within some percent of 1.96 deviations.
        assert!(
            (width / (2.0 * 1.96 * deviation) - 1.0).abs() < 0.08,
            "{width} against {deviation}"
        );
    }
}
