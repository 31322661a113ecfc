//! `freetumor label-organs`: organ labels by a model for the cases of a store that have none.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::device::{Compute, DeviceArgs};
use super::models::{Network, Segmenting, open_store};
use super::progress::Counter;
use super::{say, say_error, say_json};
use crate::checkpoint::ModelManifest;
use crate::config::Config;
use crate::evaluate::{SlidingWindow, predict};
use crate::organs::{CaseOutcome, CaseStatus, LabelReport, LabelRequest, OrganReport, OrganVerdict, label_organs};
use crate::store::{Cases, PSEUDO_PREFIX};
use crate::volume::SizeClass;

/// Label the organs of unlabelled cases with a trained critic or segmentor, so that they can host lesions
///
/// Every organ is checked: its pieces, volume and HU. What is implausible is refused and counts as unknown; what the model
/// calls tumour becomes 255 (ignore). Images stay as they are. Labelled cases are never touched. A case that cannot be
/// read is reported and stops no other; the exit code is then 1.
///
/// Example: freetumor label-organs --store store --model models --case ct_0001 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The folder of models
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Which network of the folder [default: the segmentor where there is one, else the critic]
    #[arg(long, value_enum)]
    network: Option<Network>,
    /// Only this case; may be repeated [default: all cases without organ labels]
    #[arg(long = "case", value_name = "ID")]
    cases: Vec<String>,
    /// Replace organ labels that are there, annotators' as well
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let Compute { device, dtype } = args.device.open()?;
    let choice = args.network.unwrap_or_else(|| Network::of_folder(&args.model));
    let network = Segmenting::open(&args.model, choice, &device)
        .with_context(|| format!("cannot load a model from {}", args.model.display()))?;
    network.check_store(open_store(&args.store, &Config::default())?.plan())?;
    let window = window_of(&network.manifest);
    let labels_by = format!("{PSEUDO_PREFIX}{}", network.hash());
    let net = network.net.with_compute_dtype(dtype);
    let request = LabelRequest {
        dir: &args.store,
        labels_by: &labels_by,
        only: &args.cases,
        replace: args.replace,
    };
    let mut counter = None;
    let report = label_organs(
        &request,
        &mut |store, case| predict(&net, store, case, &window, &device),
        &mut |progress| {
            let counter = counter.get_or_insert_with(|| Counter::new(progress.total, "label organs"));
            counter.done(&progress.case.id);
        },
    )
    .with_context(|| format!("cannot label cases of {}", args.store.display()))?;
    if args.json {
        say_json(&report)?;
    } else {
        print(&report);
    }
    let whole = report.count(CaseStatus::Refused) == 0 && report.damaged.is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns the window that a network was trained on: a segmentor's or an imported critic's patch, a critic's cube for medium lesions.
fn window_of(manifest: &ModelManifest) -> SlidingWindow {
    let window = match &manifest.cubes[..] {
        [d, h, w] => [*d, *h, *w],
        cubes => cubes.get(SizeClass::Medium as usize).map_or([64; 3], |side| [*side; 3]),
    };
    SlidingWindow {
        window,
        ..SlidingWindow::default()
    }
}

fn print(report: &LabelReport) {
    let head = ["case", "organ", "ml", "pieces", "HU", "verdict"];
    say(&format!(
        "{:24} {:10} {:>7} {:>6} {:>10}  {}",
        head[0], head[1], head[2], head[3], head[4], head[5]
    ));
    report.cases.iter().for_each(print_case);
    let [labelled, skipped, implausible, refused] = [
        CaseStatus::Labelled,
        CaseStatus::Skipped,
        CaseStatus::Implausible,
        CaseStatus::Refused,
    ]
    .map(|status| report.count(status));
    let damaged = report.damaged.iter();
    damaged.for_each(|file| say_error(&format!("left out of the index: {file}")));
    say(&format!(
        "{labelled} labelled, {skipped} skipped, {implausible} without a plausible organ, {refused} refused; {} cases in the \
         store; {}",
        report.indexed, report.labels_by
    ));
}

fn print_case(case: &CaseOutcome) {
    match (&case.reason, case.status) {
        (Some(reason), CaseStatus::Refused) => say_error(&format!("{}: refused: {reason}", case.id)),
        (Some(reason), _) => say(&format!("{:24} skipped: {reason}", case.id)),
        (None, _) => case.organs.iter().for_each(|organ| print_organ(&case.id, organ)),
    }
}

fn print_organ(id: &str, organ: &OrganReport) {
    let verdict = match organ.verdict {
        OrganVerdict::Accepted => "accepted",
        OrganVerdict::Refused => "refused",
        OrganVerdict::Absent => "absent",
    };
    let hu = match (organ.mean_hu, organ.spread_hu) {
        (Some(mean), Some(spread)) => format!("{mean:.0} +- {spread:.0}"),
        _ => "-".into(),
    };
    let pieces = format!("{}/{}", organ.kept, organ.components);
    let remarks: Vec<&str> = organ.reasons.iter().chain(&organ.notes).map(String::as_str).collect();
    let colon = if remarks.is_empty() { "" } else { ": " };
    say(&format!(
        "{id:24} {:10} {:>7.0} {pieces:>6} {hu:>10}  {verdict}{colon}{}",
        organ.organ,
        organ.volume_ml,
        remarks.join("; ")
    ));
}
