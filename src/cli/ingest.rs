//! `freetumor ingest`: NIfTI files and DICOM series into a store.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::progress::Counter;
use super::{ConfigArgs, say, say_error, say_json};
use crate::ingest::{IngestReport, IngestRequest, Preset, Shard, Status, datalist, ingest, preset_table};

/// Ingest NIfTI or DICOM images and labels into a store: orient, resample to the plan's spacing, check, write
///
/// One bad case never stops the others: it is reported with its reason, and the exit code is then 1.
///
/// Examples:
///   freetumor ingest --config configs/abdomen.toml --datalist Task03_Liver/dataset.json --preset lits --store store
///   freetumor ingest --config configs/demo.toml --image ct.nii.gz --labels seg.nii.gz --preset totalsegmentator --store store
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Medical Segmentation Decathlon JSON with `training`, `validation`, `unlabeled`
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "image",
        required_unless_present_any = ["image", "list_presets"]
    )]
    datalist: Option<PathBuf>,
    /// One image: a NIfTI file, or the folder of a DICOM series
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// Its labels: a NIfTI file, or a folder of masks
    #[arg(long, value_name = "PATH", requires = "image")]
    labels: Option<PathBuf>,
    /// What label ids mean: a name that --list-presets prints, such as lits, or a TOML file
    #[arg(long, value_name = "NAME", required_unless_present = "list_presets")]
    preset: Option<String>,
    /// The store's folder
    #[arg(long, value_name = "DIR", required_unless_present = "list_presets")]
    store: Option<PathBuf>,
    /// Take part i of n of the cases, such as 0/8
    #[arg(long, value_name = "I/N", default_value = "0/1")]
    shard: Shard,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Print the presets: data sets, what their ids mean, licences and pages
    #[arg(long)]
    list_presets: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.list_presets {
        say(preset_table().trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let (Some(preset), Some(store)) = (&args.preset, &args.store) else {
        bail!("nowhere to ingest to: name --preset and --store");
    };
    let config = args.config.load()?;
    let entries = match (&args.datalist, &args.image) {
        (Some(list), _) => datalist::read(list)?,
        (None, Some(image)) => vec![datalist::single(image, args.labels.as_deref())],
        (None, None) => bail!("nothing to ingest: name --datalist or --image"),
    };
    let request = IngestRequest {
        entries,
        preset: Preset::open(preset)?,
        options: config.ingest,
        shard: args.shard,
    };
    let counter = Counter::new(request.entries.len(), "ingest");
    let report = ingest(&request, store, &config.plan, &|progress| {
        counter.done(&progress.case.id)
    })
    .with_context(|| format!("cannot ingest into {}", store.display()))?;
    if args.json {
        say_json(&report)?;
    } else {
        print(&report);
    }
    let whole = report.count(Status::Refused) == 0 && report.damaged.is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &IngestReport) {
    for case in &report.cases {
        for warning in &case.warnings {
            say(&format!("{}: warning: {warning}", case.id));
        }
        if let Some(reason) = &case.reason {
            say_error(&format!("{}: refused: {reason}", case.id));
        }
    }
    report
        .warnings
        .iter()
        .for_each(|warning| say(&format!("warning: {warning}")));
    report
        .damaged
        .iter()
        .for_each(|file| say_error(&format!("left out of the index: {file}")));
    let [ok, skipped, refused] = [Status::Ok, Status::Skipped, Status::Refused].map(|status| report.count(status));
    say(&format!(
        "{ok} stored, {skipped} already there, {refused} refused; {} cases in the store",
        report.indexed
    ));
}
