//! `freetumor evaluate`: scores a model on the labelled cases of a store, or on scans on their own grids.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use burn::tensor::Device;
use serde::Serialize;

use super::device::DeviceArgs;
use super::models::{Network, Segmenting, WindowArgs, open_store};
use super::{ConfigArgs, check_folder, say, say_error, say_json};
use crate::checkpoint::{ModelManifest, Provenance, write_atomically};
use crate::evaluate::{
    CaseScore, Comparison, Examination, HeldOut, HeldOutSettings, LeftOut, LesionRates, Predictor, ReportHead, Scored,
    Slice, Summary, chosen, html, score_case,
};
use crate::ingest::{IngestConfig, LabelledScan, Preset, datalist, labels_on_grid, read_labelled};
use crate::nn::Network as Net;
use crate::store::{CaseKind, Cases};
use crate::stream::{is_seen, seen_patients};
use crate::volume::Annotation;

/// How many cases a report shows a slice of: about 30 kB each.
const MOST_SLICES: usize = 40;

/// Score a critic or segmentor on labelled cases: Dice, NSD and HD95 per class, lesions by size
///
/// Of a store on the store's grid; of a datalist on the grid of every scan's own file, as challenges score. Cases that the
/// model was trained on, near-duplicates of them and, in a store, other scans of their patients are left out; their number
/// is printed. `docs/evaluation.md` defines every measure.
///
/// Examples:
///   freetumor evaluate --config configs/demo.toml --store store --models models --network segmentor --json
///   freetumor evaluate --config configs/demo.toml --store store --models assets/demo --network critic --report scores.html
///   freetumor evaluate --config configs/abdomen.toml --datalist dataset.json --preset msd-liver --models models --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["store", "datalist"])))]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Medical Segmentation Decathlon JSON instead: the scans with labels of all its lists, on their own grids
    #[arg(long, value_name = "FILE", requires = "preset")]
    datalist: Option<PathBuf>,
    /// What its label ids mean: a name that `ingest --list-presets` prints, or a TOML file
    #[arg(long, value_name = "NAME", requires = "datalist")]
    preset: Option<String>,
    /// The folder of models
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// Which network of the folder [default: the segmentor where there is one, else the critic]
    #[arg(long, value_enum)]
    network: Option<Network>,
    #[command(flatten)]
    window: WindowArgs,
    /// Score at most so many cases, instead of `segmentor.held_out.cases`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cases: Option<u32>,
    /// Score controls, too: unlabelled cases that are taken for tumour-free, in which every tumour that is found is a false one
    #[arg(long)]
    controls: bool,
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
    let compute = args.device.open()?;
    let choice = args.network.unwrap_or_else(|| Network::of_folder(&args.models));
    let network = Segmenting::open(&args.models, choice, &compute.device)?;
    let held_out = config.segmentor.held_out.clone();
    let labels = &network.manifest.plan.labels;
    if let Some(class) = held_out.tolerance.unknown(labels) {
        let known: Vec<&str> = labels.iter().map(|(name, _)| name).collect();
        bail!("segmentor.held_out.tolerance.class_mm.{class}: expected a class of the model, one of {known:?}");
    }
    if let Some(path) = &args.report {
        check_folder("--report", path)?;
    }
    let model = network.title();
    say_error(&format!("model: {model}"));
    let exam = Exam {
        net: network.net.clone().with_compute_dtype(compute.dtype),
        device: compute.device,
        manifest: &network.manifest,
        settings: HeldOutSettings {
            window: args.window.over(&held_out.window),
            cases: args.cases.map_or(held_out.cases, |cases| cases as usize),
            ..held_out
        },
        controls: args.controls,
        is_illustrated: args.report.is_some(),
    };
    let done = match (&args.store, &args.datalist, &args.preset) {
        (Some(store), _, _) => {
            let store = open_store(store, &config)?;
            network.check_store(store.plan())?;
            exam.of_store(&*store)
        }
        (_, Some(list), Some(preset)) => exam.of_scans(list, &Preset::open(preset)?, &config.ingest)?,
        _ => bail!("nothing to evaluate on: name --store, or --datalist and --preset"),
    };
    let Examined {
        scores,
        slices,
        of_what,
        left_out,
    } = done;
    if scores.cases.is_empty() {
        bail!("no labelled case in {of_what} that the model was not trained on");
    }
    if args.json {
        say_json(&Document {
            model: &model,
            evaluated_on: &of_what,
            left_out,
            scores: &scores,
        })?
    } else {
        print(&scores)
    }
    if let Some(path) = &args.report {
        let head = ReportHead {
            model: &model,
            snapshot: &of_what,
            left_out,
        };
        let page = html(&head, &scores, &slices);
        write_atomically(path, page.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if left_out.refused == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Document<'a> {
    /// Role and hash of the network.
    model: &'a str,
    /// The store's snapshot, or the datalist.
    evaluated_on: &'a str,
    left_out: LeftOut,
    #[serde(flatten)]
    scores: &'a HeldOut,
}

/// A network, and how it is scored.
struct Exam<'a> {
    net: Net,
    device: Device,
    manifest: &'a ModelManifest,
    settings: HeldOutSettings,
    /// Whether cases count that are tumour-free by assumption.
    controls: bool,
    is_illustrated: bool,
}

/// What came out.
struct Examined {
    scores: HeldOut,
    slices: Vec<Slice>,
    /// Snapshot of the store, or the datalist.
    of_what: String,
    left_out: LeftOut,
}

