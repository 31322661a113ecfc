//! The patients of an experiment, and the stores that hold them.

use crate::phantom::{PhantomSettings, PhantomSpec, Scanner, Tumours};

/// The first number of the unlabelled patients.
const FIRST_UNLABELLED: u64 = 10_000;

/// The scanners of the test patients, in turn.
pub(super) const TEST_SCANNERS: [Scanner; 3] = [Scanner::C, Scanner::D, Scanner::E];

/// Returns the position of a test patient's scanner among [`TEST_SCANNERS`]: ids end in the patient's number.
pub(super) fn scanner_of(id: &str) -> Option<usize> {
    let (_, number) = id.rsplit_once('-')?;
    Some(number.parse::<usize>().ok()? % TEST_SCANNERS.len())
}

/// Which patients a store holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cohort {
    /// The cohort's seed.
    pub seed: u64,
    /// Labelled patients, on scanners A and B in turn.
    pub labelled: usize,
    /// Further patients, on scanners C and D in turn.
    pub unlabelled: usize,
    /// Whether the further patients have their tumours, and labels of them. They are the same patients as without, voxel
    /// for voxel where no tumour is.
    pub tumours: Tumours,
    /// Voxel size (z, y, x).
    pub spacing_mm: [f64; 3],
}

impl Cohort {
    /// Returns the specifications of the patients.
    pub fn specs(&self, settings: &PhantomSettings) -> Vec<PhantomSpec> {
        let labelled = (0..self.labelled as u64).map(|n| {
            let scanner = [Scanner::A, Scanner::B][n as usize % 2];
            self.patient(settings, n, (scanner, Tumours::Labelled))
        });
        let unlabelled = (0..self.unlabelled as u64).map(|n| {
            let scanner = [Scanner::C, Scanner::D][n as usize % 2];
            self.patient(settings, FIRST_UNLABELLED + n, (scanner, self.tumours))
        });
        labelled.chain(unlabelled).collect()
    }

    fn patient(&self, settings: &PhantomSettings, index: u64, (scanner, tumours): (Scanner, Tumours)) -> PhantomSpec {
        PhantomSpec {
            seed: self.seed,
            index,
            scanner,
            phase: settings.phase(index as usize),
            tumours,
            spacing_mm: self.spacing_mm,
        }
    }

    /// Returns the store's name among those of one seed.
    pub fn name(&self) -> String {
        let tumours = match self.tumours {
            Tumours::None => "",
            Tumours::Hidden => "-hidden",
            Tumours::Labelled => "-true",
        };
        format!("l{}-u{}{tumours}", self.labelled, self.unlabelled)
    }
}

/// Returns the test patients, all with tumours.
pub(super) fn test_specs(
    settings: &PhantomSettings,
    seed: u64,
    count: usize,
    spacing_mm: [f64; 3],
) -> Vec<PhantomSpec> {
    let cohort = Cohort {
        seed,
        labelled: 0,
        unlabelled: 0,
        tumours: Tumours::Labelled,
        spacing_mm,
    };
    let scanners = TEST_SCANNERS.iter().cycle();
    (0..count as u64)
        .zip(scanners)
        .map(|(n, scanner)| cohort.patient(settings, n, (*scanner, Tumours::Labelled)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phantom::generate_with;

    #[test]
    fn a_test_patients_id_tells_its_scanner() {
        for spec in test_specs(&PhantomSettings::default(), 3, 7, [6.0; 3]) {
            let scanner = scanner_of(&crate::phantom::case_id(&spec)).map(|at| TEST_SCANNERS[at]);
            assert_eq!(scanner, Some(spec.scanner));
        }
        assert_eq!(scanner_of("liver"), None);
    }

    #[test]
    fn labelled_patients_are_of_scanners_a_and_b_and_the_others_of_c_and_d() {
        let cohort = Cohort {
            seed: 3,
            labelled: 4,
            unlabelled: 4,
            tumours: Tumours::None,
            spacing_mm: [6.0; 3],
        };
        let specs = cohort.specs(&PhantomSettings::default());
        let scanners: Vec<Scanner> = specs.iter().map(|spec| spec.scanner).collect();
        let (a_b, c_d) = ([Scanner::A, Scanner::B], [Scanner::C, Scanner::D]);
        assert_eq!(scanners, [a_b, a_b, c_d, c_d].concat());
        assert!(specs[..4].iter().all(|spec| spec.tumours == Tumours::Labelled));
        assert!(specs[4..].iter().all(|spec| spec.tumours == Tumours::None));
    }

    #[test]
    fn the_oracles_patients_are_the_unlabelled_ones_with_tumours() {
        let cohort = |tumours| Cohort {
            seed: 3,
            labelled: 1,
            unlabelled: 2,
            tumours,
            spacing_mm: [6.0; 3],
        };
        let settings = PhantomSettings::default();
        let (plain, sick) = (
            cohort(Tumours::None).specs(&settings),
            cohort(Tumours::Labelled).specs(&settings),
        );
        assert_eq!(plain[0], sick[0]);
        for (plain, sick) in plain.iter().zip(&sick).skip(1) {
            let [plain, sick] = [plain, sick].map(|spec| generate_with(&settings, spec));
            assert_eq!(plain.image.dim(), sick.image.dim());
            let changed = plain.image.iter().zip(&sick.image).filter(|(a, b)| a != b).count();
            let tumour = sick.labels.iter().filter(|label| [2, 4, 6].contains(*label)).count();
            assert!(plain.labels.iter().all(|label| ![2, 4, 6].contains(label)));
            // A scanner's blur carries a tumour some millimetres out, no further.
            assert!(
                changed < 12 * tumour.max(1) + 400,
                "{changed} voxels changed for {tumour}"
            );
        }
    }
}
