//! The server's life: bind, serve, drain.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::app::{App, Shared};
use super::router::router;
use super::settings::ServerConfig;
use crate::stream::recipe::Recipe;
use crate::stream::{PatchService, StreamError};
use crate::telemetry::metrics;

/// Threads that move bytes; patches are made elsewhere.
const IO_THREADS: usize = 2;
/// What connections get to finish after the last stream ended.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// A server that cannot start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A setting outside its range.
    #[error("{0}")]
    Config(String),
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
        if let Some(refusal) = config.refusal() {
            return Err(ServeError::Config(refusal));
        }
        let default_resolved = service.resolve(default_recipe.clone())?;
        let address = config.bind;
        let listener = TcpListener::bind(address).map_err(|source| ServeError::Bind { address, source })?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let app = Arc::new(App {
            streams: Arc::new(Semaphore::new(config.max_streams)),
            batches: Arc::new(Semaphore::new(config.max_batch_requests)),
            draining: watch::Sender::new(false),
            metrics: metrics::install(),
            service,
            config,
            default_recipe,
            default_resolved,
        });
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

async fn serve(app: Shared, listener: TcpListener) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let close = drained(app.clone());
    let (closed, is_closed) = tokio::sync::oneshot::channel();
    let close = async move {
        close.await;
        closed.send(()).ok();
    };
    let serving = axum::serve(listener, router(app)).with_graceful_shutdown(close);
    let bounded = async move {
        // After the drain, connections that neither finish nor idle are not waited for.
        if is_closed.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(CLOSE_TIME).await;
    };
    tokio::select! {
        served = serving => served,
        () = bounded => Ok(()),
    }
}

/// Completes once a shutdown was asked for and every stream ended, or the drain time is over.
///
/// The listener stays open meanwhile, so that `/readyz` can say 503 and a load balancer learns of it.
async fn drained(app: Shared) {
    // The sender lives in `app`, so waiting cannot fail.
    app.draining.subscribe().wait_for(|draining| *draining).await.ok();
    let deadline = Instant::now() + Duration::from_secs(app.config.drain_seconds);
    tracing::info!(seconds = app.config.drain_seconds, "draining");
    let all = |slots: &Arc<Semaphore>, limit: usize| {
        let slots = slots.clone();
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        async move { slots.acquire_many_owned(limit).await }
    };
    let streams = timeout_at(deadline, all(&app.streams, app.config.max_streams)).await;
    let batches = timeout(
        deadline.saturating_duration_since(Instant::now()),
        all(&app.batches, app.config.max_batch_requests),
    )
    .await;
    if streams.is_err() || batches.is_err() {
        tracing::warn!("the drain time is over; open streams are cut");
    }
}
