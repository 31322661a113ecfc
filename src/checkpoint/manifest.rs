//! What stands beside a model's weights: what it is, what it was trained on, and the checksum that ties them together.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::Calibration;
use crate::digest::Digest;
use crate::nn::{GeneratorConfig, UnetConfig};
use crate::volume::{Fingerprint, Plan};

/// The manifest's format; raised when an older program could not read it. All formats from 1 on are read.
pub const FORMAT_VERSION: u32 = 2;

/// What a model does in the method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The stage-1 segmentor that judges lesions.
    Critic,
    /// Stage 2's painter of lesions.
    Generator,
    /// Stage 2's voxel-wise judge of real and synthetic.
    Discriminator,
    /// Stage 3's product.
    Segmentor,
}

impl Role {
    /// Returns the stem of the model's two files.
    pub fn name(self) -> &'static str {
        ["critic", "generator", "discriminator", "segmentor"][self as usize]
    }
}

/// The shape of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// A plain 3D U-Net.
    Unet(UnetConfig),
    /// The conditional generator.
    Generator(GeneratorConfig),
}

impl Architecture {
    /// Returns the U-Net that the architecture is or wraps.
    pub fn unet(&self) -> UnetConfig {
        match self {
            Self::Unet(config) => config.clone(),
            Self::Generator(config) => UnetConfig {
                in_channels: 3,
                out_channels: 1,
                widths: config.widths.clone(),
                condition: crate::nn::Condition::len(config.organs),
            },
        }
    }

    /// Tells what is wrong with the architecture, naming the key, or nothing: to be asked before weights are allocated.
    pub fn refusal(&self) -> Option<String> {
        if let Self::Generator(config) = self {
            if !(1..=64).contains(&config.organs) {
                return Some(format!("organs: expected 1 to 64, got {}", config.organs));
            }
            if !(config.spread_hu.is_finite() && (0.0..=1000.0).contains(&config.spread_hu)) {
                return Some(format!("spread_hu: expected 0 to 1000, got {}", config.spread_hu));
            }
        }
        let unet = self.unet();
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

    /// Returns the number of parameters; meaningful only where [`Self::refusal`] finds nothing.
    pub fn parameters(&self) -> u64 {
        let unet = self.unet();
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
}

/// The file of weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightsFile {
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// How a model came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Ids of the training cases.
    pub case_ids: Vec<String>,
    /// The `source_hash` of every training case, and of every case of the models it was trained against.
    pub source_hashes: BTreeSet<Digest>,
    /// The fingerprints of the same cases, by which near-duplicates are found; manifests of format 1 have none.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub fingerprints: BTreeSet<Fingerprint>,
    /// The store it was trained on.
    pub snapshot: Digest,
    /// The complete configuration.
    pub config: serde_json::Value,
    /// Optimizer steps.
    pub steps: u64,
    /// The seed of every random choice.
    pub seed: u64,
    /// What was measured at the end.
    pub metrics: BTreeMap<String, f64>,
}

/// Everything about a model but its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelManifest {
    /// [`FORMAT_VERSION`] of the program that wrote it, at least 1.
    pub format_version: u32,
    /// What the model does.
    pub role: Role,
    /// The network's shape.
    pub architecture: Architecture,
    /// The grid, labels and window it was trained on.
    pub plan: Plan,
    /// Sides of the lesion-centred cubes it was trained on, by size class, in voxels; a segmentor's are its patch's.
    pub cubes: Vec<usize>,
    /// Whether the training set is known; imported models may not say.
    pub provenance_known: bool,
    /// How it came about; absent where unknown.
    pub training: Option<Training>,
    /// The gate's thresholds; only a critic has them.
    #[serde(default)]
    pub calibration: Option<Calibration>,
    /// The file of weights.
    pub weights: WeightsFile,
}
