//! What stands beside a model's weights: what it is, what it was trained on, and the checksum that ties them together.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Architecture, Calibration, Provenance, Realism};
use crate::digest::Digest;
use crate::nn::Adapter;
use crate::volume::{Fingerprint, Plan};

/// The manifest's format; raised when an older program could not read it. All formats from 1 on are read.
pub const FORMAT_VERSION: u32 = 3;

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
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Critic, Self::Generator, Self::Discriminator, Self::Segmentor];

    /// Returns the stem of the model's two files.
    pub fn name(self) -> &'static str {
        ["critic", "generator", "discriminator", "segmentor"][self as usize]
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
    /// The `source_hash` of every training case, and of every case of the models that it was trained against
    /// or whose lesions it was trained on.
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

impl Training {
    /// Adds what models that a run learnt by had seen.
    pub fn add_seen(&mut self, models: &Provenance) {
        self.source_hashes.extend(&models.source_hashes);
        self.fingerprints.extend(models.fingerprints.iter().cloned());
    }
}

/// Where an imported model came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Imported {
    /// The file's name.
    pub file: String,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// What the file says of itself, such as nnU-Net's trainer and fold.
    pub notes: BTreeMap<String, String>,
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
    /// How real it finds real lesions; only a discriminator tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub realism: Option<Realism>,
    /// What stands between the plan and an imported network.
    #[serde(default, skip_serializing_if = "Adapter::is_default")]
    pub adapter: Adapter,
    /// Where an imported model came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Imported>,
    /// The file of weights.
    pub weights: WeightsFile,
}
