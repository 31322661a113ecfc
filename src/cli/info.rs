//! `freetumor info`: what this binary is.

use clap::Args;
use serde_json::json;

use super::output;
use crate::stream::recipe::REVISION;
use crate::telemetry::metrics::METRICS;
use crate::wire::frame::{MAX_FRAME_BYTES, VERSION};

/// Tells version, revision of the bytes, wire protocol and what was compiled in
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freetumor info --json")]
pub(super) struct InfoArgs {
    /// One JSON line
    #[arg(long)]
    json: bool,
    /// List every metric with its labels and meaning instead
    #[arg(long)]
    metrics: bool,
}

impl InfoArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.metrics {
            return Self::list_metrics(self.json);
        }
        let version = env!("CARGO_PKG_VERSION");
        let features: &[&str] = if cfg!(feature = "cuda") {
            &["cpu", "cuda"]
        } else {
            &["cpu"]
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.json {
            return Ok(output::json_line(
                &json!({"version": version, "revision": REVISION, "protocol": VERSION,
                "max_frame_bytes": MAX_FRAME_BYTES, "devices": features, "cores": cores}),
            )?);
        }
        output::line(&format!("freetumor {version}"))?;
        output::line(&format!(
            "revision  {REVISION}  (raised on any change of a patch's bytes)"
        ))?;
        output::line(&format!(
            "protocol  {VERSION}  (frames of at most {} MiB)",
            MAX_FRAME_BYTES >> 20
        ))?;
        output::line(&format!("devices   {}", features.join(", ")))?;
        Ok(output::line(&format!("cores     {cores}"))?)
    }

    fn list_metrics(as_json: bool) -> anyhow::Result<()> {
        for (name, kind, labels, meaning) in METRICS {
            let kind = format!("{kind:?}").to_lowercase();
            if as_json {
                output::json_line(&json!({"name": name, "kind": kind, "labels": labels, "meaning": meaning}))?;
            } else {
                output::line(&format!("| `{name}` | {kind} | {} | {meaning} |", labels.join(", ")))?;
            }
        }
        Ok(())
    }
}
