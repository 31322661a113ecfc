//! `freetumor ingest`: NIfTI files and DICOM series into a store.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::duplicates::sentence;
use super::progress::Counter;
use super::{ConfigArgs, say, say_error, say_json};
use crate::ingest::{
    CaseReport, IngestReport, IngestRequest, Preset, Shard, Status, datalist, ingest, nnunet_plans, preset_table,
};

/// How many stored cases are listed.
const STORED_SHOWN: usize = 20;
/// How many cases with warnings or refused are listed.
const NOTED_SHOWN: usize = 50;

/// Ingest NIfTI or DICOM images and labels into a store: orient, resample to the plan's spacing, check, write
///
/// One bad case never stops the others: it is reported with its reason.
///
/// Exit codes: 0 all cases are stored, 1 some were refused or nothing could be done, 2 wrong usage.
///
/// Examples:
///   freetumor ingest --config configs/abdomen.toml --datalist Task03_Liver/dataset.json --preset msd-liver --store store
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
    /// Take spacing and patch size from nnU-Net's plans file instead of the configuration
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Which configuration of the plans file
    #[arg(long, value_name = "NAME", requires = "plan", default_value = "3d_fullres")]
    configuration: String,
    /// The store's folder
    #[arg(long, value_name = "DIR", required_unless_present = "list_presets")]
    store: Option<PathBuf>,
    /// Take part i of n of the cases, such as 0/8
    #[arg(long, value_name = "I/N", default_value = "0/1")]
    shard: Shard,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Write the report as JSON to a file: per case seconds, source and stored shape, organs in ml, tumours, warnings
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
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
    let mut plan = config.plan;
    if let Some(plans) = &args.plan {
        plan = nnunet_plans::apply(plans, &args.configuration, &plan)?;
        say_error(&format!(
            "[plan] spacing_mm = {:?}, patch = {:?}: put this into the configuration of what works on the store",
            plan.spacing_mm, plan.patch
        ));
    }
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
    let report = ingest(&request, store, &plan, &|progress| counter.done(&progress.case.id))
        .with_context(|| format!("cannot ingest into {}", store.display()))?;
    if let Some(path) = &args.report {
        fs_err::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    if args.json {
        say_json(&report)?;
    } else {
        print(&report);
    }
    let whole = report.count(Status::Refused) == 0 && report.damaged.is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &IngestReport) {
    let stored: Vec<_> = report.cases.iter().filter(|case| case.stored.is_some()).collect();
    if !stored.is_empty() {
        say("seconds  source             stored             tumours  case, organs in ml");
    }
    stored
        .iter()
        .take(STORED_SHOWN)
        .filter_map(|case| row(case))
        .for_each(|row| say(&row));
    say_rest(stored.len(), STORED_SHOWN, "stored cases");
    let is_worth_a_word = |case: &&CaseReport| case.reason.is_some() || !case.warnings.is_empty();
    let noted: Vec<_> = report.cases.iter().filter(is_worth_a_word).collect();
    for case in noted.iter().take(NOTED_SHOWN) {
        for warning in &case.warnings {
            say(&format!("{}: warning: {warning}", case.id));
        }
        if let Some(reason) = &case.reason {
            say_error(&format!("{}: refused: {reason}", case.id));
        }
    }
    say_rest(noted.len(), NOTED_SHOWN, "cases with warnings or refused");
    report
        .warnings
        .iter()
        .for_each(|warning| say(&format!("warning: {warning}")));
    report
        .damaged
        .iter()
        .for_each(|file| say_error(&format!("left out of the index: {file}")));
    for pair in &report.duplicates {
        say(&format!("warning: {}", sentence(pair)));
    }
    let [ok, skipped, refused] = [Status::Ok, Status::Skipped, Status::Refused].map(|status| report.count(status));
    say(&format!(
        "{ok} stored, {skipped} already there, {refused} refused; {} cases in the store",
        report.indexed
    ));
}

/// Says how many lines were left out.
fn say_rest(all: usize, shown: usize, what: &str) {
    if all > shown {
        say(&format!("... and {} more {what}; --report FILE has all", all - shown));
    }
}

/// Returns a stored case's line of the table.
fn row(case: &CaseReport) -> Option<String> {
    let stored = case.stored.as_ref()?;
    let sides = |shape: [usize; 3]| shape.map(|side| side.to_string()).join(" x ");
    let organs: Vec<String> = (stored.organs_ml.iter())
        .map(|(name, ml)| format!("{name} {ml:.0}"))
        .collect();
    let row = format!(
        "{:>7.1}  {:<17}  {:<17}  {:>7}  {}  {}",
        case.seconds,
        sides(stored.source_shape),
        sides(stored.shape),
        stored.tumours,
        case.id,
        organs.join(", ")
    );
    Some(row.trim_end().to_string())
}
