//! `freetumor check-config`: reads a configuration and prints it with every default filled in.

use std::process::ExitCode;

use super::{ConfigArgs, say};

/// Check a configuration and print it with every default filled in
///
/// Example: freetumor check-config --config configs/abdomen.toml
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    say(&toml::to_string(&args.config.load()?)?);
    Ok(ExitCode::SUCCESS)
}
