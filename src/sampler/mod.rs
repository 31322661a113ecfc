//! Which case, organ and lesion an index stands for, and the augmentation of what was cut out.

mod augment;
mod bins;
mod deal;
mod grain;
mod schedule;
mod sequence;
mod settings;
mod warp;

pub use augment::{Change, HU_RANGE};
pub use bins::{diameters_mm, draw_contrast_hu, draw_diameter_mm};
pub use grain::Grain;
pub use schedule::{Draw, Mix, Schedule};
pub use sequence::Sequence;
pub use settings::{Augmentation, Centre, Pool};
pub use warp::Warp;
