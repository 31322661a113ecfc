//! Networks, as burn modules on the operators of [`crate::kernel`]; no I/O, no threads.

mod blocks;
mod condition;
mod discriminator;
mod generator;
mod loss;
mod monai_unet;
mod network;
mod nnunet;
mod planned;
mod published;
mod published_synthesis;
mod swin_blocks;
mod swin_unetr;
mod unet;

pub use crate::kernel::{DiceOver, LossForm, total};
pub use condition::{Condition, CubeSides};
pub use discriminator::{REAL, SYNTHETIC};
pub use generator::{ContrastOver, Generator, GeneratorConfig};
pub use loss::{Targets, deep_supervision_loss, marginal_loss, weighted_cross_entropy};
pub use monai_unet::{MonaiUnet, MonaiUnetConfig};
pub use network::{Adapter, Body, Network, Standardised, VoxelClassifier};
pub use nnunet::{Encoder, Nnunet, NnunetConfig, NnunetStage};
pub use published::{OutputActivation, Published, PublishedConfig};
pub use published_synthesis::{
    PublishedScene, published_adversarial, published_discrimination, published_missing, published_residual,
};
pub use swin_unetr::{Merging, SwinUnetr, SwinUnetrConfig};
pub use unet::{Unet, UnetConfig};
