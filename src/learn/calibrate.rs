//! The gate's thresholds from the critic's scores on real lesions it was not trained on.

use burn::tensor::Device;
use ndarray::{Array3, Zip};

use super::LearnError;
use super::augment::Look;
use super::cubes::{Catalogue, lesion_of, read_cube, side_of};
use crate::checkpoint::{Calibration, CalibrationEntry, Thresholds};
use crate::evaluate::{argmax, forward};
use crate::nn::VoxelClassifier;
use crate::synth::gate::{Judged, scores};
use crate::volume::{ContrastBin, SizeClass};

/// A bin of fewer lesions is pooled with its neighbours.
const LEAST_LESIONS: usize = 5;
/// The share of real lesions that a threshold refuses.
const PERCENTILE: f64 = 0.2;

/// The scores of one real lesion.
#[derive(Clone, Debug)]
pub(super) struct RealScore {
    pub organ: String,
    pub size: SizeClass,
    pub contrast: ContrastBin,
    pub recall: f64,
    pub precision: f64,
}

/// Scores every real lesion of a catalogue in its cube, as a synthesized one is scored. Nothing was there "before":
/// the real lesion was never painted, so all that the critic calls tumour counts.
pub(super) fn judge_real(
    critic: &dyn VoxelClassifier,
    catalogue: &Catalogue,
    max_cube: usize,
    device: &Device,
) -> Result<Vec<RealScore>, LearnError> {
    let plan = catalogue.cases.plan();
    let mut out = Vec::new();
    for (case, organ, tumour) in catalogue.all_tumours() {
        let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
        let side = side_of(size, max_cube);
        let cube = read_cube(catalogue.cases, case, tumour.centre, side, &Look::none())?;
        let image = cube.image.mapv(|hu| plan.window_hu.normalise(hu as i16));
        let after = argmax(&forward(critic, &image, device));
        let lesion = lesion_of(&cube, tumour.id);
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
        });
    }
    Ok(out)
}

/// Returns the 20th percentile per bin, from organ, size and contrast to everything; bins of few lesions are left to
/// the next wider one.
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
                recall: percentile(fitting.iter().map(|score| score.recall)),
                precision: percentile(fitting.iter().map(|score| score.precision)),
            },
        })
    });
    Calibration {
        entries: entries.collect(),
    }
}

fn percentile(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[(PERCENTILE * (values.len() - 1) as f64) as usize]
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
        }
    }

    #[test]
    fn few_lesions_are_pooled_upwards() {
        let mut scores: Vec<_> = (0..11)
            .map(|i| score("liver", SizeClass::Small, f64::from(i) / 10.0))
            .collect();
        scores.push(score("liver", SizeClass::Tiny, 0.0));
        scores.push(score("kidney", SizeClass::Tiny, 0.9));
        let calibration = calibrate(&scores);
        let recall = |organ: &str, size| calibration.thresholds(organ, size, ContrastBin::Dim).unwrap().recall;
        assert_eq!(recall("liver", SizeClass::Small), 0.2);
        // One tiny liver lesion: all of the liver's twelve, whose second lowest but one is 0.1.
        assert_eq!(recall("liver", SizeClass::Tiny), 0.1);
        // One kidney lesion: all thirteen.
        assert_eq!(recall("kidney", SizeClass::Tiny), 0.1);
        assert!(calibrate(&[]).entries.is_empty());
    }
}
