//! `freetumor train`: the three stages.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use serde::Serialize;
use serde_json::Value;

use super::device::{Compute, DeviceArgs};
use super::models::{open_models, open_store, start_service};
use super::progress::Training;
use super::{ConfigArgs, metrics, say_error, say_json};
use crate::checkpoint::{Role, inner_folder, load_manifest, write_atomically};
use crate::config::Config;
use crate::digest::Digest;
use crate::learn::{Job, LearnError, Progress, train_critic, train_segmentor, train_synthesizer};
use crate::store::Cases;

/// Train the critic (stage 1), the synthesizer (stage 2) or the segmentor (stage 3)
///
/// Example, all three in one folder:
///   freetumor train critic      --config configs/demo.toml --store store --out models
///   freetumor train synthesizer --config configs/demo.toml --store store --out models
///   freetumor train segmentor   --config configs/demo.toml --store store --out models
///
/// SIGTERM saves and stops; --resume goes on from the last checkpoint, to the same weights on the CPU.
/// --folds 5 makes five bundles, of which each never saw a fifth of the cases; labelled hosts are judged by critics of inner folds.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(subcommand)]
    stage: Stage,
}

#[derive(Subcommand)]
enum Stage {
    /// Stage 1: the segmentor that recognises tumours, and the gate's calibration
    Critic(CriticArgs),
    /// Stage 2: generator against critic and discriminator; needs the critic in --out
    Synthesizer(StageArgs),
    /// Stage 3: the segmentor on real and gated synthetic tumours; needs stages 1 and 2 in --out
    Segmentor(StageArgs),
}

#[derive(clap::Args)]
struct CriticArgs {
    #[command(flatten)]
    stage: StageArgs,
    /// Leave out the critics of inner folds, of which --folds trains 3 for each fold, at the cost of the fold's own critic each:
    /// without them, lesions in a patient are judged by a critic that learnt from that patient
    #[arg(long)]
    no_inner_folds: bool,
}

#[derive(clap::Args)]
struct StageArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Where models, metrics and checkpoints go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// Train once for each of so many folds, into fold-0, fold-1, ... under --out: no model of a folder saw its fold
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(2..=100))]
    folds: Option<u16>,
    /// Serve Prometheus metrics of the run on this address, such as 127.0.0.1:9400; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.stage {
        Stage::Critic(critic) => {
            let mut config = critic.stage.config.load()?;
            critic.inner_folds(&mut config);
            train((&critic.stage, config), "critic", &|config, job| {
                report(train_critic(&config.critic, job)?)
            })
        }
        Stage::Synthesizer(stage) => train((stage, stage.config.load()?), "synthesizer", &|config, job| {
            let critic = job.out;
            report(train_synthesizer(&config.synthesizer, critic, job)?)
        }),
        Stage::Segmentor(stage) => train((stage, stage.config.load()?), "segmentor", &|config, job| {
            let compute = Compute {
                device: job.device.clone(),
                dtype: job.dtype,
            };
            let bundle = open_models(Some(job.out), &compute)?;
            let (service, _) = start_service(config, open_store(&stage.store, config)?, bundle)?;
            report(train_segmentor(&config.segmentor, &*service, job)?)
        }),
    }
}

/// How many critics of inner folds `--folds` trains where `critic.inner_folds` asks for none.
const INNER_FOLDS: usize = 3;

impl CriticArgs {
    /// Sets how many critics of inner folds are trained.
    fn inner_folds(&self, config: &mut Config) {
        if self.no_inner_folds {
            config.critic.inner_folds = 0;
        } else if self.stage.folds.is_some() && config.critic.inner_folds == 0 {
            config.critic.inner_folds = INNER_FOLDS;
            say_error(&format!(
                "each fold also trains {INNER_FOLDS} critics of inner folds, which judge its labelled hosts; --no-inner-folds leaves them out"
            ));
        }
    }
}

fn report<R: Serialize>(report: R) -> anyhow::Result<Value> {
    Ok(serde_json::to_value(report)?)
}

type Run<'a> = &'a dyn Fn(&Config, &mut Job) -> anyhow::Result<Value>;

