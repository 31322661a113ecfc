//! `freetumor evaluate`: scores a model on the labelled cases of a store.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use super::device::{Compute, DeviceArgs};
use super::models::{Network, Segmenting, open_store};
use super::{ConfigArgs, say, say_error, say_json};
use crate::checkpoint::{Provenance, check_plan};
use crate::evaluate::{Examination, HeldOut, score_held_out};
use crate::store::Cases;
use crate::stream::seen_cases;

/// Score a critic or segmentor on the labelled cases of a store: Dice per class, lesions found by size
///
/// Cases that the model was trained on, and near-duplicates of them, are left out; their number is printed.
///
/// Example: freetumor evaluate --config configs/demo.toml --store store --models models --network segmentor --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The folder of models
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// Which network
    #[arg(long, value_enum, default_value = "segmentor")]
    network: Network,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let Compute { device, dtype } = args.device.open()?;
    let store = open_store(&args.store, &config)?;
    let network = Segmenting::open(&args.models, args.network, &device)?;
    let name = network.manifest.role.name();
    check_plan((name, &network.manifest.plan), ("the store", store.plan()))?;
    let provenance = Provenance::of(&[&network.manifest]);
    let records = store.records();
    let seen = seen_cases(&*store, &provenance);
    let unseen: Vec<usize> = (0..records.len()).filter(|case| !seen[*case]).collect();
    if unseen.len() < records.len() {
        say_error(&format!(
            "{} cases left out: the model was trained on them or on near-duplicates of them",
            records.len() - unseen.len()
        ));
    }
    let exam = Examination {
        net: &network.net.with_compute_dtype(dtype),
        device: &device,
        cases: &*store,
        held_out: &unseen,
        settings: &config.segmentor.held_out,
    };
    let scores = score_held_out(&exam, &mut |scored| {
        say_error(&format!("scored {}", scored.score.case));
    })?;
    if scores.cases.is_empty() {
        bail!(
            "no labelled case in {} that the model was not trained on",
            args.store.display()
        );
    }
    if args.json {
        say_json(&scores)?
    } else {
        print(&scores)
    }
    Ok(ExitCode::SUCCESS)
}

fn print(scores: &HeldOut) {
    say(&format!("{} cases", scores.cases.len()));
    for (class, score) in &scores.classes {
        let dice = score.dice.map_or("-".into(), |dice| format!("{dice:.3}"));
        say(&format!("{class:20} dice {dice}"));
    }
}
