//! Lesions before they have intensities: form, place, soft mask and texture, in millimetres.
//!
//! A [`Shape`] is drawn for a diameter, [`choose_centre`] finds room for it in an organ, and [`soft_mask`] clips it there
//! and softens its edge. [`published`] holds the paper's shapes and texture, in voxels as they are defined.

mod form;
mod mask;
mod place;
pub mod published;
mod shape;
mod surface;
mod texture;

pub use form::LesionForm;
pub use mask::{BLOCKED, LESION_FROM, LesionMask, MaskRequest, SUPPORT_MM, soft_mask};
pub use place::choose_centre;
pub use shape::{Shape, ShapeRequest};
pub use texture::{TextureRequest, gaussian_field};
