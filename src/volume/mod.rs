//! The domain's types: grids, labels, intensity windows and regions, and the geometry of masks. No I/O; everything else builds on this module.

mod bits;
mod components;
mod distance;
mod fingerprint;
mod grid;
mod labels;
mod plan;
mod region;
pub mod resample;
mod size;
mod window;

pub use bits::BitMask;
pub use components::{Connectivity, components, take_component};
pub use distance::{dilated, squared_distance_mm};
pub use fingerprint::{Alignment, Fingerprint, FingerprintError, MAX_FINGERPRINT_BYTES, MIN_SCORE, Outline};
pub use grid::{Affine, Grid, Shape};
pub use labels::{Annotation, BACKGROUND, ClassSet, IGNORE, LabelError, LabelMap, Organ};
pub use plan::{MAX_PATCH_SIDE, Plan};
pub use region::Region;
pub use size::{ContrastBin, SizeClass};
pub use window::HuWindow;

/// The intensity of air, in HU: what lies outside a volume and the lowest value a store keeps.
pub const AIR_HU: i16 = -1024;
