//! Networks, as burn modules on the operators of [`crate::kernel`]; no I/O, no threads.

mod blocks;
mod condition;
mod generator;
mod loss;
mod published;
mod unet;

pub use crate::kernel::{DiceOver, LossForm, total};
pub use condition::{Condition, cube_side};
pub use generator::{Generator, GeneratorConfig};
pub use loss::{Targets, marginal_loss, weighted_cross_entropy};
pub use published::{OutputActivation, Published, PublishedConfig};
pub use unet::{Unet, UnetConfig};
