//! The plan: what every case of a store and every model trained on it have in common.

use serde::{Deserialize, Serialize};

use super::{HuWindow, LabelMap, Shape};

/// The grid, labels and intensity window that a store and its models agree on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Plan {
    /// Voxel size along (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
    /// The patch that streams serve unless a recipe says otherwise, in voxels (z, y, x); volumes are padded to it.
    pub patch: Shape,
    /// The intensities that networks see, in HU.
    pub window_hu: HuWindow,
    /// Class names and ids.
    pub labels: LabelMap,
}

impl Default for Plan {
    /// Returns the published abdomen plan: 1.5 mm, 96^3 voxels, -175 to 250 HU, seven classes.
    fn default() -> Self {
        Self {
            spacing_mm: [1.5; 3],
            patch: [96; 3],
            window_hu: HuWindow::default(),
            labels: LabelMap::default(),
        }
    }
}

/// The longest side of a patch in voxels; with the largest element (4 bytes) one patch stays under 256 MiB.
pub const MAX_PATCH_SIDE: usize = 384;

impl Plan {
    /// Tells what is wrong with the plan, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        if !self.spacing_mm.iter().all(|mm| (0.1..=20.0).contains(mm)) {
            return Some(format!(
                "plan.spacing_mm: expected 0.1 to 20 mm, got {:?}",
                self.spacing_mm
            ));
        }
        if !self
            .patch
            .iter()
            .all(|side| (16..=MAX_PATCH_SIDE).contains(side) && side % 8 == 0)
        {
            return Some(format!(
                "plan.patch: expected multiples of 8 from 16 to {MAX_PATCH_SIDE} voxels, got {:?}",
                self.patch
            ));
        }
        if !self.window_hu.is_valid() {
            let HuWindow { low, high } = self.window_hu;
            return Some(format!("plan.window_hu: expected low < high, got {low} and {high}"));
        }
        None
    }
}
