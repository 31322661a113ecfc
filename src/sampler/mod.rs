//! Which case, organ and crop an index stands for, and the augmentation of what was cut out.

mod settings;

pub use settings::{Augmentation, Pool};
