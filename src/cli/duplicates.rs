//! `freetumor duplicates`: which cases of a store show one scan.

use std::path::PathBuf;
use std::process::ExitCode;

use super::models::open_store;
use super::{say, say_json};
use crate::config::Config;
use crate::store::{Cases, Duplicate, duplicates};

/// List the cases of a store that show one scan: the same voxels, or the same scan saved differently
///
/// Near-duplicates are found when cases are ingested; this reads them from the index. docs/ingest.md says what is found, and
/// how often what is not one.
///
/// Example: freetumor duplicates --store store --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let store = open_store(&args.store, &Config::default())?;
    let found = duplicates(store.records(), store.near_duplicates());
    if args.json {
        say_json(&found)?;
        return Ok(ExitCode::SUCCESS);
    }
    found.iter().for_each(|pair| say(&sentence(pair)));
    say(&format!("{} pairs among {} cases", found.len(), store.records().len()));
    Ok(ExitCode::SUCCESS)
}

/// Says how two cases are alike.
pub(super) fn sentence(pair: &Duplicate) -> String {
    let Duplicate {
        first, second, score, ..
    } = pair;
    match score {
        None => format!("{second} holds the same voxels as {first}"),
        Some(score) => format!("{second} looks like {first}, saved differently (score {score})"),
    }
}
