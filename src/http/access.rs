//! Who may ask: the Host allow-list and the optional API key.

use axum::extract::{MatchedPath, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use metrics::counter;

use super::app::Shared;
use super::problem::Problem;
use crate::telemetry::metrics::HTTP_REQUESTS_TOTAL;

/// Probes come from the node by address, with hosts nobody can list; they tell nothing.
fn is_probe(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz")
}

/// Refuses hosts that are not listed: a web page whose name was pointed at this address (DNS rebinding) is not ours.
pub(super) async fn check_host(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let host = request
        .headers()
        .get(header::HOST)
        .and_then(|value| value.to_str().ok())
        .or_else(|| request.uri().authority().map(|authority| authority.as_str()))
        .unwrap_or_default();
    if is_probe(request.uri().path()) || is_allowed(host, &app.config.allowed_hosts, &app.config.bind.ip().to_string())
    {
        return next.run(request).await;
    }
    let detail = "the request's Host is not in server.allowed_hosts";
    Problem::new(
        StatusCode::MISDIRECTED_REQUEST,
        "host",
        "this server has another name",
        detail,
    )
    .into_response()
}

fn is_allowed(host: &str, listed: &[String], bound: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    ["localhost", "127.0.0.1", "::1", bound]
        .iter()
        .any(|known| name.eq_ignore_ascii_case(known))
        || listed
            .iter()
            .any(|known| known == "*" || name.eq_ignore_ascii_case(known))
}

/// Asks for the key on everything that tells or costs something, where one is configured.
pub(super) async fn check_key(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let is_open = is_probe(path) || matches!(path, "/" | "/docs" | "/openapi.json");
    let Some(key) = app.config.api_key.as_ref().filter(|_| !is_open) else {
        return next.run(request).await;
    };
    let headers = request.headers();
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let given = bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()));
    if given.is_some_and(|given| key.matches(given)) {
        return next.run(request).await;
    }
    let detail = "send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`";
    let mut response = Problem::new(
        StatusCode::UNAUTHORIZED,
        "key",
        "the API key is missing or wrong",
        detail,
    )
    .into_response();
    let challenge = axum::http::HeaderValue::from_static("Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}

/// Counts requests by route, never by path: paths are the client's to choose.
pub(super) async fn count(request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let method = match request.method().as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        _ => "other",
    };
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    counter!(HTTP_REQUESTS_TOTAL, "route" => route, "method" => method, "status" => status).increment(1);
    response
}

#[cfg(test)]
mod tests {
    use super::is_allowed;

    #[test]
    fn loopback_and_listed_names_are_ours() {
        let listed = ["ct.example".to_owned()];
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:80",
            "[::1]:8080",
            "ct.example:443",
            "10.0.0.1:1",
        ] {
            assert!(is_allowed(host, &listed, "10.0.0.1"), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example", "[::2]:80", "10.0.0.2"] {
            assert!(!is_allowed(host, &listed, "10.0.0.1"), "{host}");
        }
        assert!(is_allowed("anything", &["*".to_owned()], "0.0.0.0"));
    }
}
