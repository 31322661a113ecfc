//! `freetumor phantom`: abdominal CT volumes that need no data.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::progress::Counter;
use super::{ConfigArgs, say};
use crate::config::Config;
use crate::phantom;
use crate::store::StoreWriter;

/// Make a store of phantom abdominal CT volumes: labelled ones with tumours, and healthy ones
///
/// Example: freetumor phantom --config configs/demo.toml --store phantom-store --labelled 24 --unlabelled 12
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Configuration (TOML) whose plan the store gets
    #[arg(long, value_name = "FILE", default_value = "configs/demo.toml")]
    config: PathBuf,
    /// The store's folder
    #[arg(long)]
    store: PathBuf,
    /// Labelled volumes with tumours
    #[arg(long, default_value_t = 24)]
    labelled: usize,
    /// Healthy volumes
    #[arg(long, default_value_t = 12)]
    unlabelled: usize,
    /// Seed of the cohort
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = ConfigArgs {
        config: Some(args.config.clone()),
    }
    .load()?;
    let made = make(&args.store, &config, [args.labelled, args.unlabelled], args.seed)?;
    say(&format!("{} cases in {}", made, args.store.display()));
    Ok(ExitCode::SUCCESS)
}

/// Writes a cohort of `[labelled, unlabelled]` volumes and returns how many cases the store then has.
pub(super) fn make(store: &std::path::Path, config: &Config, counts: [usize; 2], seed: u64) -> anyhow::Result<usize> {
    let (plan, settings) = (&config.plan, &config.phantom);
    let mut specs = settings.cohort(seed, counts[0], counts[1]);
    specs.iter_mut().for_each(|spec| spec.spacing_mm = plan.spacing_mm);
    // Opened first, so that a store of another plan is refused before the work and not after it.
    StoreWriter::create(store, plan).with_context(|| format!("cannot write {}", store.display()))?;
    let counter = Counter::new(specs.len(), "phantoms");
    let finished = phantom::write_cohort(store, plan, (settings, &specs), &|id| counter.done(id))?;
    Ok(finished.cases)
}
