//! What a recipe says of a lesion's form.

use serde::{Deserialize, Serialize};

/// A lesion's form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LesionForm {
    /// Strength of the smooth deformation: its standard deviation relative to the radius, 0 to 0.5.
    pub deformation: f64,
    /// Largest ratio of the longest to the shortest semi-axis, 1 to 4.
    pub elongation: f64,
    /// Half the width over which the soft mask falls from 1 to 0, in mm, 0.5 to 3.
    pub edge_mm: f64,
    /// Whether the lesion may leave its organ.
    pub exophytic: bool,
    /// Least share of the requested volume that survives clipping to the organ.
    pub min_kept: f64,
}

impl Default for LesionForm {
    fn default() -> Self {
        Self {
            deformation: 0.18,
            elongation: 1.6,
            edge_mm: 2.0,
            exophytic: false,
            min_kept: 0.7,
        }
    }
}

impl LesionForm {
    /// Returns for each number its field, whether it is in range, the range, and the number.
    pub fn ranges(&self) -> [(&'static str, bool, &'static str, f64); 4] {
        let Self {
            deformation,
            elongation,
            edge_mm,
            min_kept,
            ..
        } = *self;
        [
            (
                "deformation",
                (0.0..=0.5).contains(&deformation),
                "0 to 0.5",
                deformation,
            ),
            ("elongation", (1.0..=4.0).contains(&elongation), "1 to 4", elongation),
            ("edge_mm", (0.5..=3.0).contains(&edge_mm), "0.5 to 3", edge_mm),
            ("min_kept", (0.0..=1.0).contains(&min_kept), "0 to 1", min_kept),
        ]
    }
}