/// Runs a stage once, or once per fold, each in a folder of its own; with `--resume`, folds that are done are passed over.
fn train((args, config): (&StageArgs, Config), stage: &str, run: Run) -> anyhow::Result<ExitCode> {
    args.metrics.map_or(Ok(()), metrics::serve)?;
    let mut progress = Training::new()?;
    let Some(folds) = args.folds.map(usize::from) else {
        return match train_in(args, (&config, stage), (&args.out, &mut progress), run)? {
            Some(report) => say_json(&report).map(|()| ExitCode::SUCCESS),
            None => Ok(ExitCode::SUCCESS),
        };
    };
    let snapshot = open_store(&args.store, &config)?.snapshot();
    let mut reports = Vec::new();
    for fold in 0..folds {
        // Told so after a fold's last step, which needs no saving.
        if progress.should_stop() {
            say_error(&format!("stopped before fold {fold}; go on with --resume"));
            return Ok(ExitCode::SUCCESS);
        }
        let out = args.out.join(format!("fold-{fold}"));
        let config = of_fold(config.clone(), folds, fold)?;
        let done = out.join(format!("{stage}.report.json"));
        if args.resume && done.exists() && is_result_of(&out, stage, (&config, snapshot))? {
            say_error(&format!("fold {fold}: already trained"));
            reports.push(serde_json::from_slice(&fs_err::read(done)?)?);
            continue;
        }
        say_error(&format!("fold {fold} of {folds}, in {}", out.display()));
        match train_in(args, (&config, stage), (&out, &mut progress), run)? {
            Some(report) => reports.push(report),
            None => return Ok(ExitCode::SUCCESS),
        }
    }
    say_json(&reports)?;
    Ok(ExitCode::SUCCESS)
}

/// Tells whether a folder's model is what a stage of this configuration comes to on a store.
fn is_result_of(out: &Path, stage: &str, (config, snapshot): (&Config, Digest)) -> anyhow::Result<bool> {
    let (role, made_with, wanted): (_, &[Role], _) = match stage {
        "critic" => (Role::Critic, &[], serde_json::to_value(&config.critic)?),
        "synthesizer" => (
            Role::Generator,
            &[Role::Critic],
            serde_json::to_value(&config.synthesizer)?,
        ),
        _ => (
            Role::Segmentor,
            &[Role::Critic, Role::Generator],
            serde_json::to_value(&config.segmentor)?,
        ),
    };
    let Some(training) = load_manifest(out, role)?.training else {
        return Ok(false);
    };
    let lacks = |fold: usize| !out.join(inner_folder(fold)).join("critic.json").exists();
    if made_with.iter().any(|other| is_newer(out, *other, role))
        || (role == Role::Critic && (0..config.critic.inner_folds).any(lacks))
    {
        return Ok(false);
    }
    // A segmentor's stands beside the cursor at which its stream ended.
    let trained_with = training.config.get(0).unwrap_or(&training.config);
    Ok(*trained_with == wanted && training.snapshot == snapshot)
}

/// Tells whether a model was written after another, which was then made from what it has replaced.
fn is_newer(out: &Path, model: Role, than: Role) -> bool {
    let written = |role: Role| {
        let path = out.join(format!("{}.json", role.name()));
        path.metadata().and_then(|metadata| metadata.modified()).ok()
    };
    written(model)
        .zip(written(than))
        .is_some_and(|(model, than)| model > than)
}

/// Returns the configuration whose stages all hold out one fold.
fn of_fold(mut config: Config, folds: usize, fold: usize) -> anyhow::Result<Config> {
    let splits = [
        ("critic", &mut config.critic.split),
        ("synthesizer", &mut config.synthesizer.split),
        ("segmentor", &mut config.segmentor.split),
    ];
    for (section, split) in splits {
        if let Some(file) = &split.file {
            bail!(
                "--folds: {section}.split.file already names the folds ({}); leave one of them out",
                file.display()
            );
        }
        (split.folds, split.fold) = (folds, fold);
    }
    Ok(config)
}

/// Trains into a folder; nothing where the run was asked to stop.
fn train_in(
    args: &StageArgs,
    (config, stage): (&Config, &str),
    (out, progress): (&Path, &mut Training),
    run: Run,
) -> anyhow::Result<Option<Value>> {
    let store = open_store(&args.store, config)?;
    let compute = args.device.open()?;
    fs_err::create_dir_all(out)?;
    let written = out.join(format!("{stage}.config.toml"));
    let is_resumed = args.resume && out.join(format!("{stage}.state.safetensors")).exists();
    // What is resumed began with the one that is there; another is refused.
    if !is_resumed || !written.exists() {
        write_atomically(&written, toml::to_string(config)?.as_bytes())?;
    }
    let mut job = Job {
        cases: &*store as &dyn Cases,
        out,
        resume: args.resume,
        device: &compute.device,
        dtype: compute.dtype,
        progress,
    };
    match run(config, &mut job) {
        Ok(report) => Ok(Some(report)),
        Err(error) => stopped(error).with_context(|| format!("training in {}", out.display())),
    }
}

/// A run that was asked to stop has saved its state: that is no failure.
fn stopped(error: anyhow::Error) -> anyhow::Result<Option<Value>> {
    match error.downcast_ref() {
        Some(LearnError::Stopped { step }) => {
            say_error(&format!("saved and stopped after step {step}; go on with --resume"));
            Ok(None)
        }
        _ => Err(error),
    }
}
