//! Opens stores and bundles of models for the commands that need them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use burn::tensor::Device;
use clap::ValueEnum;

use super::device::Compute;
use crate::checkpoint::{
    Bundle, CheckpointError, ModelManifest, Role, check_plan, check_spacing, load_manifest, load_segmentor,
    write_atomically,
};
use crate::config::Config;
use crate::digest::Digest;
use crate::evaluate::{FlipAxis, SlidingWindow};
use crate::nn::Network as Net;
use crate::store::Store;
use crate::stream::recipe::Recipe;
use crate::stream::{Activation, ModelSource, ModelsError, Streams};
use crate::synth::SynthesizerKind;
use crate::volume::Plan;

/// Opens a store.
pub(super) fn open_store(dir: &Path, config: &Config) -> anyhow::Result<Arc<Store>> {
    let store = Store::open(dir).with_context(|| format!("cannot open the store {}", dir.display()))?;
    Ok(Arc::new(store.with_config(&config.store)))
}

/// Which segmenting network of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Network {
    /// Stage 1's critic.
    Critic,
    /// Stage 3's segmentor.
    Segmentor,
}

impl Network {
    /// Returns the segmentor where a folder holds one, else the critic.
    pub(super) fn of_folder(dir: &Path) -> Self {
        let segmentor = dir.join(format!("{}.json", Role::Segmentor.name()));
        if segmentor.exists() {
            Self::Segmentor
        } else {
            Self::Critic
        }
    }
}

/// An axis along which predictions may be averaged over the mirror image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Flip {
    /// Towards Superior.
    Z,
    /// Towards Anterior.
    Y,
    /// Towards Right.
    X,
}

impl From<Flip> for FlipAxis {
    fn from(flip: Flip) -> Self {
        match flip {
            Flip::Z => Self::Z,
            Flip::Y => Self::Y,
            Flip::X => Self::X,
        }
    }
}

/// How a volume is covered, where the command line says more than the configuration.
#[derive(clap::Args)]
pub(super) struct WindowArgs {
    /// Average over mirror images along these axes, alone and together: z, y, x; each doubles the work
    #[arg(long, value_name = "AXES", value_enum, value_delimiter = ',')]
    flips: Vec<Flip>,
}

impl WindowArgs {
    /// Applies the flags to the configuration's window.
    pub(super) fn over(&self, window: &SlidingWindow) -> SlidingWindow {
        let mut window = window.clone();
        if !self.flips.is_empty() {
            window.flips = self.flips.iter().map(|flip| (*flip).into()).collect();
        }
        window
    }
}

/// A segmenting network with its manifest.
pub(super) struct Segmenting {
    pub(super) net: Net,
    pub(super) manifest: ModelManifest,
}

impl Segmenting {
    /// Loads a network from a folder of models.
    pub(super) fn open(dir: &Path, network: Network, device: &Device) -> anyhow::Result<Self> {
        Ok(match network {
            Network::Critic => Self {
                manifest: load_manifest(dir, Role::Critic)?,
                net: Bundle::load_critic(dir, device)?.critic,
            },
            Network::Segmentor => {
                let loaded = load_segmentor(dir, device)?;
                Self {
                    net: loaded.model,
                    manifest: loaded.manifest,
                }
            }
        })
    }

    /// Refuses a store of other labels, another window or, because predictions are not resampled there, another voxel size.
    pub(super) fn check_store(&self, store: &Plan) -> Result<(), CheckpointError> {
        let (name, plan) = (self.manifest.role.name(), &self.manifest.plan);
        check_plan((name, plan), ("the store", store))?;
        check_spacing((name, plan), ("the store", store))
    }

    /// Names the network by its role and hash.
    pub(super) fn title(&self) -> String {
        format!("{} {}", self.manifest.role.name(), self.hash())
    }

    /// Returns the hash of the manifest, which holds the weights' checksum: of a critic alone it is its bundle's hash.
    pub(super) fn hash(&self) -> Digest {
        Digest::of_json(&[&self.manifest])
    }
}

/// Loads a folder of models, if one is named.
pub(super) fn open_models(dir: Option<&Path>, compute: &Compute) -> anyhow::Result<Option<Arc<Bundle>>> {
    let load = |dir: &Path| {
        Bundle::load(dir, &compute.device).with_context(|| format!("cannot load models from {}", dir.display()))
    };
    let bundle = dir.map(load).transpose()?;
    Ok(bundle.map(|bundle| Arc::new(bundle.with_compute_dtype(compute.dtype))))
}

