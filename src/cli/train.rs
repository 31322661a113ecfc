//! `freetumor train`: the three stages.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use serde::Serialize;

use super::device::{Compute, DeviceArgs};
use super::models::{open_models, open_store, start_service};
use super::progress::Training;
use super::{ConfigArgs, say_error, say_json};
use crate::config::Config;
use crate::learn::{Job, LearnError, train_critic, train_segmentor, train_synthesizer};
use crate::store::Cases;

/// Train the critic (stage 1), the synthesizer (stage 2) or the segmentor (stage 3)
///
/// Example, all three in one folder:
///   freetumor train critic      --config configs/demo.toml --store store --out models
///   freetumor train synthesizer --config configs/demo.toml --store store --out models
///   freetumor train segmentor   --config configs/demo.toml --store store --out models
///
/// SIGTERM saves and stops; --resume goes on from the last checkpoint, to the same weights on the CPU.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(subcommand)]
    stage: Stage,
}

#[derive(Subcommand)]
enum Stage {
    /// Stage 1: the segmentor that recognises tumours, and the gate's calibration
    Critic(StageArgs),
    /// Stage 2: generator against critic and discriminator; needs the critic in --out
    Synthesizer(StageArgs),
    /// Stage 3: the segmentor on real and gated synthetic tumours; needs stages 1 and 2 in --out
    Segmentor(StageArgs),
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
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.stage {
        Stage::Critic(stage) => train(stage, |config, job| Ok(train_critic(&config.critic, job)?)),
        Stage::Synthesizer(stage) => {
            let critic = stage.out.clone();
            train(stage, |config, job| {
                Ok(train_synthesizer(&config.synthesizer, &critic, job)?)
            })
        }
        Stage::Segmentor(stage) => train(stage, |config, job| {
            let compute = Compute {
                device: job.device.clone(),
                dtype: job.dtype,
            };
            let bundle = open_models(Some(&stage.out), &compute)?;
            let (service, _) = start_service(config, open_store(&stage.store, config)?, bundle)?;
            Ok(train_segmentor(&config.segmentor, &*service, job)?)
        }),
    }
}

fn train<R: Serialize>(
    args: &StageArgs,
    stage: impl FnOnce(&Config, &mut Job) -> anyhow::Result<R>,
) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let store = open_store(&args.store, &config)?;
    let compute = args.device.open()?;
    fs_err::create_dir_all(&args.out)?;
    fs_err::write(args.out.join("config.toml"), toml::to_string(&config)?)?;
    let mut job = Job {
        cases: &*store as &dyn Cases,
        out: &args.out,
        resume: args.resume,
        device: &compute.device,
        dtype: compute.dtype,
        progress: &mut Training::new()?,
    };
    let report = match stage(&config, &mut job) {
        Ok(report) => report,
        Err(error) => return stopped(error).with_context(|| format!("training in {}", args.out.display())),
    };
    say_json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// A run that was asked to stop has saved its state: that is no failure.
fn stopped(error: anyhow::Error) -> anyhow::Result<ExitCode> {
    match error.downcast_ref() {
        Some(LearnError::Stopped { step }) => {
            say_error(&format!("saved and stopped after step {step}; go on with --resume"));
            Ok(ExitCode::SUCCESS)
        }
        _ => Err(error),
    }
}
