//! The server's life: bind, serve, drain.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use ::metrics::gauge;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout, timeout_at};

use super::app::{App, Shared};
use super::budget::Budget;
use super::connection::{Front, accept};
use super::encoders::Encoders;
use super::router::router;
use super::secrets::{Secrets, SecretsError};
use super::settings::ServerConfig;
use crate::jobs::TrainingHost;
use crate::stream::recipe::{REVISION, Recipe};
use crate::stream::{PatchService, StreamError};
use crate::telemetry::metrics::{self, BUILD_INFO};

/// Threads that move bytes; patches are made elsewhere.
const IO_THREADS: usize = 2;
/// How often the files of keys and certificate are looked at.
const SECRETS_INTERVAL: Duration = Duration::from_secs(30);
/// What connections get to finish after the last stream ended.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// A server that cannot start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A setting outside its range.
    #[error("{0}")]
    Config(String),
    /// Keys or certificate that cannot be used.
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    /// The address is taken or not ours.
    #[error("server.bind: cannot listen on {address}{}", hint(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the operating system says.
        source: io::Error,
    },
    /// A default recipe that the store or the models cannot serve.
    #[error("the default recipe cannot be served")]
    Recipe(#[from] StreamError),
    /// The operating system refused threads or sockets.
    #[error("cannot start the server")]
    Start(#[from] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ": the port is in use; stop what listens there or choose another with --bind",
        io::ErrorKind::PermissionDenied => ": the port needs privileges; choose one above 1023",
        _ => "",
    }
}

/// A running server with its own I/O threads.
pub struct Server {
    app: Shared,
    address: SocketAddr,
    serving: JoinHandle<io::Result<()>>,
    runtime: Runtime,
}

/// Asks a server to drain, from any thread.
#[derive(Clone)]
pub struct Drain {
    app: Shared,
}

impl Drain {
    /// Asks for a shutdown: no new streams, open ones end at their next batch with a cursor.
    pub fn start(&self) {
        self.app.draining.send_replace(true);
    }
}

/// Makes a server read its keys and certificate again, from any thread.
#[derive(Clone)]
pub struct Reload {
    app: Shared,
}

impl Reload {
    /// Reads every file again; where one cannot be used, what it held before stays in use.
    ///
    /// # Errors
    /// [`SecretsError`] names the setting and the file.
    pub fn now(&self) -> Result<(), SecretsError> {
        self.app.secrets.reload()
    }
}

impl Server {
    /// Binds, resolves the default recipe and starts to serve.
    ///
    /// # Errors
    /// [`ServeError`] names the setting, the address or the recipe's field.
    pub fn start(
        config: ServerConfig,
        default_recipe: Recipe,
        service: Arc<dyn PatchService>,
    ) -> Result<Self, ServeError> {
        Self::start_hosting(config, default_recipe, service, None)
    }

    /// The same, with hosted trainings beside the streams: a shutdown stops them with a checkpoint.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_hosting(
        config: ServerConfig,
        default_recipe: Recipe,
        service: Arc<dyn PatchService>,
        trainings: Option<Arc<TrainingHost>>,
    ) -> Result<Self, ServeError> {
        if let Some(refusal) = config.refusal().or_else(|| config.exposure()) {
            return Err(ServeError::Config(refusal));
        }
        let secrets = Secrets::load(&config)?;
        let default_resolved = service.resolve(default_recipe.clone())?;
        let address = config.bind;
        let listener = TcpListener::bind(address).map_err(|source| ServeError::Bind { address, source })?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let app = Arc::new(App {
            encoders: Arc::new(Encoders::start()?),
            streams: Arc::new(Semaphore::new(config.max_streams)),
            batches: Arc::new(Semaphore::new(config.max_batch_requests)),
            answers: Arc::new(Semaphore::new(config.max_streams)),
            draining: watch::Sender::new(false),
            budget: Budget::new(config.max_voxels_per_key),
            secrets,
            followers: Arc::new(Semaphore::new(
                trainings.as_ref().map_or(0, |host| host.config().max_followers),
            )),
            trainings,
            metrics: metrics::install(),
            service,
            config,
            default_recipe,
            default_resolved: RwLock::new(default_resolved),
            renewing: Mutex::default(),
        });
        tell_version();
        app.renew_default()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(IO_THREADS)
            .thread_name("http")
            .enable_all()
            .build()?;
        let serving = runtime.spawn(serve(app.clone(), listener));
        Ok(Self {
            app,
            address,
            serving,
            runtime,
        })
    }

    /// Returns the address that is listened on, its port chosen by the system where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns a handle that asks for a shutdown.
    pub fn drain(&self) -> Drain {
        Drain { app: self.app.clone() }
    }

    /// Returns a handle that reads keys and certificate again.
    pub fn reload(&self) -> Reload {
        Reload { app: self.app.clone() }
    }

    /// Serves until a shutdown was asked for and its time is over, or nothing is open any more.
    ///
    /// # Errors
    /// [`ServeError::Start`] where the listener failed.
    pub fn wait(self) -> Result<(), ServeError> {
        let result = self.runtime.block_on(self.serving);
        // Connections that are still open are cut: their streams' threads notice and end.
        self.runtime.shutdown_timeout(CLOSE_TIME);
        match result {
            Ok(served) => Ok(served?),
            Err(panic) => Err(io::Error::other(panic).into()),
        }
    }
}

