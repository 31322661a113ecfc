//! What changes the server: reading keys and certificate again, draining. Routes that exist only with an admin key.

use axum::extract::State;
use axum::http::StatusCode;

use super::app::Shared;
use super::problem::{Problem, ProblemKind};

/// Reads the files of keys, the certificate and its key again; connections that are open go on.
#[utoipa::path(post, path = "/v1/reload", responses((status = 204, description = "they are in use")))]
pub(super) async fn reload(State(app): State<Shared>) -> Result<StatusCode, Problem> {
    let read = tokio::task::spawn_blocking(move || app.secrets.reload()).await;
    match read {
        Ok(Ok(())) => Ok(StatusCode::NO_CONTENT),
        Ok(Err(error)) => Err(Problem::new(ProblemKind::Reload, error.to_string())),
        Err(panic) => Err(Problem::internal(panic.to_string())),
    }
}

/// Starts a shutdown: no new streams, open ones end at their next batch with a cursor, then the process ends.
#[utoipa::path(post, path = "/v1/drain", responses((status = 202, description = "the server is draining")))]
pub(super) async fn drain(State(app): State<Shared>) -> StatusCode {
    tracing::info!("a shutdown was asked for over HTTP");
    app.draining.send_replace(true);
    StatusCode::ACCEPTED
}
