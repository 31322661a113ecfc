//! The command line: one file per subcommand. Wires everything; nothing imports it.

mod bench;
mod check_config;
mod demo;
mod device;
mod duplicates;
mod evaluate;
mod experiment;
mod healthcheck;
mod import;
mod info;
mod ingest;
mod label_organs;
mod metrics;
mod models;
mod phantom;
mod predict;
mod progress;
mod serve;
mod train;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::config::{self, Config};

/// Streams synthesized, gated CT tumour patches with labels to any segmentation trainer.
#[derive(Parser)]
#[command(name = "freetumor", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Phantom(phantom::Args),
    Ingest(ingest::Args),
    Duplicates(duplicates::Args),
    Train(train::Args),
    Serve(serve::Args),
    LabelOrgans(label_organs::Args),
    Evaluate(evaluate::Args),
    Experiment(experiment::Args),
    Predict(predict::Args),
    Import(import::Args),
    Bench(bench::Args),
    Info(info::Args),
    CheckConfig(check_config::Args),
    Healthcheck(healthcheck::Args),
}

/// The configuration file, which most commands take.
#[derive(clap::Args)]
struct ConfigArgs {
    /// Configuration (TOML); defaults apply without one, FREETUMOR__SECTION__KEY overrides
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        load(self.config.as_deref())
    }
}

fn load(path: Option<&Path>) -> anyhow::Result<Config> {
    let config = config::load(path, environment()?)?;
    config.log.start()?;
    Ok(config)
}

/// Returns the environment's variables that are of the configuration.
fn environment() -> anyhow::Result<impl Iterator<Item = (String, String)>> {
    let named = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let ours = named.filter(|(name, _)| name.starts_with(config::ENVIRONMENT_PREFIX));
    let read = |(name, value): (String, std::ffi::OsString)| match value.into_string() {
        Ok(value) => Ok((name, value)),
        Err(_) => Err(anyhow::anyhow!("{name}: expected UTF-8")),
    };
    Ok(ours.map(read).collect::<anyhow::Result<Vec<_>>>()?.into_iter())
}

/// Parses the arguments, runs the command, and returns its exit code: 0 done, 1 failed, 2 wrong usage.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::Phantom(args) => phantom::run(&args),
        Command::Ingest(args) => ingest::run(&args),
        Command::Duplicates(args) => duplicates::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::LabelOrgans(args) => label_organs::run(&args),
        Command::Evaluate(args) => evaluate::run(&args),
        Command::Experiment(args) => experiment::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Info(args) => info::run(&args),
        Command::CheckConfig(args) => check_config::run(&args),
        Command::Healthcheck(args) => healthcheck::run(&args),
    };
    #[cfg(feature = "otlp")]
    crate::telemetry::otlp::flush();
    match result {
        Ok(code) => code,
        Err(error) => {
            say_error(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints a line of results. A reader that closed the pipe has seen enough: that is no failure.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}

/// Refuses a file whose folder is not there, before hours of work that would be lost.
fn check_folder(option: &str, file: &Path) -> anyhow::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    ensure!(
        folder.is_none_or(Path::is_dir),
        "{option}: expected a file in a folder that is there, got {}",
        file.display()
    );
    Ok(())
}

/// Prints a line that is not a result.
fn say_error(line: &str) {
    drop(writeln!(std::io::stderr().lock(), "{line}"));
}

/// Prints a value as indented JSON.
fn say_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let written = writeln!(out, "{}", serde_json::to_string_pretty(value)?).and_then(|()| out.flush());
    match written {
        // Who reads no further wants no more.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot print the result"),
    }
}
