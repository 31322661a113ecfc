//! What the routes share: the service, the settings, and who may work at the same time.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use metrics::{counter, gauge};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::budget::{Budget, Share};
use super::encoders::Encoders;
use super::keys::Caller;
use super::problem::{Problem, ProblemKind};
use super::secrets::Secrets;
use super::settings::ServerConfig;
use crate::jobs::TrainingHost;
use crate::stream::recipe::Recipe;
use crate::stream::{PatchService, Resolved, StreamError};
use crate::telemetry::metrics::{MODELS_INFO, REFUSED_TOTAL};

/// What the routes share.
pub(super) struct App {
    pub service: Arc<dyn PatchService>,
    pub config: ServerConfig,
    /// The recipe that requests without one get, as configured.
    pub default_recipe: Recipe,
    /// The same, filled in from the store.
    pub default_resolved: RwLock<Arc<Resolved>>,
    /// One renewal of it at a time.
    pub renewing: Mutex<()>,
    pub metrics: PrometheusHandle,
    pub draining: watch::Sender<bool>,
    pub streams: Arc<Semaphore>,
    pub batches: Arc<Semaphore>,
    /// Places of single batches from their request until the client has taken them.
    pub answers: Arc<Semaphore>,
    pub budget: Arc<Budget>,
    pub secrets: Secrets,
    /// What hosts trainings, where this server does.
    pub trainings: Option<Arc<TrainingHost>>,
    /// Places of clients that follow trainings or download their files.
    pub followers: Arc<Semaphore>,
    /// What makes the frames of all streams.
    pub encoders: Arc<Encoders>,
}

/// The routes' state.
pub(super) type Shared = Arc<App>;

impl App {
    /// Tells whether a shutdown was asked for.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Returns the default recipe, filled in from the store and the active models.
    pub fn default_resolved(&self) -> Arc<Resolved> {
        self.default_resolved
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps what the default recipe comes to now, and sets the metric that says which models serve it. One at a time: of two changes of
    /// models the later one is what is kept.
    ///
    /// # Errors
    /// [`StreamError`] names the field.
    pub fn renew_default(&self) -> Result<(), StreamError> {
        let _one = self.renewing.lock().unwrap_or_else(PoisonError::into_inner);
        let resolved = self.service.resolve(self.default_recipe.clone())?;
        tell_models(&self.default_resolved(), 0.0);
        tell_models(&resolved, 1.0);
        *self.default_resolved.write().unwrap_or_else(PoisonError::into_inner) = resolved;
        Ok(())
    }

    /// Admits a stream, or says when to try again.
    pub fn admit_stream(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.admit(&self.streams, "/v1/stream", self.config.max_streams)
    }

    /// Admits a single batch or a validation, or says when to try again.
    pub fn admit_batch(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.admit(&self.batches, "/v1/batch", self.config.max_batch_requests)
    }

    /// Admits a single batch that may have to wait for its client, or says when to try again.
    pub fn admit_answer(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.admit(&self.answers, "/v1/batch", self.config.max_streams)
    }

    /// Admits a client that follows a training or downloads a file of it, or says when to try again.
    pub fn admit_follower(&self, route: &'static str) -> Result<OwnedSemaphorePermit, Problem> {
        self.followers.clone().try_acquire_owned().map_err(|_| {
            counter!(REFUSED_TOTAL, "route" => route).increment(1);
            let detail = "as many clients follow trainings and download files as jobs.max_followers allows";
            Problem::new(ProblemKind::Busy, detail).retry_after(self.config.retry_after_seconds)
        })
    }

    fn admit(
        &self,
        slots: &Arc<Semaphore>,
        route: &'static str,
        limit: usize,
    ) -> Result<OwnedSemaphorePermit, Problem> {
        if self.is_draining() {
            return Err(StreamError::Stopped.into());
        }
        slots.clone().try_acquire_owned().map_err(|_| {
            counter!(REFUSED_TOTAL, "route" => route).increment(1);
            let detail = format!("{limit} requests of this kind are open, which is the configured limit");
            Problem::new(ProblemKind::Busy, detail).retry_after(self.config.retry_after_seconds)
        })
    }

    /// Takes a part of what the caller may ask for at the same time.
    pub fn take_budget(&self, caller: Caller, voxels: u64) -> Result<Share, Problem> {
        self.budget
            .take(caller, voxels, self.config.retry_after_seconds)
            .inspect_err(|_| {
                counter!(REFUSED_TOTAL, "route" => "budget").increment(1);
            })
    }
}

fn tell_models(resolved: &Resolved, value: f64) {
    let labels = [
        ("bundle", resolved.bundle.to_string()),
        ("snapshot", resolved.snapshot.to_string()),
        ("numerics", resolved.numerics.clone()),
    ];
    gauge!(MODELS_INFO, &labels).set(value);
}

/// Runs blocking work on a thread of its own and waits for it without blocking the caller's.
pub(super) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let (sender, receiver) = oneshot::channel();
    spawn(name, move || {
        // A client that left is not an error.
        sender.send(work()).ok();
    })?;
    receiver
        .await
        .unwrap_or_else(|_| Err(Problem::internal("the request's thread panicked; the log says why")))
}

/// Starts a named thread whose log lines carry the request's id.
pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Problem> {
    let request = tracing::Span::current();
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || request.in_scope(work))
        .map(drop)
        .map_err(|error| Problem::internal(format!("cannot start a thread: {error}")))
}
