//! The command line: one file per command, each with its arguments and `run`. Wires the modules; nothing imports it.

mod check_config;
mod healthcheck;
mod info;
mod output;
mod serve;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, Flag, load};

pub use serve::{serve, until_signal};

/// Synthesizes, filters and streams CT tumour patches with labels to any segmentation trainer.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    Info(info::InfoArgs),
    CheckConfig(check_config::CheckConfigArgs),
    Healthcheck(healthcheck::HealthcheckArgs),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// Whatever stopped it, with what it was doing as context.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(args) => args.run(),
            Command::Info(args) => args.run(),
            Command::CheckConfig(args) => args.run(),
            Command::Healthcheck(args) => args.run(),
        }
    }
}

/// Prints an error and its causes on standard error.
pub fn complain(error: &anyhow::Error) {
    output::error_line(&format!("error: {error:#}"));
}

/// The configuration's source, common to commands.
#[derive(Clone, Debug, Default, Args)]
struct ConfigArgs {
    /// One TOML file; absent: the defaults (the abdomen plan)
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    /// Composes defaults, file, environment and flags.
    fn load(&self, flags: &[Flag]) -> anyhow::Result<Config> {
        Ok(load(self.config.as_deref(), std::env::vars(), flags)?)
    }
}
