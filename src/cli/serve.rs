//! `freetumor serve`: streams patches over HTTP until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::ConfigArgs;
use crate::config::{Config, Flag};
use crate::http::{ApiKey, Drain, Server};
use crate::stream::PatchService;

/// Serves streams of patches over HTTP
///
/// SIGTERM drains: no new streams, open ones end at their next batch with a cursor; a second signal stops at once.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freetumor serve --config configs/abdomen.toml --store store --models models\n  \
    curl -o batch.npz 'http://127.0.0.1:8080/v1/batch?index=0&batch_size=2'"
)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The store that `freetumor ingest` made
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The bundle: critic, generator, discriminator; absent: only recipes that need none are served
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Where to listen (default 127.0.0.1:8080)
    #[arg(long, value_name = "ADDRESS:PORT")]
    bind: Option<String>,
    /// A file that holds the key which requests must bring; or set FREETUMOR__SERVER__API_KEY
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Where networks run
    #[arg(long, value_name = "auto|cpu|cuda:N", default_value = "auto")]
    device: String,
}

impl ServeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let bind = self.bind.clone().map(|value| Flag {
            flag: "--bind",
            path: &["server", "bind"],
            value,
        });
        let mut config = self.config.load(bind.as_slice())?;
        if let Some(path) = &self.api_key_file {
            config.server.api_key = Some(ApiKey::new(&fs_err::read_to_string(path)?));
        }
        config.log.start()?;
        let service = self.service(&config)?;
        let server = serve(&config, service)?;
        until_signal(server)
    }

    /// Opens the store and the models and starts the engine.
    fn service(&self, _config: &Config) -> anyhow::Result<Arc<dyn PatchService>> {
        bail!(
            "this build has no engine to open {} (models {:?}) on {}",
            self.store.display(),
            self.models,
            self.device
        )
    }
}

/// Starts a server for a service and says where it listens.
///
/// # Errors
/// Where the address is taken or the default recipe cannot be served.
pub fn serve(config: &Config, service: Arc<dyn PatchService>) -> anyhow::Result<Server> {
    let server = Server::start(config.server.clone(), config.recipe.clone(), service)?;
    tracing::info!(address = %server.address(), "listening");
    Ok(server)
}

/// Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.
///
/// # Errors
/// Where signals cannot be received or the listener failed.
pub fn until_signal(server: Server) -> anyhow::Result<()> {
    let drain = server.drain();
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot receive signals")?;
    let handle = signals.handle();
    let listening = std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || on_signals(&mut signals, &drain))
        .context("cannot start a thread")?;
    let served = server.wait();
    handle.close();
    // The thread only waits for signals; closing the handle ends it.
    listening.join().ok();
    Ok(served?)
}

fn on_signals(signals: &mut Signals, drain: &Drain) {
    for (received, signal) in signals.forever().enumerate() {
        if received > 0 {
            std::process::exit(128 + signal);
        }
        tracing::info!(signal, "asked to stop");
        drain.start();
    }
}
