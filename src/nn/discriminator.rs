//! The classes that a discriminator tells apart, beside 0 for everything that is no tumour.

/// The channel of real tumours.
pub const REAL: usize = 1;
/// The channel of synthetic lesions.
pub const SYNTHETIC: usize = 2;
