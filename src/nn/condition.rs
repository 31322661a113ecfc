//! What the conditional generator is told of a lesion, and the cube in which it and the critic look at it.

use crate::volume::SizeClass;

/// Organ, size and contrast of a requested lesion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Condition {
    /// The organ's position in [`LabelMap::organs`](crate::volume::LabelMap::organs).
    pub organ: usize,
    /// Equivalent-sphere diameter in mm.
    pub diameter_mm: f64,
    /// Signed contrast in HU.
    pub contrast_hu: f64,
}

impl Condition {
    /// Returns how long [`Self::vector`] is for a number of organs.
    pub fn len(organs: usize) -> usize {
        organs + 2
    }

    /// Returns the network's input: one-hot organ, log2 of the diameter over 20 mm, contrast over 100 HU.
    pub fn vector(&self, organs: usize) -> Vec<f32> {
        let mut out = vec![0.0; organs];
        out[self.organ] = 1.0;
        out.push(libm::log2(self.diameter_mm / 20.0) as f32);
        out.push((self.contrast_hu / 100.0) as f32);
        out
    }
}

/// The least and the longest side of a cube; every side is a multiple of the least.
const SIDES: [usize; 2] = [16, 96];

/// Sides of the lesion-centred cubes by size class, in voxels: part of the definition of generator and critic, in training
/// and in serving alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CubeSides([usize; 4]);

impl Default for CubeSides {
    fn default() -> Self {
        Self([32, 48, 64, 96])
    }
}

impl CubeSides {
    /// Returns the default sides, none longer than `longest`.
    pub fn up_to(longest: usize) -> Self {
        Self(Self::default().0.map(|side| side.min(longest)))
    }

    /// Reads a manifest's sides; nothing where they are not four multiples of 16 from 16 to 96 in ascending order.
    pub fn of_manifest(sides: &[usize]) -> Option<Self> {
        let sides: [usize; 4] = sides.try_into().ok()?;
        let [least, longest] = SIDES;
        let fits = sides
            .iter()
            .all(|side| (least..=longest).contains(side) && side.is_multiple_of(least));
        (fits && sides.is_sorted()).then_some(Self(sides))
    }

    /// Returns the side of a size class's cube.
    pub fn of(self, size: SizeClass) -> usize {
        self.0[size as usize]
    }

    /// Returns the sides of all size classes, the smallest first.
    pub fn all(self) -> [usize; 4] {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifests_sides_are_checked() {
        assert_eq!(CubeSides::of_manifest(&[32, 48, 64, 96]), Some(CubeSides::default()));
        assert_eq!(CubeSides::of_manifest(&[32; 4]), Some(CubeSides::up_to(32)));
        for sides in [
            &[32; 3][..],
            &[0; 4],
            &[32, 40, 64, 96],
            &[64, 48, 32, 32],
            &[32, 48, 64, 1 << 40],
        ] {
            assert_eq!(CubeSides::of_manifest(sides), None, "{sides:?}");
        }
    }
}
