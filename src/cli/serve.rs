//! `freetumor serve`: the long-running server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::device::DeviceArgs;
use super::models::{ModelsRoot, models_name, open_models, open_store, start_service};
use super::{ConfigArgs, say};
use crate::config::Config;
use crate::http::Server;
use crate::jobs::{ModelFolders, TrainingConfig, TrainingHost, TrainingParts};
use crate::panic::panic_text;
use crate::store::Store;
use crate::stream::recipe::Recipe;
use crate::stream::{PatchService, Shelf, ShelfParts};

/// Serve synthesized, gated patches from a store over HTTP
///
/// Example: freetumor serve --config configs/demo.toml --store store --models assets/demo --bind 127.0.0.1:8080
///
/// SIGTERM or SIGINT drains: open streams end at their next batch with a cursor to go on from. SIGHUP reads keys and
/// certificate again.
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
    /// Folder of such folders, which an admin may load and activate by name (docs/service.md)
    #[arg(long, value_name = "DIR")]
    models_root: Option<PathBuf>,
    /// Folder of trainings that run inside the server (docs/service.md); without it, it hosts none
    #[arg(long, value_name = "DIR")]
    jobs_dir: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    bind: Option<SocketAddr>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    /// Returns where models lie.
    fn folders(&self) -> ModelFolders {
        ModelFolders {
            root: self.models_root.clone(),
            first: self.models.clone().map(|dir| (models_name(Some(&dir)), dir)),
        }
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut config = args.config.load()?;
    if let Some(bind) = args.bind {
        config.server.bind = bind;
    }
    if let Some(refusal) = config.server.exposure() {
        anyhow::bail!(refusal);
    }
    let store = open_store(&args.store, &config)?;
    let compute = args.device.open()?;
    let bundle = open_models(args.models.as_deref(), &compute)?;
    let (streams, recipe) = start_service(&config, store.clone(), bundle)?;
    let parts = ShelfParts {
        cases: store.clone(),
        default_recipe: recipe.clone(),
        source: Box::new(ModelsRoot::new(args.models_root.clone(), compute.clone())?),
    };
    let service = Shelf::new(parts, &models_name(args.models.as_deref()), streams);
    take_up(&service);
    let trainings = args.jobs_dir.as_deref().map(|root| {
        fs_err::create_dir_all(root)?;
        let parts = TrainingParts {
            root: root.to_owned(),
            cases: store.clone(),
            service: service.clone(),
            defaults: of_server(&config, &recipe),
            config: config.jobs.clone(),
            weights: config.stream.weights,
            device: compute.device,
            dtype: compute.dtype,
            models: args.folders(),
        };
        TrainingHost::start(parts).context("--jobs-dir: cannot host trainings")
    });
    let trainings = trainings.transpose()?;
    let server = start(&config, &store, (service, recipe), trainings)?;
    say(&format!(
        "serving {} cases on {}://{}",
        crate::store::Cases::records(&*store).len(),
        scheme(&config),
        server.address()
    ));
    server.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Lets the models serve that were active last. What is wrong with them must not keep the server from its start.
fn take_up(service: &Shelf) {
    let taken = std::thread::scope(|scope| scope.spawn(|| service.take_up()).join());
    let error = match taken {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(&*panic),
    };
    tracing::error!(
        error,
        "the models that were active cannot be taken up; those of the command line serve"
    );
}

/// Returns what trainings get that say nothing else: the segmentor's section; without models, on the analytic stream that
/// clients get, too.
fn of_server(config: &Config, recipe: &Recipe) -> TrainingConfig {
    let mut defaults = config.segmentor.clone();
    if recipe.synthesizer != config.recipe.synthesizer {
        defaults.recipe.synthesizer = recipe.synthesizer;
        defaults.recipe.gate.enabled = recipe.gate.enabled;
    }
    defaults
}

fn scheme(config: &Config) -> &'static str {
    if config.server.tls_certificate.is_some() {
        "https"
    } else {
        "http"
    }
}

/// Lets the process hold as many descriptors as the system allows it: every connection is one, and shells often give 1024.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Starts the HTTP server, lets SIGTERM and SIGINT drain it, and SIGHUP make it read its secrets again.
pub(super) fn start(
    config: &Config,
    store: &Arc<Store>,
    (service, recipe): (Arc<dyn PatchService>, Recipe),
    trainings: Option<Arc<TrainingHost>>,
) -> anyhow::Result<Server> {
    raise_descriptors();
    let server = Server::start_hosting(config.server.clone(), recipe, service, trainings)?;
    let (drain, reload) = (server.drain(), server.reload());
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new()
        .name("freetumor-signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if signal != SIGHUP {
                    drain.start();
                    return;
                }
                if let Err(error) = reload.now() {
                    tracing::error!(%error, "keys or certificate cannot be used; the old ones stay");
                }
            }
        })?;
    tracing::info!(address = %server.address(), snapshot = %crate::store::Cases::snapshot(&**store), "serving");
    Ok(server)
}
