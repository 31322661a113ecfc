//! Opens stores and bundles of models for the commands that need them.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;

use super::device::Compute;
use crate::checkpoint::Bundle;
use crate::config::Config;
use crate::store::Store;
use crate::stream::Streams;
use crate::stream::recipe::Recipe;
use crate::synth::SynthesizerKind;

/// Opens a store.
pub(super) fn open_store(dir: &Path, config: &Config) -> anyhow::Result<Arc<Store>> {
    let store = Store::open(dir).with_context(|| format!("cannot open the store {}", dir.display()))?;
    Ok(Arc::new(store.with_config(&config.store)))
}

/// Loads a folder of models, if one is named.
pub(super) fn open_models(dir: Option<&Path>, compute: &Compute) -> anyhow::Result<Option<Arc<Bundle>>> {
    let load = |dir: &Path| {
        Bundle::load(dir, &compute.device).with_context(|| format!("cannot load models from {}", dir.display()))
    };
    let bundle = dir.map(load).transpose()?;
    Ok(bundle.map(|bundle| Arc::new(bundle.with_compute_dtype(compute.dtype))))
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
