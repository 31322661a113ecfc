//! The gate's thresholds, and the level from which tissue is suspect, from the critic's scores on real lesions it was not trained on.

use burn::tensor::Device;
use ndarray::{Array3, Array4, Axis, Zip};

use super::LearnError;
use super::augment::Look;
use super::cubes::{Catalogue, lesion_of, read_cube, side_of};
use crate::checkpoint::{Calibration, CalibrationEntry, Thresholds};
use crate::evaluate::{argmax, forward};
use crate::nn::VoxelClassifier;
use crate::synth::gate::{Judged, scores};
use crate::volume::{ContrastBin, SizeClass};

/// A bin of fewer lesions is pooled with its neighbours: no score of theirs is one that nine in ten lesions reach.
pub(super) const LEAST_LESIONS: usize = 9;
/// The largest share of real lesions that each of the gate's two scores is to refuse: a fifth together.
const REFUSED_BY_EACH: f64 = 0.1;
/// The largest share of real lesions that are to be less probable than the level of suspicion. A hidden tumour that is called healthy costs
/// more than healthy tissue that is left out.
const UNSUSPECTED: f64 = 0.1;

/// The scores of one real lesion.
#[derive(Clone, Debug)]
pub(super) struct RealScore {
    pub organ: String,
    pub size: SizeClass,
    pub contrast: ContrastBin,
    pub recall: f64,
    pub precision: f64,
    /// The greatest probability that at least half of the lesion's voxels have of being its organ's tumour.
    pub probable: f64,
}

/// Scores every real lesion of a catalogue in its cube, as a synthesized one is scored. Nothing was there "before":
/// the real lesion was never painted, so all that the critic calls tumour counts. `go_on` is asked before each.
pub(super) fn judge_real(
    (critic, device): (&dyn VoxelClassifier, &Device),
    catalogue: &Catalogue,
    max_cube: usize,
    go_on: impl Fn() -> Result<(), LearnError>,
) -> Result<Vec<RealScore>, LearnError> {
    let plan = catalogue.cases.plan();
    let mut out = Vec::new();
    for (case, organ, tumour) in catalogue.all_tumours() {
        go_on()?;
        let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
        let side = side_of(size, max_cube);
        let cube = read_cube(catalogue.cases, case, tumour.centre, side, &Look::none())?;
        let image = cube.image.mapv(|hu| plan.window_hu.normalise(hu as i16));
        let logits = forward(critic, &image, device);
        let after = argmax(&logits);
        let lesion = lesion_of(&cube, tumour.id);
        if lesion.iter().all(|inside| *inside == 0) {
            continue;
        }
        let any = |id: u8| catalogue.organs.iter().any(|organ| organ.tumour_id == id);
        let mut others = cube.labels.mapv(|id| u8::from(any(id)));
        Zip::from(&mut others)
            .and(&lesion)
            .for_each(|other, lesion| *other -= lesion);
        let score = scores(&Judged {
            before: &Array3::zeros(after.dim()),
            after: &after,
            lesion: &lesion,
            others: &others,
            tumour_id: tumour.id,
            spacing_mm: catalogue.record(case).grid.spacing_mm(),
            radius_mm: f64::from(tumour.diameter_mm) / 2.0,
        });
        out.push(RealScore {
            organ: catalogue.organs[organ].name.clone(),
            size,
            contrast: ContrastBin::of_contrast(f64::from(tumour.contrast_hu)),
            recall: score.recall,
            precision: score.precision,
            probable: probable(&logits, &lesion, tumour.id),
        });
    }
    Ok(out)
}

/// Returns the greatest probability of a class that at least half of a lesion's voxels have.
fn probable(logits: &Array4<f32>, lesion: &Array3<u8>, id: u8) -> f64 {
    let mut inside = Vec::new();
    Zip::from(logits.lanes(Axis(0))).and(lesion).for_each(|logits, lesion| {
        if *lesion != 0 {
            let own = logits[usize::from(id)];
            // Relative to the class's own logit: where another one is far above, the sum is infinite and the probability 0.
            inside.push(
                1.0 / logits
                    .iter()
                    .map(|logit| libm::exp(f64::from(logit - own)))
                    .sum::<f64>(),
            );
        }
    });
    inside.sort_by(f64::total_cmp);
    inside[inside.len() / 2]
}

/// Returns the thresholds per bin, from organ, size and contrast to everything; bins of few lesions are left to the next wider one.
pub(super) fn calibrate(scores: &[RealScore]) -> Calibration {
    let mut organs: Vec<&str> = scores.iter().map(|score| score.organ.as_str()).collect();
    organs.sort_unstable();
    organs.dedup();
    let mut keys = Vec::new();
    for &organ in &organs {
        for size in SizeClass::ALL {
            keys.extend(ContrastBin::ALL.map(|contrast| (Some(organ), Some(size), Some(contrast))));
        }
    }
    for &organ in &organs {
        keys.extend(SizeClass::ALL.map(|size| (Some(organ), Some(size), None)));
    }
    keys.extend(organs.iter().map(|organ| (Some(*organ), None, None)));
    keys.push((None, None, None));
    let entries = keys.into_iter().filter_map(|(organ, size, contrast)| {
        let fits = |score: &&RealScore| {
            organ.is_none_or(|organ| organ == score.organ)
                && size.is_none_or(|size| size == score.size)
                && contrast.is_none_or(|contrast| contrast == score.contrast)
        };
        let fitting: Vec<&RealScore> = scores.iter().filter(fits).collect();
        let least = if organ.is_some() { LEAST_LESIONS } else { 1 };
        (fitting.len() >= least).then(|| CalibrationEntry {
            organ: organ.map(Into::into),
            size,
            contrast,
            lesions: fitting.len(),
            thresholds: Thresholds {
                recall: reached(REFUSED_BY_EACH, fitting.iter().map(|score| score.recall)),
                precision: reached(REFUSED_BY_EACH, fitting.iter().map(|score| score.precision)),
            },
        })
    });
    let level = |organ: &&str| {
        let own = scores.iter().filter(|score| score.organ == *organ);
        (
            (*organ).to_string(),
            reached(UNSUSPECTED, own.map(|score| score.probable)),
        )
    };
    Calibration {
        entries: entries.collect(),
        suspect_from: Some(organs.iter().map(level).collect()),
    }
}

