//! The real tumours that copy-paste takes from.

use std::collections::BTreeMap;

use crate::rng::Rng;
use crate::store::{CaseRecord, TumourRecord};
use crate::volume::{ContrastBin, Organ, Region, Shape, SizeClass};

/// Real tumours by label id and size class, each as its case's and its own position.
#[derive(Debug, Default)]
pub(super) struct Donors(BTreeMap<u8, BTreeMap<SizeClass, Vec<(usize, usize)>>>);

impl Donors {
    /// Lists the tumours of the cases that may appear, but for those that the box of their size does not hold: what is cut out of one
    /// would end in a flat face. `box_voxels` are the boxes of [`SizeClass::ALL`].
    pub(super) fn of(records: &[CaseRecord], allowed: &[bool], box_voxels: [Shape; 4]) -> Self {
        let mut donors = Self::default();
        let cases = records.iter().enumerate().filter(|(case, _)| allowed[*case]);
        for (case, record) in cases {
            for (number, tumour) in record.tumours.iter().enumerate() {
                let (size, _) = kind_of(tumour);
                let cut = Region::centred(tumour.centre, box_voxels[size as usize]);
                if tumour.region.intersect(&cut) != tumour.region {
                    continue;
                }
                let of_class = donors.0.entry(tumour.id).or_default().entry(size).or_default();
                of_class.push((case, number));
            }
        }
        donors
    }

    /// Tells whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the organs of which there are tumours to copy, refusing one that the recipe names.
    ///
    /// # Errors
    /// The name of such an organ.
    pub(super) fn organs(&self, organs: Vec<(Organ, f64)>, is_named: bool) -> Result<Vec<(Organ, f64)>, String> {
        let has = |organ: &Organ| self.0.contains_key(&organ.tumour_id);
        match organs
            .iter()
            .find(|(organ, share)| is_named && *share > 0.0 && !has(organ))
        {
            Some((organ, _)) => Err(organ.name.clone()),
            None => Ok(organs.into_iter().filter(|(organ, _)| has(organ)).collect()),
        }
    }

    /// Draws a tumour by its label id, of a size class where there are some; nothing where the class has no tumour at all.
    pub(super) fn draw(&self, rng: &mut Rng, tumour_id: u8, size: SizeClass) -> Option<(usize, usize)> {
        let of_class = self.0.get(&tumour_id)?;
        let all: Vec<(usize, usize)> = match of_class.get(&size) {
            Some(list) => list.clone(),
            None => of_class.values().flatten().copied().collect(),
        };
        (!all.is_empty()).then(|| all[rng.below(all.len())])
    }
}

/// Returns the size and the contrast that a real tumour has.
pub(super) fn kind_of(tumour: &TumourRecord) -> (SizeClass, ContrastBin) {
    (
        SizeClass::of_diameter(f64::from(tumour.diameter_mm)),
        ContrastBin::of_contrast(f64::from(tumour.contrast_hu)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;
    use crate::store::Cases;
    use crate::toy;

    /// The toy store's tumours are tiny, and 7 voxels long.
    #[test]
    fn a_tumour_that_its_box_would_cut_is_no_donor() {
        let store = toy::store(3, 0);
        let donors = |tiny: usize, larger: usize| {
            let boxes = [tiny, larger, larger, larger].map(|side| [side; 3]);
            Donors::of(store.records(), &[true, true, false], boxes)
        };
        assert!(donors(6, 96).is_empty(), "a tumour is cut from the box of its own size");
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        for size in SizeClass::ALL {
            let drawn: Vec<_> = (0..20).map(|_| donors(8, 1).draw(&mut rng, 2, size)).collect();
            assert!([0, 1].iter().all(|case| drawn.contains(&Some((*case, 0)))));
            assert!(!drawn.contains(&Some((2, 0))), "a case that may not appear");
        }
        assert_eq!(donors(8, 1).draw(&mut rng, 4, SizeClass::Tiny), None);
        // The toy's labelled cases have tumours of the liver alone.
        let organs = || {
            store
                .plan()
                .labels
                .organs()
                .into_iter()
                .map(|organ| (organ, 1.0))
                .collect()
        };
        let names = |organs: Vec<(Organ, f64)>| organs.into_iter().map(|(organ, _)| organ.name).collect::<Vec<_>>();
        assert_eq!(
            donors(8, 1).organs(organs(), false).map(names),
            Ok(vec!["liver".to_string()])
        );
        assert!(donors(8, 1).organs(organs(), true).is_err_and(|name| name != "liver"));
    }
}