/// Returns the name under which a folder of models is listed.
pub(super) fn models_name(dir: Option<&Path>) -> String {
    let name = dir
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "none".into())
}

/// The file in a root of models that tells which of them are active, by the hash of those that a server was started with.
const ACTIVATIONS: &str = ".active.json";
const MAX_ACTIVATIONS: usize = 32;
const MAX_ACTIVATIONS_BYTES: u64 = 1 << 16;

/// A folder of folders of models, which are loaded by name; without it, there are none.
pub(super) struct ModelsRoot {
    root: Option<PathBuf>,
    compute: Compute,
}

impl ModelsRoot {
    /// Refuses a root that is no folder.
    pub(super) fn new(root: Option<PathBuf>, compute: Compute) -> anyhow::Result<Self> {
        if let Some(root) = &root {
            fs_err::read_dir(root).context("--models-root: expected a folder")?;
        }
        Ok(Self { root, compute })
    }
}

impl ModelSource for ModelsRoot {
    fn names(&self) -> Vec<String> {
        let entries = self.root.as_deref().and_then(|root| fs_err::read_dir(root).ok());
        let critic = format!("{}.json", Role::Critic.name());
        let holds = |dir: &Path| dir.join(&critic).exists();
        let found = entries.into_iter().flatten().flatten();
        let found = found.filter(|entry| holds(&entry.path()));
        let names = found.filter_map(|entry| entry.file_name().into_string().ok());
        // A promotion that is not done has a name that starts with a dot.
        names.filter(|name| !name.starts_with('.')).collect()
    }

    fn load(&self, name: &str) -> Result<Bundle, ModelsError> {
        // Only what is listed: a name is never a path.
        let (Some(root), true) = (&self.root, self.names().iter().any(|known| known == name)) else {
            return Err(ModelsError::Unknown(name.chars().take(80).collect()));
        };
        let loaded = Bundle::load(&root.join(name), &self.compute.device);
        let bundle = loaded.map_err(|source| ModelsError::Damaged {
            name: name.into(),
            source: source.into(),
        })?;
        Ok(bundle.with_compute_dtype(self.compute.dtype))
    }

    fn remember(&self, started_with: Digest, active: &Activation) -> std::io::Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        let mut all = self.activations();
        all.insert(started_with, active.clone());
        while all.len() > MAX_ACTIVATIONS {
            let other = all.keys().find(|key| **key != started_with).copied();
            other.map(|other| all.remove(&other));
        }
        let json = serde_json::to_vec(&all).expect("names and hashes are representable in JSON");
        write_atomically(&root.join(ACTIVATIONS), &json)
    }

    fn remembered(&self, started_with: Digest) -> Option<Activation> {
        self.activations().remove(&started_with)
    }
}

impl ModelsRoot {
    /// Reads what is active in place of which models.
    fn activations(&self) -> BTreeMap<Digest, Activation> {
        let Some(root) = &self.root else { return BTreeMap::new() };
        let path = root.join(ACTIVATIONS);
        let mut json = Vec::new();
        let read = fs_err::File::open(&path).and_then(|file| file.take(MAX_ACTIVATIONS_BYTES).read_to_end(&mut json));
        match read {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return BTreeMap::new(),
            Err(error) => tracing::warn!(%error, "cannot read which models were active"),
            Ok(_) => {}
        }
        serde_json::from_slice(&json).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "does not say which models were active");
            BTreeMap::new()
        })
    }
}

/// Starts the in-process service, and returns it with the recipe of clients that name none.
pub(super) fn start_service(
    config: &Config,
    store: Arc<Store>,
    bundle: Option<Arc<Bundle>>,
) -> anyhow::Result<(Arc<Streams>, Recipe)> {
    let mut recipe = config.recipe.clone();
    if bundle.is_none() {
        tracing::info!("no models: the default recipe is analytic synthesis with the gate off");
        recipe.synthesizer = Some(SynthesizerKind::Analytic);
        recipe.gate.enabled = false;
    }
    Ok((Streams::start(store, bundle, config.stream.clone())?, recipe))
}
