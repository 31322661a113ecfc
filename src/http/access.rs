//! Who may ask: the Host allow-list and the keys.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::app::Shared;
use super::keys::Caller;
use super::problem::{Problem, ProblemKind};

/// Probes come from the node by address, with hosts nobody can list; they tell nothing.
fn is_probe(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz")
}

/// Refuses hosts that are not listed: a web page whose name was pointed at this address (DNS rebinding) is not ours. Who brings a key
/// is no such page, whatever it calls us: Prometheus scrapes pods by their addresses.
pub(super) async fn check_host(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let host = request
        .headers()
        .get(header::HOST)
        .and_then(|value| value.to_str().ok())
        .or_else(|| request.uri().authority().map(|authority| authority.as_str()))
        .unwrap_or_default();
    let is_allowed = is_allowed(host, &app.config.allowed_hosts, &app.config.bind.ip().to_string());
    let is_allowed = is_allowed || app.secrets.keys().knows(given_key(request.headers()));
    if is_probe(request.uri().path()) || is_allowed {
        return next.run(request).await;
    }
    let detail = "the request's Host is not in server.allowed_hosts";
    Problem::new(ProblemKind::Host, detail).into_response()
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

fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()))
}

fn unknown_key() -> Response {
    let detail = "send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`";
    Problem::new(ProblemKind::Key, detail).into_response()
}

/// Asks for a key on what tells or costs something, where read keys are set; routes behind it know their [`Caller`].
pub(super) async fn check_read(State(app): State<Shared>, mut request: Request, next: Next) -> Response {
    let Some(caller) = app.secrets.keys().caller(given_key(request.headers())) else {
        return unknown_key();
    };
    tracing::Span::current().record("caller", caller.name());
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// Asks for an admin key, wherever the request comes from. Without admin keys there is no such route.
pub(super) async fn check_admin(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let keys = app.secrets.keys();
    if !keys.has_admin() {
        return super::health::not_found().await.into_response();
    }
    let given = given_key(request.headers());
    match keys.caller(given) {
        Some(caller @ Caller::Admin(_)) => {
            tracing::Span::current().record("caller", caller.name());
            next.run(request).await
        }
        Some(Caller::Reader(_)) => {
            Problem::new(ProblemKind::Forbidden, "this route asks for an admin key").into_response()
        }
        Some(Caller::Anyone) | None => unknown_key(),
    }
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