impl Exam<'_> {
    /// Scores cases one after the other on the store's grid; one that is damaged is reported and stops no other.
    fn of_store(&self, store: &dyn Cases) -> Examined {
        let seen = seen_patients(store, &Provenance::of(&[self.manifest]));
        let unseen: Vec<usize> = (0..seen.len()).filter(|case| !seen[*case]).collect();
        let is_known = |case: &&usize| {
            let record = &store.records()[**case];
            self.knows(record.kind, &record.annotation)
        };
        let known = unseen.iter().filter(is_known).count();
        let mut left_out = LeftOut {
            trained_on: seen.len() - unseen.len(),
            unannotated: unseen.len() - known,
            beyond_limit: known.saturating_sub(self.settings.cases),
            refused: 0,
        };
        self.say_left_out(left_out);
        let exam = Examination {
            net: &self.net,
            device: &self.device,
            cases: store,
            held_out: &unseen,
            settings: &self.settings,
        };
        let (mut scores, mut slices) = (Vec::new(), Vec::new());
        let known: Vec<usize> = unseen.iter().filter(is_known).copied().collect();
        for case in chosen(store, known, self.settings.cases) {
            match score_case(&exam, case, &mut |scored| self.note(scored, &mut slices)) {
                Ok(score) => scores.push(score),
                Err(error) => {
                    left_out.refused += 1;
                    say_error(&format!("{}: refused: {error}", store.records()[case].id));
                }
            }
        }
        Examined {
            scores: HeldOut::of(scores, &store.plan().labels, &self.settings),
            slices,
            of_what: store.snapshot().to_string(),
            left_out,
        }
    }

    /// Scores scans one after the other on the grids of their files; one that cannot be read is reported and stops no other.
    fn of_scans(&self, list: &Path, preset: &Preset, options: &IngestConfig) -> anyhow::Result<Examined> {
        let plan = &self.manifest.plan;
        preset.resolve(plan)?;
        let provenance = Provenance::of(&[self.manifest]);
        let (mut scores, mut slices) = (Vec::new(), Vec::new());
        let mut left_out = LeftOut::default();
        for entry in datalist::read(list)? {
            if scores.len() == self.settings.cases {
                left_out.beyond_limit += 1;
                continue;
            }
            match read_labelled(&entry, (preset, plan), options) {
                Ok(Some(scan)) if is_seen(&scan.source_hash, &scan.fingerprint, &provenance) => {
                    left_out.trained_on += 1;
                }
                Ok(Some(scan)) if self.knows(scan.kind, &scan.annotation) => {
                    for remark in &scan.planned.remarks {
                        say_error(&format!("{}: warning: {remark}", entry.id));
                    }
                    scores.push(self.score(&entry.id, &scan, &mut slices)?);
                }
                Ok(_) => left_out.unannotated += 1,
                Err(error) => {
                    left_out.refused += 1;
                    say_error(&format!("{}: refused: {error}", entry.id));
                }
            }
        }
        self.say_left_out(left_out);
        Ok(Examined {
            scores: HeldOut::of(scores, &plan.labels, &self.settings),
            slices,
            of_what: list.display().to_string(),
            left_out,
        })
    }

    /// Tells whether a case's tumours are known: annotated, or none by an assumption that is to count.
    fn knows(&self, kind: CaseKind, annotation: &Annotation) -> bool {
        kind == CaseKind::Labelled || (self.controls && annotation.assumed_tumour_free)
    }

    fn score(&self, id: &str, scan: &LabelledScan, slices: &mut Vec<Slice>) -> anyhow::Result<CaseScore> {
        let plan = &self.manifest.plan;
        let predictor = Predictor {
            net: &self.net,
            plan,
            settings: &self.settings.window,
            device: &self.device,
        };
        let probabilities = predictor.probabilities(&scan.planned.image);
        let prediction = labels_on_grid(&probabilities, &scan.planned.grid, &scan.grid);
        let comparison = Comparison {
            prediction: &prediction,
            truth: &scan.truth,
            annotation: &scan.annotation,
            spacing_mm: scan.grid.spacing_mm(),
        };
        let score = comparison
            .measure(&plan.labels, &self.settings.tolerance)?
            .named(id, &scan.patient);
        let scored = Scored {
            score: &score,
            image: &scan.image,
            truth: &scan.truth,
            prediction: &prediction,
            spacing_mm: scan.grid.spacing_mm(),
        };
        self.note(&scored, slices);
        Ok(score)
    }

    /// Says what is not scored, apart from what cannot be read, which was said file by file.
    fn say_left_out(&self, left_out: LeftOut) {
        let limit = self.settings.cases;
        let unannotated = match self.controls {
            true => "nobody looked for tumours in them",
            false => "nobody looked for tumours in them (--controls scores those that are taken for tumour-free)",
        };
        let reasons = [
            (
                left_out.trained_on,
                "the model was trained on them, on near-duplicates or on other scans of their patients".to_string(),
            ),
            (left_out.unannotated, unannotated.into()),
            (left_out.beyond_limit, format!("at most {limit} are scored (--cases)")),
        ];
        for (cases, why) in reasons.iter().filter(|(cases, _)| *cases > 0) {
            say_error(&format!("{cases} cases left out: {why}"));
        }
    }

    fn note(&self, scored: &Scored, slices: &mut Vec<Slice>) {
        say_error(&format!("scored {}", scored.score.case));
        if self.is_illustrated && slices.len() < MOST_SLICES {
            let plan = &self.manifest.plan;
            slices.push(Slice::of(scored, &plan.labels, plan.window_hu));
        }
    }
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
