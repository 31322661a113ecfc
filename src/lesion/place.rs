//! Where a lesion goes: a centre deep enough in its organ that most of the lesion survives clipping.

use super::LesionForm;
use crate::rng::Rng;
use crate::store::Candidate;

/// Depths at which a centre is sought, relative to the lesion's radius, best first.
///
/// A ball cut by a plane at `t` radii from its centre keeps (2 + 3t - t^3) / 4 of its volume: 0.97 at 0.7, 0.84 at 0.5 and
/// 0.70 at 0.28.
const DEPTHS: [f64; 3] = [0.7, 0.5, 0.28];

/// Draws a centre for a lesion, or nothing where the organ is too shallow everywhere.
///
/// `tried` counts earlier draws for the same lesion; every second one asks for more depth, as far as there is any.
pub fn choose_centre(
    candidates: &[Candidate],
    diameter_mm: f64,
    (form, tried): (&LesionForm, u32),
    rng: &mut Rng,
) -> Option<[i64; 3]> {
    let radius = diameter_mm / 2.0;
    let deepest = candidates.iter().map(|c| c.depth_mm).fold(0.0f32, f32::max);
    let least = if form.exophytic { 0.0 } else { DEPTHS[2] };
    if candidates.is_empty() || f64::from(deepest) < least * radius {
        return None;
    }
    let relative = DEPTHS
        .into_iter()
        .find(|t| f64::from(deepest) >= t * radius)
        .unwrap_or(least);
    let relative = if form.exophytic { relative.min(0.28) } else { relative };
    // Each second retry moves the bar half-way to the deepest place, so a lesion that fits somewhere is soon put there.
    let mut bar = relative * radius;
    for _ in 0..tried / 2 {
        bar += (f64::from(deepest) - bar) / 2.0;
    }
    let is_deep = |candidate: &&Candidate| f64::from(candidate.depth_mm) >= bar;
    let count = candidates.iter().filter(is_deep).count();
    let chosen = candidates.iter().filter(is_deep).nth(rng.below(count.max(1)))?;
    Some(chosen.voxel.map(i64::from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    #[test]
    fn centres_are_deep_enough_or_refused() {
        let candidates: Vec<_> = (0..20)
            .map(|i| Candidate {
                voxel: [i, 0, 0],
                depth_mm: f32::from(20 - i),
            })
            .collect();
        let form = LesionForm::default();
        let mut rng = Rng::keyed(0, 0, 0, Purpose::Test);
        for tried in 0..8 {
            let [z, ..] = choose_centre(&candidates, 20.0, (&form, tried), &mut rng).unwrap();
            assert!(20 - z >= 7, "depth {} for a radius of 10", 20 - z);
        }
        assert_eq!(choose_centre(&candidates, 200.0, (&form, 0), &mut rng), None);
        assert_eq!(choose_centre(&[], 5.0, (&form, 0), &mut rng), None);
    }
}
