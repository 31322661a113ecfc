//! Lesions before they have intensities: form, place, soft mask and texture, in millimetres.

mod form;

pub use form::LesionForm;
