//! Critic, generator and discriminator that belong together.

use std::collections::BTreeSet;

use super::Calibration;
use crate::digest::Digest;
use crate::nn::{Generator, Unet};
use crate::volume::Plan;

/// What a model was trained on.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Whether the training set is known at all; imported models may not say.
    pub known: bool,
    /// The `source_hash` of every training case.
    pub source_hashes: BTreeSet<Digest>,
}

/// Critic, generator and discriminator that belong together, on a device.
pub struct Bundle {
    /// BLAKE3 over the manifests, which hold the weights' checksums.
    pub hash: Digest,
    /// The grid, labels and window they were trained on.
    pub plan: Plan,
    /// The frozen stage-1 segmentor: classes as in the plan's label map.
    pub critic: Unet,
    /// Stage 2's generator.
    pub generator: Option<Generator>,
    /// Stage 2's voxel-wise discriminator: logits for 0 background, 1 real tumour, 2 synthetic tumour.
    pub discriminator: Option<Unet>,
    /// The gate's thresholds.
    pub calibration: Calibration,
    /// What any of them was trained on.
    pub provenance: Provenance,
}
