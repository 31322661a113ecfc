//! `freetumor check-config`: what a configuration comes to.

use clap::Args;

use super::{ConfigArgs, output};

/// Checks a configuration, environment included, and prints what it comes to (secrets left out)
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freetumor check-config --config configs/abdomen.toml")]
pub(super) struct CheckConfigArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// One JSON line instead of TOML
    #[arg(long)]
    json: bool,
}

impl CheckConfigArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.config.load(&[])?;
        if self.json {
            return Ok(output::json_line(&config)?);
        }
        Ok(output::line(toml::to_string(&config)?.trim_end())?)
    }
}
