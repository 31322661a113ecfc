//! How often changes are found, and how often what is another scan: the table of `docs/ingest.md`.
//!
//! `cargo test --release --test near_duplicates -- --ignored --nocapture measure`

use freetumor::phantom::{PhantomSpec, cohort};
use freetumor::volume::{MIN_SCORE, Outline};
use rayon::prelude::*;

use super::changes::changes;
use super::{phantom, real};

/// Phantoms that are compared with each other, whole and their upper halves.
const OTHERS: usize = 600;
/// Phantoms that are changed.
const CHANGED: usize = 20;
/// Voxel sizes, in turn.
const SPACINGS_MM: [[f64; 3]; 4] = [[2.0, 2.0, 2.0], [3.0, 1.5, 1.5], [5.0, 1.5, 1.5], [1.5, 1.5, 1.5]];

/// Returns the Wilson score interval of a rate at 95 %.
fn wilson(found: usize, of: usize) -> [f64; 2] {
    let (n, z) = (of as f64, 1.959_964);
    let p = found as f64 / n;
    let centre = p + z * z / (2.0 * n);
    let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    [-1.0, 1.0].map(|sign| ((centre + sign * half) / (1.0 + z * z / n)).clamp(0.0, 1.0))
}

fn score(a: &Outline, b: &Outline) -> i32 {
    a.align(b).map_or(0, |found| found.score)
}

/// Scores of an original against each of its changes.
fn scores(of: &super::Scan) -> Vec<(&'static str, i32)> {
    let original = Outline::of(&of.fingerprint()).unwrap();
    let changes = changes(of).into_iter();
    changes
        .map(|change| {
            let changed = Outline::of(&change.scan.fingerprint());
            (change.name, changed.map_or(0, |changed| score(&original, &changed)))
        })
        .collect()
}

fn specs(seed: u64, count: usize) -> Vec<PhantomSpec> {
    let specs = cohort(seed, count / 2, count - count / 2).into_iter().enumerate();
    specs
        .map(|(number, spec)| PhantomSpec {
            spacing_mm: SPACINGS_MM[number % 4],
            ..spec
        })
        .collect()
}

#[test]
#[ignore = "measures, for minutes"]
fn measure() {
    let phantoms: Vec<_> = specs(101, CHANGED)
        .par_iter()
        .map(|spec| scores(&phantom(spec)))
        .collect();
    let names = ["totalsegmentator/example_ct.nii.gz", "crlm/crlm_ct_1006.nii.gz"];
    let reals: Vec<_> = names.iter().filter_map(|name| real(name)).collect();
    let real_scores: Vec<_> = reals.iter().map(scores).collect();
    for (kind, (name, _)) in phantoms[0].iter().enumerate() {
        let all: Vec<i32> = phantoms.iter().map(|scores| scores[kind].1).collect();
        let found = all.iter().filter(|score| **score >= i32::from(MIN_SCORE)).count();
        let [low, high] = wilson(found, all.len()).map(|rate| 100.0 * rate);
        let least = all.iter().min().unwrap();
        let of_real: Vec<i32> = real_scores.iter().map(|scores| scores[kind].1).collect();
        eprintln!(
            "| {name} | {found} of {} ({low:.0}-{high:.0} %) | {least} | {of_real:?} |",
            all.len()
        );
    }
    others();
    real_others(&reals);
}

/// Compares phantoms with each other: each pair is a trial.
fn others() {
    let outline = |spec: &PhantomSpec| {
        let whole = phantom(spec);
        let half = whole.part(0.5, 1.0);
        [whole, half].map(|scan| Outline::of(&scan.fingerprint()).unwrap())
    };
    let outlines: Vec<[Outline; 2]> = specs(3, OTHERS).par_iter().map(outline).collect();
    let start = std::time::Instant::now();
    let of_one = |n: usize| {
        let pairs = outlines[..n].iter().flat_map(|other| other.iter());
        let outlines = &outlines;
        pairs.flat_map(move |other| outlines[n].iter().map(move |own| score(own, other)))
    };
    let mut scores: Vec<i32> = (0..OTHERS).into_par_iter().flat_map_iter(of_one).collect();
    let micros = start.elapsed().as_secs_f64() * 1e6 / scores.len() as f64 * rayon::current_num_threads() as f64;
    scores.sort_unstable();
    let alarms = scores.iter().filter(|score| **score >= i32::from(MIN_SCORE)).count();
    let [low, high] = wilson(alarms, scores.len());
    let largest = &scores[scores.len() - 5..];
    eprintln!(
        "phantoms: {alarms} false alarms in {} pairs ({low:.1e} to {high:.1e}), largest {largest:?}, {micros:.1} us a pair",
        scores.len()
    );
}

/// Compares parts of two real CTs, each changed in every way.
fn real_others(reals: &[super::Scan]) {
    let [a, b] = reals else { return };
    let outlines = |scan: &super::Scan| -> Vec<Outline> {
        let parts = [(0.0, 0.5), (0.5, 1.0)];
        let parts = parts.map(|(from, to)| scan.part(from, to));
        let all = parts
            .iter()
            .flat_map(|part| changes(part).into_iter().map(|change| change.scan));
        all.filter_map(|scan| Outline::of(&scan.fingerprint())).collect()
    };
    let (of_a, of_b) = (outlines(a), outlines(b));
    let mut scores: Vec<i32> = of_a
        .iter()
        .flat_map(|a| of_b.iter().map(move |b| score(a, b)))
        .collect();
    scores.sort_unstable();
    let alarms = scores.iter().filter(|score| **score >= i32::from(MIN_SCORE)).count();
    eprintln!(
        "real CTs: {alarms} false alarms in {} pairs of parts, largest {:?}",
        scores.len(),
        scores.last()
    );
}
