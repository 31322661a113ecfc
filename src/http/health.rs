//! What operators ask: liveness, readiness, what is served, metrics.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{Html, IntoResponse, Response};
use serde::Serialize;

use super::app::Shared;
use super::problem::{Problem, ProblemKind};
use crate::stream::recipe::{REVISION, Recipe};
use crate::stream::{Resolved, StreamError};
use crate::volume::Plan;
use crate::wire::frame::{MAX_FRAME_BYTES, VERSION};

/// Answers as long as the process can serve streams: where the device is lost, only a restart helps.
#[utoipa::path(
    get,
    path = "/livez",
    responses(
        (status = 200, description = "the process is alive"),
    )
)]
pub(super) async fn livez(State(app): State<Shared>) -> Result<&'static str, Problem> {
    match app.service.failure() {
        None => Ok("alive\n"),
        Some(what) => Err(Problem::new(ProblemKind::Lost, what).retry_after(app.config.retry_after_seconds)),
    }
}

/// Answers whether new streams are taken.
#[utoipa::path(
    get,
    path = "/readyz",
    responses(
        (status = 200, description = "new streams are taken"),
    )
)]
pub(super) async fn readyz(State(app): State<Shared>) -> Result<&'static str, Problem> {
    if app.is_draining() {
        return Err(StreamError::Stopped.into());
    }
    Ok("ready\n")
}

/// What this server serves.
#[derive(Serialize)]
struct Info<'a> {
    name: &'static str,
    version: &'static str,
    revision: u32,
    protocol: u16,
    plan: &'a Plan,
    /// What a request without a recipe gets.
    default_recipe: &'a Recipe,
    /// The same, filled in from the store.
    default: &'a Resolved,
    max_frame_bytes: u64,
    max_streams: usize,
    streams_open: usize,
    /// Whether `/v1/trainings` takes trainings.
    hosts_trainings: bool,
}

/// Tells version, plan, default recipe, snapshot, bundle, numerics class and limits.
#[utoipa::path(get, path = "/v1/info", responses((status = 200, description = "what this server serves",
    content_type = "application/json")))]
pub(super) async fn info(State(app): State<Shared>) -> Response {
    let default = app.default_resolved();
    Json(Info {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        revision: REVISION,
        protocol: VERSION,
        plan: app.service.plan(),
        default_recipe: &app.default_recipe,
        default: &default,
        max_frame_bytes: MAX_FRAME_BYTES,
        max_streams: app.config.max_streams,
        hosts_trainings: app.trainings.is_some(),
        streams_open: app.config.max_streams - app.streams.available_permits(),
    })
    .into_response()
}

/// Renders the metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, description = "metrics in Prometheus' text format",
    content_type = "text/plain")))]
pub(super) async fn metrics(State(app): State<Shared>) -> Response {
    // Keeps histograms bounded; a scrape is the one thing that surely happens now and then.
    app.metrics.run_upkeep();
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], app.metrics.render()).into_response()
}

/// Shows where to go from here.
#[utoipa::path(get, path = "/", responses((status = 200, description = "a page with links",
    content_type = "text/html")))]
pub(super) async fn index() -> Html<&'static str> {
    Html(include_str!("index.html"))
}

/// Answers a path that is no route.
pub(super) async fn not_found() -> Problem {
    Problem::new(ProblemKind::Route, "no such route; /docs lists them")
}

/// Answers a method that the route does not have.
pub(super) async fn wrong_method() -> Problem {
    let detail = "the route exists, but not for this method; /docs lists them";
    Problem::new(ProblemKind::Method, detail)
}
