//! `freetumor healthcheck`: asks a server whether it takes streams; what a container's health check runs.

use std::time::Duration;

use anyhow::Context;
use clap::Args;

/// Exits with 0 where the server takes new streams, with 1 where it does not
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freetumor healthcheck --url http://127.0.0.1:8080")]
pub(super) struct HealthcheckArgs {
    /// The server
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Seconds to wait for an answer
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    timeout: u64,
}

impl HealthcheckArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let url = format!("{}/readyz", self.url.trim_end_matches('/'));
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(self.timeout)))
            .build()
            .into();
        agent.get(&url).call().with_context(|| format!("not ready: {url}"))?;
        Ok(())
    }
}
