//! Holds the measures to MONAI, nnU-Net's evaluator, surface-distance and panoptica on random masks, empty ones included.
//!
//! `tests/golden/evaluate/make.py` wrote what they say.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use base64::Engine;
use freetumor::evaluate::{Overlap, SurfaceDistances, lesion_level};
use freetumor::volume::SizeClass;
use ndarray::{Array3, Zip};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    masks: Vec<Masks>,
    lesions: Vec<Lesions>,
}

/// Two masks, their bits packed from the lowest.
#[derive(Deserialize)]
struct Pair {
    shape: [usize; 3],
    spacing_mm: [f64; 3],
    truth: String,
    prediction: String,
}

#[derive(Deserialize)]
struct Masks {
    #[serde(flatten)]
    pair: Pair,
    dice: Option<f64>,
    tp: u64,
    fp: u64,
    #[serde(rename = "fn")]
    missed: u64,
    tolerances_mm: Vec<f64>,
    nsd: Vec<Option<f64>>,
    hd_mm: std::collections::BTreeMap<String, Option<f64>>,
}

#[derive(Deserialize)]
struct Lesions {
    #[serde(flatten)]
    pair: Pair,
    panoptica: Option<Panoptica>,
    truths_by_class: [u32; 4],
    predictions_by_class: [u32; 4],
    touched: u32,
    false_alarms: u32,
    merges: u32,
    splits: u32,
}

#[derive(Deserialize)]
struct Panoptica {
    tp: u32,
    fp: u32,
    #[serde(rename = "fn")]
    missed: u32,
    f1: Option<f64>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/evaluate/metrics.json")).unwrap()
}

impl Pair {
    fn masks(&self) -> [Array3<bool>; 2] {
        [&self.prediction, &self.truth].map(|packed| {
            let bytes = base64::engine::general_purpose::STANDARD.decode(packed).unwrap();
            let voxels = self.shape.iter().product();
            let bits = (0..voxels).map(|n| bytes[n / 8] >> (n % 8) & 1 == 1).collect();
            Array3::from_shape_vec(self.shape, bits).unwrap()
        })
    }
}

#[track_caller]
fn assert_close(got: Option<f64>, expected: Option<f64>, tolerance: f64, what: &str) {
    match (got, expected) {
        (None, None) => {}
        (Some(a), Some(b)) if (a - b).abs() <= tolerance => {}
        _ => panic!("{what}: {got:?}, expected {expected:?}"),
    }
}

#[test]
fn dice_is_that_of_monai_and_nnunet() {
    let mut undefined = 0;
    for (n, case) in golden().masks.iter().enumerate() {
        let [prediction, truth] = case.pair.masks();
        let mut found = Overlap::default();
        Zip::from(&prediction).and(&truth).for_each(|p, t| {
            found.both += u64::from(*p && *t);
            found.predicted += u64::from(*p);
            found.truth += u64::from(*t);
        });
        let expected = Overlap {
            both: case.tp,
            predicted: case.tp + case.fp,
            truth: case.tp + case.missed,
        };
        assert_eq!(found, expected, "{n}");
        // One division of integers in f64 on either side.
        assert_close(found.dice(), case.dice, 1e-15, &format!("{n}"));
        undefined += u32::from(case.dice.is_none());
    }
    assert_eq!(undefined, 1, "both empty");
}

#[test]
fn surface_dice_and_hausdorff_are_those_of_surface_distance() {
    let (mut zero, mut undefined) = (0, 0);
    for (n, case) in golden().masks.iter().enumerate() {
        let [prediction, truth] = case.pair.masks();
        let surfaces = SurfaceDistances::between(prediction.view(), truth.view(), case.pair.spacing_mm);
        for (tolerance_mm, expected) in case.tolerances_mm.iter().zip(&case.nsd) {
            // Sums of thousands of f64 areas in another order.
            assert_close(
                surfaces.dice_at(*tolerance_mm),
                *expected,
                1e-12,
                &format!("{n} at {tolerance_mm} mm"),
            );
            zero += u32::from(*expected == Some(0.0));
        }
        for (percent, expected) in &case.hd_mm {
            let share = percent.parse::<f64>().unwrap() / 100.0;
            // The square root of a sum of three f64 in another order.
            assert_close(
                surfaces.robust_hausdorff_mm(share),
                *expected,
                1e-9,
                &format!("{n} HD{percent}"),
            );
            undefined += u32::from(expected.is_none());
        }
    }
    // Both empty and one of two empty: three pairs at three percentiles.
    assert_eq!(undefined, 9);
    assert!(zero >= 14, "{zero}");
}

#[test]
fn lesions_are_those_of_panoptica_and_scipy() {
    let mut matched = 0;
    for (n, case) in golden().lesions.iter().enumerate() {
        let [prediction, truth] = case.pair.masks();
        let score = lesion_level(prediction.view(), truth.view(), case.pair.spacing_mm);
        let all = score.all();
        if let Some(expected) = &case.panoptica {
            assert_eq!(
                (all.matched, all.false_positives, all.truths - all.matched),
                (expected.tp, expected.fp, expected.missed),
                "{n}"
            );
            let both = all.truths > 0 && all.predictions > 0;
            assert_close(
                all.f1().filter(|_| both),
                expected.f1.filter(|_| both),
                1e-12,
                &format!("{n}"),
            );
            matched += all.matched;
        }
        for (class, size) in SizeClass::ALL.into_iter().enumerate() {
            let counts = score.by_size.get(&size).copied().unwrap_or_default();
            let expected = (case.truths_by_class[class], case.predictions_by_class[class]);
            assert_eq!((counts.truths, counts.predictions), expected, "{n} {size:?}");
        }
        assert_eq!((all.touched, all.alone), (case.touched, case.false_alarms), "{n}");
        assert_eq!((score.merges, score.splits), (case.merges, case.splits), "{n}");
    }
    assert!(matched > 30, "{matched}");
}
