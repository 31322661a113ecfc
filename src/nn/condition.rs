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

/// Returns the side of the lesion-centred cube, in voxels: part of the definition of generator and critic, in training
/// and in serving alike.
pub fn cube_side(size: SizeClass) -> usize {
    [32, 48, 64, 96][size as usize]
}
