//! `freetumor serve`: the long-running server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::device::DeviceArgs;
use super::models::{open_models, open_store, start_service};
use super::{ConfigArgs, say};
use crate::config::Config;
use crate::http::Server;
use crate::store::Store;
use crate::stream::Streams;

/// Serve synthesized, gated patches from a store over HTTP
///
/// Example: freetumor serve --config configs/demo.toml --store store --models assets/demo --bind 127.0.0.1:8080
///
/// SIGTERM or SIGINT drains: open streams end at their next batch with a cursor to go on from.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Folder with critic, generator and discriminator; without it, analytic synthesis and no gate
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    bind: Option<SocketAddr>,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut config = args.config.load()?;
    if let Some(bind) = args.bind {
        config.server.bind = bind;
    }
    let store = open_store(&args.store, &config)?;
    let bundle = open_models(args.models.as_deref(), &args.device.open()?)?;
    let (service, recipe) = start_service(&config, store.clone(), bundle)?;
    let server = start(&config, &store, service, recipe)?;
    say(&format!(
        "serving {} cases on http://{}",
        crate::store::Cases::records(&*store).len(),
        server.address()
    ));
    server.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Starts the HTTP server and lets SIGTERM and SIGINT drain it.
pub(super) fn start(
    config: &Config,
    store: &Arc<Store>,
    service: Arc<Streams>,
    recipe: crate::stream::recipe::Recipe,
) -> anyhow::Result<Server> {
    let server = Server::start(config.server.clone(), recipe, service)?;
    let drain = server.drain();
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])?;
    std::thread::Builder::new()
        .name("freetumor-signals".into())
        .spawn(move || {
            if signals.forever().next().is_some() {
                drain.start();
            }
        })?;
    tracing::info!(address = %server.address(), snapshot = %crate::store::Cases::snapshot(&**store), "serving");
    Ok(server)
}
