//! `freetumor info`: what this binary, a store and a folder of models are.

use std::path::PathBuf;
use std::process::ExitCode;

use super::device::Compute;
use super::models::{open_models, open_store};
use super::{say, say_json};
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
    if let Some(bundle) = open_models(args.models.as_deref(), &Compute::cpu())? {
        facts["models"] = serde_json::json!({
            "bundle": bundle.hash,
            "plan": bundle.plan,
            "generator": bundle.generator.is_some(),
            "discriminator": bundle.discriminator.is_some(),
            "provenance_known": bundle.provenance.known,
            "trained_on": bundle.provenance.source_hashes.len(),
        });
    }
    if args.json {
        say_json(&facts)?;
    } else {
        print("", &facts);
    }
    Ok(ExitCode::SUCCESS)
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
