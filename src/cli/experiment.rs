//! `freetumor experiment`: trains and compares the arms of an experiment on phantoms.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use super::device::DeviceArgs;
use super::progress::Training;
use super::{ConfigArgs, say, say_error};
use crate::experiment::{Arm, Experiment, ExperimentError, RunKey, Setting, Workplace, page, pictures};
use crate::learn::LearnError;

/// Compare segmentors that learn from real tumours alone, from synthetic ones too, gated or not, and from the truth
///
/// Every run (arm, seed, number of patients) is trained, tested, and kept with its predictions under --out; a run that is done
/// is passed over, one that was cut short goes on. --results is read before and written after every run.
///
/// Example: freetumor experiment --config configs/experiments/phantom.toml --out experiment --results docs/experiments/phantom.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The folder of patients, models, runs and predictions
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The results: JSON; beside it tables (.md) and pictures (.svg)
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// Other results whose runs count, too: those of another process, or of before. They are left as they are; may be given more than once
    #[arg(long, value_name = "FILE")]
    from: Vec<PathBuf>,
    /// Only runs of these arms
    #[arg(long, value_delimiter = ',', value_parser = parse_arm)]
    arms: Vec<Arm>,
    /// Only runs of these seeds
    #[arg(long, value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Only runs with this number of labelled patients
    #[arg(long)]
    labelled: Option<usize>,
    /// Only runs with this number of unlabelled patients; arms that use none have 0
    #[arg(long)]
    unlabelled: Option<usize>,
    /// Print which runs there are and which are done, and stop
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

fn parse_arm(name: &str) -> Result<Arm, String> {
    let found = Arm::ALL.into_iter().find(|arm| arm.name() == name);
    found.ok_or_else(|| format!("expected one of {}", Arm::ALL.map(Arm::name).join(", ")))
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let compute = args.device.open()?;
    let setting = Setting {
        plan: &config.plan,
        phantom: &config.phantom,
        critic: &config.critic,
        synthesizer: &config.synthesizer,
        segmentor: &config.segmentor,
        experiment: &config.experiment,
    };
    let place = Workplace {
        out: &args.out,
        device: &compute.device,
        dtype: compute.dtype,
        store: &config.store,
        stream: &config.stream,
    };
    if let Some(missing) = args.from.iter().find(|path| !path.exists()) {
        bail!("--from {}: there is no such file", missing.display());
    }
    let mut experiment = Experiment::open(setting, place)?;
    take_over(args, &mut experiment)?;
    let runs: Vec<RunKey> = config
        .experiment
        .runs()
        .into_iter()
        .filter(|key| args.wants(key))
        .collect();
    let left: Vec<RunKey> = runs
        .iter()
        .filter(|key| experiment.results().run(key).is_none())
        .copied()
        .collect();
    say_error(&format!("{} of {} runs are done", runs.len() - left.len(), runs.len()));
    if args.list {
        runs.iter().for_each(|key| {
            let state = if left.contains(key) { "to do" } else { "done" };
            say(&format!("{:24} {state}", key.name()));
        });
        return Ok(ExitCode::SUCCESS);
    }
    let mut progress = Training::new()?;
    for (number, key) in left.iter().enumerate() {
        say_error(&format!("run {} of {}: {}", number + 1, left.len(), key.name()));
        match experiment.run(*key, &mut progress) {
            Err(ExperimentError::Learn(LearnError::Stopped { step })) => {
                say_error(&format!(
                    "saved and stopped after step {step}; the same command goes on"
                ));
                return Ok(ExitCode::SUCCESS);
            }
            done => done?,
        }
        if let Some(path) = &args.results {
            // Another process may have written there meanwhile.
            experiment.take_over(path)?;
        }
        write(args, &experiment, &config.experiment)?;
    }
    write(args, &experiment, &config.experiment)?;
    say(&page(experiment.results(), &config.experiment));
    Ok(ExitCode::SUCCESS)
}

/// Takes over what the files hold: of a run that several have, the record of --out counts, then that of --results.
fn take_over(args: &Args, experiment: &mut Experiment) -> anyhow::Result<()> {
    for path in args.results.iter().chain(&args.from) {
        let shown = path.display();
        let is_written = args.results.as_ref() == Some(path);
        match experiment.take_over(path)? {
            None if is_written => {
                bail!("{shown}: its runs are of another configuration; name another file, or move this one away")
            }
            None => bail!("--from {shown}: its runs are of another configuration"),
            Some(0) => {}
            Some(left_out) if is_written && !args.list => bail!(
                "{shown}: {left_out} of its runs would be made otherwise now, and would be lost here; name another file as --results, and \
                 this one as --from: what still counts is taken over"
            ),
            Some(left_out) => say_error(&format!("{shown}: {left_out} of its runs would be made otherwise now")),
        }
    }
    Ok(())
}

impl Args {
    fn wants(&self, key: &RunKey) -> bool {
        (self.arms.is_empty() || self.arms.contains(&key.arm))
            && (self.seeds.is_empty() || self.seeds.contains(&key.seed))
            && self.labelled.is_none_or(|labelled| labelled == key.labelled)
            && self.unlabelled.is_none_or(|unlabelled| unlabelled == key.unlabelled)
    }
}

/// Writes results, tables and pictures where they were asked for.
fn write(args: &Args, experiment: &Experiment, config: &crate::experiment::ExperimentConfig) -> anyhow::Result<()> {
    let Some(path) = &args.results else { return Ok(()) };
    if let Some(folder) = path.parent() {
        fs_err::create_dir_all(folder)?;
    }
    let results = experiment.results();
    results.write(config, path)?;
    let mut text = String::from("# Results of an experiment\n\nWritten by `freetumor experiment`.\n\n");
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    for picture in pictures(results, config) {
        let name = format!("{stem}{}.svg", picture.suffix);
        fs_err::write(path.with_file_name(&name), picture.svg)?;
        text += &format!("![{}]({name})\n\n", picture.title);
    }
    fs_err::write(path.with_extension("md"), text + &page(results, config))?;
    Ok(())
}
