//! `freetumor healthcheck`: what a container's HEALTHCHECK runs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio_rustls::rustls::crypto::ring;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Ask a server whether it is ready; exit 0 if so
///
/// Examples:
///   freetumor healthcheck --url http://127.0.0.1:8080
///   freetumor healthcheck --url https://127.0.0.1:8080 --insecure
///   freetumor healthcheck --url https://HOST:8080 --ca authority.pem
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The server
    #[arg(long, env = "FREETUMOR_HEALTHCHECK_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The PEM file of the authority, or of the self-signed certificate, that an https server is trusted by
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Accept an https server's certificate whoever it names: for one on this machine, to which nothing secret is said
    #[arg(long, env = "FREETUMOR_HEALTHCHECK_INSECURE", conflicts_with = "ca")]
    insecure: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(3)))
        .tls_config(tls(args)?)
        .build()
        .into();
    let url = format!("{}/readyz", args.url.trim_end_matches('/'));
    agent.get(&url).call().with_context(|| format!("{url}: not ready"))?;
    Ok(ExitCode::SUCCESS)
}

fn tls(args: &Args) -> anyhow::Result<TlsConfig> {
    let is_https = args.url.to_ascii_lowercase().starts_with("https:");
    if is_https && args.ca.is_none() && !args.insecure {
        bail!(
            "{}: expected --ca FILE, or --insecure for a server on this machine",
            args.url
        );
    }
    let roots = args.ca.as_deref().map(certificates).transpose()?.unwrap_or_default();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .disable_verification(args.insecure)
        .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
        .build())
}

/// Reads every certificate of a PEM file.
fn certificates(path: &Path) -> anyhow::Result<Vec<Certificate<'static>>> {
    let text = fs_err::read(path)?;
    let mut found = Vec::new();
    for item in parse_pem(&text) {
        if let PemItem::Certificate(certificate) =
            item.with_context(|| format!("{}: not a PEM file", path.display()))?
        {
            found.push(certificate);
        }
    }
    if found.is_empty() {
        bail!("{}: expected a certificate in PEM, got none", path.display());
    }
    Ok(found)
}
