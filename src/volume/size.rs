//! The bins in which lesions are requested, gated, counted and evaluated.

use serde::{Deserialize, Serialize};

/// A lesion's size by equivalent-sphere diameter in mm: tiny < 10, small 10-20, medium 20-50, large > 50.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, bincode::Encode, bincode::Decode,
)]
#[serde(rename_all = "snake_case")]
pub enum SizeClass {
    /// Under 10 mm.
    Tiny,
    /// 10 to 20 mm.
    Small,
    /// 20 to 50 mm.
    Medium,
    /// Over 50 mm.
    Large,
}

impl SizeClass {
    /// All classes, smallest first.
    pub const ALL: [Self; 4] = [Self::Tiny, Self::Small, Self::Medium, Self::Large];

    /// Returns the class of a diameter in mm.
    pub fn of_diameter(diameter_mm: f64) -> Self {
        match diameter_mm {
            d if d < 10.0 => Self::Tiny,
            d if d < 20.0 => Self::Small,
            d if d <= 50.0 => Self::Medium,
            _ => Self::Large,
        }
    }

    /// Returns the name used in recipes, metrics and reports.
    pub fn name(self) -> &'static str {
        ["tiny", "small", "medium", "large"][self as usize]
    }
}

/// A lesion's signed contrast to the organ around it, in HU: dark < -40, dim -40 to -15, iso -15 to 15, bright > 15.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, bincode::Encode, bincode::Decode,
)]
#[serde(rename_all = "snake_case")]
pub enum ContrastBin {
    /// Under -40 HU.
    Dark,
    /// -40 to -15 HU.
    Dim,
    /// -15 to 15 HU.
    Iso,
    /// Over 15 HU.
    Bright,
}

impl ContrastBin {
    /// All bins, darkest first.
    pub const ALL: [Self; 4] = [Self::Dark, Self::Dim, Self::Iso, Self::Bright];

    /// Returns the bin of a contrast in HU.
    pub fn of_contrast(contrast_hu: f64) -> Self {
        match contrast_hu {
            c if c < -40.0 => Self::Dark,
            c if c < -15.0 => Self::Dim,
            c if c <= 15.0 => Self::Iso,
            _ => Self::Bright,
        }
    }

    /// Returns the name used in recipes, metrics and reports.
    pub fn name(self) -> &'static str {
        ["dark", "dim", "iso", "bright"][self as usize]
    }
}
