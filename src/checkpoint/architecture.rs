//! The shapes that a network of a manifest may have.

use serde::{Deserialize, Serialize};

use crate::nn::{GeneratorConfig, MonaiUnetConfig, NnunetConfig, PublishedConfig, SwinUnetrConfig, UnetConfig};

/// The shape of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// A plain 3D U-Net.
    Unet(UnetConfig),
    /// The conditional generator.
    Generator(GeneratorConfig),
    /// The published generator and discriminator.
    Published(PublishedConfig),
    /// SwinUNETR, the published critic and segmentor.
    SwinUnetr(SwinUnetrConfig),
    /// nnU-Net's plain or residual-encoder U-Net.
    Nnunet(NnunetConfig),
    /// MONAI's U-Net.
    MonaiUnet(MonaiUnetConfig),
}

impl Architecture {
    /// Tells what is wrong with the architecture, naming the key, or nothing: to be asked before weights are allocated.
    pub fn refusal(&self) -> Option<String> {
        match self {
            Self::Unet(config) => unet_refusal(config),
            Self::Generator(config) => generator_refusal(config).or_else(|| unet_refusal(&body(config))),
            Self::Published(config) => config.refusal(),
            Self::SwinUnetr(config) => config.refusal(),
            Self::Nnunet(config) => config.refusal(),
            Self::MonaiUnet(config) => config.refusal(),
        }
    }

    /// Returns the number of parameters; meaningful only where [`Self::refusal`] finds nothing.
    pub fn parameters(&self) -> u64 {
        match self {
            Self::Unet(config) => unet_parameters(config),
            Self::Generator(config) => unet_parameters(&body(config)),
            Self::Published(config) => config.parameters(),
            Self::SwinUnetr(config) => config.parameters(),
            Self::Nnunet(config) => config.parameters(),
            Self::MonaiUnet(config) => config.parameters(),
        }
    }

    /// Returns the factor that input sizes must be divisible by, per axis of the network.
    pub fn stride(&self) -> [usize; 3] {
        match self {
            Self::Unet(config) => [config.stride(); 3],
            Self::Generator(config) => [body(config).stride(); 3],
            Self::Published(_) => [8; 3],
            Self::SwinUnetr(config) => [config.stride(); 3],
            Self::Nnunet(config) => config.stride(),
            Self::MonaiUnet(config) => [config.stride(); 3],
        }
    }

    /// Returns the channels of input and output, without those of conditions.
    pub fn channels(&self) -> [usize; 2] {
        match self {
            Self::Unet(config) => [config.in_channels, config.out_channels],
            Self::Generator(_) => [3, 1],
            Self::Published(config) => [config.in_channels, config.out_channels],
            Self::SwinUnetr(config) => [config.in_channels, config.out_channels],
            Self::Nnunet(config) => [config.in_channels, config.out_channels],
            Self::MonaiUnet(config) => [config.in_channels, config.out_channels],
        }
    }
}

/// Returns the U-Net that a conditional generator wraps.
fn body(config: &GeneratorConfig) -> UnetConfig {
    UnetConfig {
        in_channels: 3,
        out_channels: 1,
        widths: config.widths.clone(),
        condition: crate::nn::Condition::len(config.organs),
    }
}

fn generator_refusal(config: &GeneratorConfig) -> Option<String> {
    if !(1..=64).contains(&config.organs) {
        return Some(format!("organs: expected 1 to 64, got {}", config.organs));
    }
    if !(config.spread_hu.is_finite() && (0.0..=1000.0).contains(&config.spread_hu)) {
        return Some(format!("spread_hu: expected 0 to 1000, got {}", config.spread_hu));
    }
    None
}

fn unet_refusal(unet: &UnetConfig) -> Option<String> {
    if !(1..=7).contains(&unet.widths.len()) {
        return Some(format!("widths: expected 1 to 7 levels, got {}", unet.widths.len()));
    }
    if let Some(width) = unet.widths.iter().find(|width| !(1..=1024).contains(*width)) {
        return Some(format!("widths: expected 1 to 1024 channels, got {width}"));
    }
    let channels = [
        ("in_channels", unet.in_channels),
        ("out_channels", unet.out_channels),
        ("condition", unet.condition.max(1)),
    ];
    channels
        .into_iter()
        .find(|(_, n)| !(1..=128).contains(n))
        .map(|(name, n)| format!("{name}: expected at most 128, got {n}"))
}

fn unet_parameters(unet: &UnetConfig) -> u64 {
    let double = |from: usize, to: usize| {
        let convolutions = 27 * from * to + to + 27 * to * to + to;
        convolutions + 2 * (2 * to + 2 * to * unet.condition)
    };
    let widths = &unet.widths;
    let first = double(unet.in_channels, widths[0]);
    let levels = widths
        .windows(2)
        .map(|pair| double(pair[0], pair[1]) + 8 * pair[1] * pair[0] + pair[0] + double(2 * pair[0], pair[0]));
    (first + levels.sum::<usize>() + (widths[0] + 1) * unet.out_channels) as u64
}
