//! Diameters and contrasts: what a requested size class and contrast bin stand for in mm and HU.

use crate::rng::Rng;
use crate::volume::{ContrastBin, Organ, SizeClass};

/// No lesion is requested under this diameter, in mm.
const LEAST_DIAMETER_MM: f64 = 5.0;
/// Nor under this many voxels across.
const LEAST_DIAMETER_VOXELS: f64 = 2.5;
/// The largest diameter ever requested, in mm: the tail of the log-normal beyond it is anatomy of its own.
const LARGEST_DIAMETER_MM: f64 = 120.0;
/// How many slices of ln(diameter) the truncated log-normal is drawn from.
const SLICES: usize = 64;

/// Returns the diameters in mm, from and below, that an organ whose largest ball is `holds_mm` can be asked for in a
/// size class, looked at in a cube of `cube_mm`; nothing where there are none.
pub fn diameters_mm(size: SizeClass, holds_mm: f64, spacing_mm: [f64; 3], cube_mm: f64) -> Option<[f64; 2]> {
    let [low, high] = match size {
        SizeClass::Tiny => [LEAST_DIAMETER_MM, 10.0],
        SizeClass::Small => [10.0, 20.0],
        SizeClass::Medium => [20.0, 50.0],
        SizeClass::Large => [50.0, LARGEST_DIAMETER_MM],
    };
    let coarsest = spacing_mm.into_iter().fold(0.0, f64::max);
    // The longest axis of an elongated, deformed lesion is up to 1.5 diameters, and its soft edge adds 3 mm on both
    // sides: what the cube cannot hold would be cut off hard.
    let fits = (cube_mm - 6.0) / 1.5;
    let range = [low.max(LEAST_DIAMETER_VOXELS * coarsest), high.min(holds_mm).min(fits)];
    (range[0] < range[1]).then_some(range)
}

/// Draws a diameter in mm from the organ's log-normal, truncated to a range.
///
/// # Source
/// Equivalent diameters in ln mm: kidney mu 3.58, sigma 0.62 (KiTS23); liver 2.68, 0.79 (LiTS). Other organs: the
/// liver's, for want of a measurement.
pub fn draw_diameter_mm(rng: &mut Rng, organ: &Organ, range_mm: [f64; 2]) -> f64 {
    let [mu, sigma] = if organ.name == "kidney" {
        [3.58, 0.62]
    } else {
        [2.68, 0.79]
    };
    let [low, high] = range_mm.map(libm::log);
    let width = (high - low) / SLICES as f64;
    let weights: Vec<f64> = (0..SLICES)
        .map(|slice| {
            let z = (low + (slice as f64 + 0.5) * width - mu) / sigma;
            libm::exp(-0.5 * z * z)
        })
        .collect();
    let slice = rng.weighted(&weights).unwrap_or(0) as f64;
    libm::exp(low + (slice + rng.uniform()) * width).clamp(range_mm[0], range_mm[1])
}

/// Draws a contrast in HU uniformly from its bin.
pub fn draw_contrast_hu(rng: &mut Rng, bin: ContrastBin) -> f64 {
    let [low, high] = match bin {
        ContrastBin::Dark => [-80.0, -40.0],
        ContrastBin::Dim => [-40.0, -15.0],
        ContrastBin::Iso => [-15.0, 15.0],
        ContrastBin::Bright => [15.0, 60.0],
    };
    rng.range(low, high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    #[test]
    fn draws_stay_in_their_bins() {
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        let organs = crate::volume::LabelMap::default().organs();
        for size in SizeClass::ALL {
            let range = diameters_mm(size, 80.0, [1.5; 3], 144.0).unwrap();
            for organ in &organs {
                let drawn = draw_diameter_mm(&mut rng, organ, range);
                assert_eq!(SizeClass::of_diameter(drawn), size, "{drawn}");
            }
        }
        for bin in ContrastBin::ALL {
            (0..100).for_each(|_| assert_eq!(ContrastBin::of_contrast(draw_contrast_hu(&mut rng, bin)), bin));
        }
    }

    #[test]
    fn what_an_organ_cannot_hold_is_known_beforehand() {
        assert_eq!(diameters_mm(SizeClass::Large, 49.0, [1.5; 3], 144.0), None);
        assert_eq!(
            diameters_mm(SizeClass::Medium, 30.0, [1.5; 3], 96.0),
            Some([20.0, 30.0])
        );
        assert_eq!(diameters_mm(SizeClass::Tiny, 30.0, [3.0; 3], 96.0), Some([7.5, 10.0]));
        // A coarse grid has no tiny lesions at all.
        assert_eq!(diameters_mm(SizeClass::Tiny, 30.0, [5.0; 3], 160.0), None);
    }

    #[test]
    fn diameters_follow_the_log_normal() {
        let mut rng = Rng::keyed(2, 0, 0, Purpose::Test);
        let liver = crate::volume::LabelMap::default().organ("liver").unwrap();
        let n = 4000;
        let small = (0..n)
            .filter(|_| draw_diameter_mm(&mut rng, &liver, [5.0, 50.0]) < libm::exp(2.68))
            .count();
        // P(d < median | 5 < d < 50) = (0.5 - 0.0877) / (0.9407 - 0.0877) = 0.483; four standard errors are 0.032.
        assert!((small as f64 / n as f64 - 0.483).abs() < 0.032, "{small}");
    }
}
