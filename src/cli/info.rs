//! `freetumor info`: what this binary, a store and a folder of models are.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::device::Compute;
use super::models::{open_models, open_store};
use super::{say, say_json};
use crate::checkpoint::{Role, load_manifest};
use crate::config::Config;
use crate::kernel;
use crate::store::{CaseKind, Cases};
use crate::stream::recipe::REVISION;

/// Tell what this binary, a store and a folder of models are
///
/// Example: freetumor info --store store --models assets/demo --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// A folder of models
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut facts = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "revision": REVISION,
        "numerics": kernel::numerics(),
        "cuda": cfg!(feature = "cuda"),
    });
    if let Some(dir) = &args.store {
        let store = open_store(dir, &Config::default())?;
        let labelled = store
            .records()
            .iter()
            .filter(|record| record.kind == CaseKind::Labelled)
            .count();
        facts["store"] = serde_json::json!({
            "snapshot": store.snapshot(),
            "cases": store.records().len(),
            "labelled": labelled,
            "plan": store.plan(),
        });
    }
    if let Some(dir) = &args.models {
        facts["models"] = models(dir)?;
    }
    if args.json {
        say_json(&facts)?;
    } else {
        print("", &facts);
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells what a folder of models holds: every network, and the bundle where there is a critic.
fn models(dir: &Path) -> anyhow::Result<serde_json::Value> {
    let has = |role: Role| dir.join(format!("{}.json", role.name())).exists();
    let held: Vec<Role> = Role::ALL.into_iter().filter(|role| has(*role)).collect();
    let mut facts = serde_json::json!({});
    // A folder without any network is refused as one without a critic.
    let is_bundle = held.is_empty() || held.contains(&Role::Critic);
    let bundle = is_bundle.then(|| open_models(Some(dir), &Compute::cpu())).transpose()?;
    if let Some(bundle) = bundle.flatten() {
        facts = serde_json::json!({
            "bundle": bundle.hash,
            "plan": bundle.plan,
            "generator": bundle.generator.is_some(),
            "published_generator": bundle.published.is_some(),
            "discriminator": bundle.discriminator.is_some(),
            "provenance_known": bundle.provenance.known,
            "trained_on": bundle.provenance.source_hashes.len(),
        });
    }
    for role in held {
        let manifest = load_manifest(dir, role)?;
        facts["networks"][role.name()] = serde_json::json!({
            "architecture": manifest.architecture,
            "parameters": manifest.architecture.parameters(),
            "spacing_mm": manifest.plan.spacing_mm,
            "provenance_known": manifest.provenance_known,
            "imported": manifest.imported,
        });
    }
    Ok(facts)
}

/// Prints one line per fact, nested keys joined with dots.
fn print(prefix: &str, value: &serde_json::Value) {
    match value {
        serde_json::Value::Object(facts) => facts.iter().for_each(|(key, fact)| {
            let name = if prefix.is_empty() {
                key.clone()
            } else {
                format!("{prefix}.{key}")
            };
            print(&name, fact);
        }),
        other => say(&format!("{prefix:32} {other}")),
    }
}
