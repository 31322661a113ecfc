//! The real tumours that copy-paste takes from.

use std::collections::BTreeMap;

use crate::rng::Rng;
use crate::store::CaseRecord;
use crate::volume::SizeClass;

/// Real tumours by label id and size class, each as its case's and its own position.
#[derive(Debug, Default)]
pub(super) struct Donors(BTreeMap<u8, BTreeMap<SizeClass, Vec<(usize, usize)>>>);

impl Donors {
    /// Lists the tumours of the cases that may appear.
    pub(super) fn of(records: &[CaseRecord], allowed: &[bool]) -> Self {
        let mut donors = Self::default();
        let cases = records.iter().enumerate().filter(|(case, _)| allowed[*case]);
        for (case, record) in cases {
            for (number, tumour) in record.tumours.iter().enumerate() {
                let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
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
