//! `freetumor evaluate`: scores a model on the labelled cases of a store.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::device::{Compute, DeviceArgs};
use super::models::{Network, Segmenting, WindowArgs, open_store};
use super::{ConfigArgs, say, say_error, say_json};
use crate::checkpoint::{Provenance, check_plan};
use crate::evaluate::{
    Examination, HeldOut, HeldOutSettings, LesionRates, ReportHead, Slice, Summary, html, score_held_out,
};
use crate::store::Cases;
use crate::stream::seen_cases;

/// How many cases a report shows a slice of: about 30 kB each.
const MOST_SLICES: usize = 40;

/// Score a critic or segmentor on the labelled cases of a store: Dice, NSD and HD95 per class, lesions by size
///
/// Cases that the model was trained on, and near-duplicates of them, are left out; their number is printed.
/// `docs/evaluation.md` defines every measure.
///
/// Examples:
///   freetumor evaluate --config configs/demo.toml --store store --models models --network segmentor --json
///   freetumor evaluate --config configs/demo.toml --store store --models assets/demo --network critic --report scores.html
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
    window: WindowArgs,
    /// Write plots, tables and slices as one HTML file that opens without a network
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
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
    let (name, hash) = (network.manifest.role.name(), network.hash());
    check_plan((name, &network.manifest.plan), ("the store", store.plan()))?;
    let unseen = unseen_cases(&*store, &Provenance::of(&[&network.manifest]));
    let held_out = config.segmentor.held_out;
    let settings = HeldOutSettings {
        window: args.window.over(&held_out.window),
        ..held_out
    };
    let exam = Examination {
        net: &network.net.with_compute_dtype(dtype),
        device: &device,
        cases: &*store,
        held_out: &unseen,
        settings: &settings,
    };
    let plan = store.plan();
    let mut slices = Vec::new();
    let scores = score_held_out(&exam, &mut |scored| {
        say_error(&format!("scored {}", scored.score.case));
        if args.report.is_some() && slices.len() < MOST_SLICES {
            slices.push(Slice::of(scored, &plan.labels, plan.window_hu));
        }
    })?;
    if scores.cases.is_empty() {
        bail!(
            "no labelled case in {} that the model was not trained on",
            args.store.display()
        );
    }
    if let Some(path) = &args.report {
        let head = ReportHead {
            model: &format!("{name} {hash}"),
            snapshot: &store.snapshot().to_string(),
        };
        fs_err::write(path, html(&head, &scores, &slices)).context("cannot write the report")?;
    }
    if args.json {
        say_json(&scores)?
    } else {
        print(&scores)
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists the cases that a model was not trained on, and says how many others there are.
fn unseen_cases(store: &dyn Cases, provenance: &Provenance) -> Vec<usize> {
    let seen = seen_cases(store, provenance);
    let unseen: Vec<usize> = (0..seen.len()).filter(|case| !seen[*case]).collect();
    if unseen.len() < seen.len() {
        say_error(&format!(
            "{} cases left out: the model was trained on them or on near-duplicates of them",
            seen.len() - unseen.len()
        ));
    }
    unseen
}

fn print(scores: &HeldOut) {
    let shown = |summary: &Summary| match (summary.mean, summary.interval) {
        (Some(mean), Some([low, high])) => format!("{mean:.3} [{low:.3}, {high:.3}]"),
        (Some(mean), None) => format!("{mean:.3}"),
        _ => "-".into(),
    };
    say(&format!(
        "{} cases; means over patients with 95 % intervals",
        scores.cases.len()
    ));
    let head = ["class", "Dice", "NSD", "HD95 mm", "cases", "false alarms"];
    let [class, dice, nsd, hd95, cases, alarms] = head;
    say(&format!(
        "{class:18} {dice:22} {nsd:22} {hd95:26} {cases:>5} {alarms:>12}"
    ));
    for (class, score) in &scores.classes {
        say(&format!(
            "{class:18} {:22} {:22} {:26} {:>5} {:>12}",
            shown(&score.dice_by_patient),
            shown(&score.nsd),
            shown(&score.hd95_mm),
            score.cases,
            score.false_alarms
        ));
    }
    for (organ, lesions) in &scores.lesions {
        print_lesions(organ, "all", &lesions.all);
        for (size, rates) in &lesions.by_size {
            print_lesions(organ, size.name(), rates);
        }
        let free = &lesions.tumour_free;
        if free.cases > 0 {
            say(&format!(
                "{organ}: {} tumour-free cases, {} with false positives; per case {} ml in {} lesions",
                free.cases,
                free.with_any,
                shown(&free.volume_ml),
                shown(&free.lesions)
            ));
        }
    }
}

fn print_lesions(organ: &str, size: &str, rates: &LesionRates) {
    let shown = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
    let counts = &rates.counts;
    say(&format!(
        "{organ} lesions, {size}: {} of {} found, {} false positives; sensitivity {}, precision {}, F1 {}; touched {}",
        counts.matched,
        counts.truths,
        counts.false_positives,
        shown(rates.sensitivity.pooled),
        shown(rates.precision.pooled),
        shown(rates.f1.pooled),
        counts.touched
    ));
}