/// Serves until the drain is over; the connections left then get a moment to end.
async fn serve(app: Shared, listener: TcpListener) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let closing = watch::Sender::new(false);
    let places = Arc::new(Semaphore::new(app.config.max_connections));
    let front = Front {
        router: router(app.clone()),
        tls: app.secrets.certificate().map(|certificate| certificate.acceptor()),
        stall: Duration::from_secs(app.config.stall_seconds),
        places: places.clone(),
        closing: closing.subscribe(),
    };
    let mut accepting = tokio::spawn(accept(listener, Arc::new(front)));
    let watching = tokio::spawn(watch_secrets(app.clone()));
    let most = u32::try_from(app.config.max_connections).unwrap_or(u32::MAX);
    tokio::select! {
        () = drained(app) => {}
        // It ends only where it panics before it was told to.
        ended = &mut accepting => return ended.map_err(io::Error::other),
    }
    watching.abort();
    closing.send_replace(true);
    if timeout(CLOSE_TIME, places.acquire_many_owned(most)).await.is_err() {
        tracing::debug!("connections that neither finish nor idle are cut");
    }
    accepting.await.map_err(io::Error::other)
}

/// Reads keys and certificate again when their files change: secrets are rotated without a restart.
async fn watch_secrets(app: Shared) {
    let mut ticks = interval(SECRETS_INTERVAL);
    loop {
        ticks.tick().await;
        let app = app.clone();
        if tokio::task::spawn_blocking(move || app.secrets.reload_if_changed())
            .await
            .is_err()
        {
            tracing::error!("looking at the files of keys and certificate panicked");
        }
    }
}

/// Sets the metric that says which code serves.
fn tell_version() {
    let revision = REVISION.to_string();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION"), "revision" => revision).set(1.0);
}

/// Completes once a shutdown was asked for and every stream ended, or the drain time is over.
///
/// The listener stays open meanwhile, so that `/readyz` can say 503 and a load balancer learns of it.
async fn drained(app: Shared) {
    // The sender lives in `app`, so waiting cannot fail.
    app.draining.subscribe().wait_for(|draining| *draining).await.ok();
    let deadline = Instant::now() + Duration::from_secs(app.config.drain_seconds);
    tracing::info!(seconds = app.config.drain_seconds, "draining");
    let trainings = app.trainings.clone();
    let checkpoint = trainings.map(|host| {
        let time = Duration::from_secs(app.config.drain_seconds);
        tokio::task::spawn_blocking(move || host.close(time))
    });
    let all = |slots: &Arc<Semaphore>, limit: usize| {
        let slots = slots.clone();
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        async move { slots.acquire_many_owned(limit).await }
    };
    let streams = timeout_at(deadline, all(&app.streams, app.config.max_streams)).await;
    let followers = app.trainings.as_ref().map_or(0, |host| host.config().max_followers);
    // Single batches, and what clients have not yet taken: answers and files.
    let others = [
        (&app.batches, app.config.max_batch_requests),
        (&app.answers, app.config.max_streams),
        (&app.followers, followers),
    ];
    let mut is_late = streams.is_err();
    for (slots, limit) in others {
        is_late |= timeout_at(deadline, all(slots, limit)).await.is_err();
    }
    if is_late {
        tracing::warn!("the drain time is over; what is still sent is cut");
    }
    if let Some(checkpoint) = checkpoint
        && checkpoint.await.is_err()
    {
        tracing::error!("stopping the training panicked; it goes on from its last checkpoint at the next start");
    }
}
