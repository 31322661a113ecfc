//! `freetumor healthcheck`: what a container's HEALTHCHECK runs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

/// Ask a server whether it is ready; exit 0 if so
///
/// Example: freetumor healthcheck --url http://127.0.0.1:8080
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(3)))
        .build()
        .into();
    let url = format!("{}/readyz", args.url.trim_end_matches('/'));
    agent.get(&url).call().with_context(|| format!("{url}: not ready"))?;
    Ok(ExitCode::SUCCESS)
}
