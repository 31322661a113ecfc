//! The routes.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{delete, get, post};

use super::app::Shared;
use super::settings::MAX_BODY_BYTES;
use super::{access, admin, batch, events, health, models, observe, openapi, streams, trainings};

/// Returns the routes with their limits and checks.
pub(super) fn router(app: Shared) -> Router {
    let open = Router::new()
        .route("/", get(health::index))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/openapi.json", get(openapi::json_document))
        .route("/docs", get(openapi::page));
    let read = Router::new()
        .route("/metrics", get(health::metrics))
        .route("/v1/info", get(health::info))
        .route("/v1/models", get(models::list))
        .route("/v1/stream", post(streams::open))
        .route("/v1/batch", get(batch::get))
        .route("/v1/recipes/validate", post(streams::validate))
        .route("/v1/trainings", get(trainings::list))
        .route("/v1/trainings/{name}", get(trainings::get))
        .route("/v1/trainings/{name}/events", get(events::follow))
        .route("/v1/trainings/{name}/files/{file}", get(trainings::file))
        .route_layer(from_fn_with_state(app.clone(), access::check_read));
    let admin = Router::new()
        .route("/v1/reload", post(admin::reload))
        .route("/v1/drain", post(admin::drain))
        .route("/v1/models/roll-back", post(models::roll_back))
        .route("/v1/models/{name}/load", post(models::load))
        .route("/v1/models/{name}/activate", post(models::activate))
        .route("/v1/models/{name}/release", post(models::release))
        .route("/v1/trainings", post(trainings::submit))
        .route("/v1/trainings/{name}", delete(trainings::remove))
        .route("/v1/trainings/{name}/stop", post(trainings::stop))
        .route("/v1/trainings/{name}/resume", post(trainings::resume))
        .route("/v1/trainings/{name}/promote/{models}", post(trainings::promote))
        .route_layer(from_fn_with_state(app.clone(), access::check_admin));
    open.merge(read)
        .merge(admin)
        .fallback(health::not_found)
        .method_not_allowed_fallback(health::wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(app.clone(), access::check_host))
        .layer(from_fn(observe::observe))
        .with_state(app)
}
