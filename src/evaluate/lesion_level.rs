//! Lesions found and false alarms, counted as connected components.

use std::collections::BTreeMap;

use ndarray::Array3;
use serde::{Deserialize, Serialize};

use crate::volume::{Connectivity, Shape, SizeClass, components};

/// Counts over one or several cases.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LesionScore {
    /// (found, all) true lesions by size class; found means that at least a tenth of it is predicted.
    pub found: BTreeMap<SizeClass, (u32, u32)>,
    /// Predicted components that touch no true lesion.
    pub false_alarms: u32,
    /// Cases counted.
    pub cases: u32,
}

impl LesionScore {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        for (size, (found, all)) in &other.found {
            let entry = self.found.entry(*size).or_default();
            entry.0 += found;
            entry.1 += all;
        }
        self.false_alarms += other.false_alarms;
        self.cases += other.cases;
    }
}

/// Counts the lesions of one tumour class in one case (masks: 1 inside).
pub fn lesion_level(prediction: &Array3<u8>, truth: &Array3<u8>, spacing_mm: [f64; 3]) -> LesionScore {
    let list = |mask: &Array3<u8>| components(mask.mapv(|inside| inside != 0), Connectivity::Corners);
    let alone = |members: &Vec<Shape>| members.iter().all(|voxel| truth[*voxel] == 0);
    let mut score = LesionScore {
        false_alarms: list(prediction).iter().filter(|members| alone(members)).count() as u32,
        cases: 1,
        ..LesionScore::default()
    };
    let voxel_mm3: f64 = spacing_mm.iter().product();
    for members in list(truth) {
        let predicted = members.iter().filter(|voxel| prediction[**voxel] != 0).count();
        let diameter = libm::cbrt(members.len() as f64 * voxel_mm3 * 6.0 / std::f64::consts::PI);
        let entry = score.found.entry(SizeClass::of_diameter(diameter)).or_default();
        entry.0 += u32::from(predicted * 10 >= members.len());
        entry.1 += 1;
    }
    score
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_found_one_missed_one_false_alarm() {
        let mut truth = Array3::zeros((16, 16, 40));
        let mut prediction = truth.clone();
        truth.slice_mut(ndarray::s![2..6, 2..6, 2..6]).fill(1);
        truth[[12, 12, 12]] = 1;
        prediction.slice_mut(ndarray::s![3..5, 3..5, 3..5]).fill(1);
        prediction[[8, 8, 30]] = 1;
        let score = lesion_level(&prediction, &truth, [3.0; 3]);
        // 64 voxels of 27 mm^3 are a sphere of 14.9 mm; one voxel is 3.7 mm.
        assert_eq!(score.found[&SizeClass::Small], (1, 1));
        assert_eq!(score.found[&SizeClass::Tiny], (0, 1));
        assert_eq!(score.false_alarms, 1);
    }
}
