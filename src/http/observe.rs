//! The outermost layer: a request's id, its log line, its counts, and the id in what it was refused with.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use metrics::{counter, histogram};
use tracing::Instrument;

use super::problem::Problem;
use crate::telemetry::metrics::{HTTP_REQUEST_SECONDS, HTTP_REQUESTS_TOTAL};

/// The header with a request's id, in both directions.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest id that a client may choose.
const MAX_ID_BYTES: usize = 128;

/// A request's id, for handlers whose answers outlive the response's head.
#[derive(Clone)]
pub(super) struct RequestId(pub String);

/// Returns the client's id where it is short and harmless in a log line, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let is_harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@".contains(&byte);
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    given
        .filter(|id| (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(is_harmless))
        .map_or_else(new_id, str::to_owned)
}

/// Returns an id that no other process is likely to give: the process's own random number, and a count.
fn new_id() -> String {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{:016x}-{:08x}", *PROCESS, COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Gives the request its id and a span, and counts it by route, never by path: paths are the client's to choose.
pub(super) async fn observe(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let method = match request.method().as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "DELETE" => "DELETE",
        _ => "other",
    };
    let span = tracing::info_span!(
        "request",
        request_id = id,
        method,
        route,
        caller = tracing::field::Empty
    );
    #[cfg(feature = "otlp")]
    crate::telemetry::otlp::continue_trace(&span, request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let response = next.run(request).instrument(span.clone()).await;
    let took = started.elapsed();
    span.in_scope(|| log(&response, took));
    let status = response.status().as_u16().to_string();
    histogram!(HTTP_REQUEST_SECONDS, "route" => route.clone()).record(took);
    counter!(HTTP_REQUESTS_TOTAL, "route" => route, "method" => method, "status" => status).increment(1);
    with_id(response, &id)
}

/// A stream's line says how it was opened; its end has a line of its own.
fn log(response: &Response, took: Duration) {
    let (status, milliseconds) = (response.status(), took.as_secs_f64() * 1e3);
    let refusal = response.extensions().get::<Problem>();
    let detail = refusal.map(|problem| problem.detail.as_str()).unwrap_or_default();
    let status_code = status.as_u16();
    if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
        tracing::error!(status = status_code, milliseconds, detail, "failed");
    } else if status.is_success() {
        tracing::debug!(status = status_code, milliseconds, "answered");
    } else {
        tracing::info!(status = status_code, milliseconds, detail, "refused");
    }
}

fn with_id(mut response: Response, id: &str) -> Response {
    if let Some(mut problem) = response.extensions_mut().remove::<Problem>() {
        problem.request_id = Some(id.to_owned());
        // Headers that other layers added, such as `Allow`, stay.
        let (mut parts, body) = problem.into_response().into_parts();
        for (name, value) in response.headers() {
            if name != axum::http::header::CONTENT_LENGTH {
                parts.headers.insert(name, value.clone());
            }
        }
        response = Response::from_parts(parts, body);
    }
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmless_ids_are_kept_and_others_replaced() {
        let id = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(value).unwrap());
            request_id(&headers)
        };
        assert_eq!(id("job-7/rank:3"), "job-7/rank:3");
        for bad in ["", "a b", "\"quoted\"", &"x".repeat(MAX_ID_BYTES + 1)] {
            assert_ne!(id(bad), bad);
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