/// Returns the score that a new real lesion misses in at most a share of all cases: of n scores the k-th smallest, where
/// k = floor(share (n + 1)), as in split conformal prediction (Vovk et al., Algorithmic Learning in a Random World, 2005). Of too few
/// scores none is such a bound: every lesion reaches 0.
fn reached(share: f64, scores: impl Iterator<Item = f64>) -> f64 {
    let mut scores: Vec<f64> = scores.collect();
    scores.sort_by(f64::total_cmp);
    // 0.1 of 30 are 3, though the product of doubles might be a little less.
    let rank = libm::floor(share * (scores.len() + 1) as f64 + 1e-9) as usize;
    rank.checked_sub(1).map_or(0.0, |place| scores[place])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(organ: &str, size: SizeClass, recall: f64) -> RealScore {
        RealScore {
            organ: organ.into(),
            size,
            contrast: ContrastBin::Dim,
            recall,
            precision: 1.0,
            probable: recall,
        }
    }

    #[test]
    fn few_lesions_are_pooled_upwards() {
        let mut scores: Vec<_> = (0..11)
            .map(|i| score("liver", SizeClass::Small, 0.3 + f64::from(i) / 100.0))
            .collect();
        scores.extend((0..8).map(|i| score("liver", SizeClass::Tiny, 0.21 + f64::from(i) / 100.0)));
        scores.push(score("kidney", SizeClass::Tiny, 0.9));
        let calibration = calibrate(&scores);
        let recall = |organ: &str, size| calibration.thresholds(organ, size, ContrastBin::Dim).unwrap().recall;
        // The least of eleven.
        assert_eq!(recall("liver", SizeClass::Small), 0.3);
        // Eight tiny liver lesions: the least of all of the liver's nineteen, and the one above it.
        assert_eq!(recall("liver", SizeClass::Tiny), 0.22);
        // One kidney lesion: of all twenty.
        assert_eq!(recall("kidney", SizeClass::Tiny), 0.22);
        // No organ borrows another's level.
        assert_eq!(calibration.suspect_from("liver"), Some(0.22));
        assert_eq!(calibration.suspect_from("kidney"), Some(0.0));
        let none = calibrate(&[]);
        assert!(none.entries.is_empty());
        assert_eq!(none.suspect_from("liver"), Some(0.0));
    }

    #[test]
    fn what_is_like_the_scored_lesions_misses_a_bound_in_a_share_of_cases_and_never_one_that_nobody_can_know() {
        for (lesions, expected) in [(1, 0.0), (3, 0.0), (4, 0.5), (8, 0.5), (9, 0.6), (14, 0.7)] {
            let scores = (0..lesions).map(|i| 0.5 + f64::from(i) / 10.0);
            assert!((reached(0.2, scores) - expected).abs() < 1e-12, "{lesions}");
        }
        // Whichever of n + 1 scores is the new one, at most the share of them lies under the bound of the others, and no much
        // smaller share.
        for count in 2..60_u32 {
            let all: Vec<f64> = (0..count).map(|i| 1.0 + f64::from(i * 37 % 61)).collect();
            for share in [0.1, 0.2] {
                let missing = (0..all.len()).filter(|new| {
                    let others = all.iter().enumerate().filter(|(place, _)| place != new);
                    all[*new] < reached(share, others.map(|(_, score)| *score))
                });
                let (missing, most) = (missing.count() as f64, share * f64::from(count) + 1e-9);
                assert!((most - 1.0 - 1e-6..=most).contains(&missing), "{missing} of {count}");
            }
        }
    }

    #[test]
    fn half_of_a_lesions_voxels_are_as_probable_as_it_is() {
        let mut logits = Array4::zeros((3, 1, 1, 5));
        for (at, odds) in [9.0, 0.5, 2.0, 1.0, 4.0_f32].into_iter().enumerate() {
            // Beside two classes whose odds are 1 together.
            logits[[0, 0, 0, at]] = 0.25_f32.ln();
            logits[[1, 0, 0, at]] = 0.75_f32.ln();
            logits[[2, 0, 0, at]] = odds.ln();
        }
        let is = |inside: [u8; 5], expected: f64| {
            let lesion = Array3::from_shape_vec((1, 1, 5), inside.to_vec()).unwrap();
            let found = probable(&logits, &lesion, 2);
            assert!((found - expected).abs() < 1e-6, "{found}, not {expected}");
        };
        // The third of four, and of five.
        is([0, 1, 1, 1, 1], 2.0 / 3.0);
        is([1, 1, 1, 1, 1], 2.0 / 3.0);
        is([0, 1, 0, 0, 0], 1.0 / 3.0);
    }
}
