//! What is asked for: problems that name the field, limits, what is described.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use freetumor::http::{ApiKey, Server, ServerConfig};
use freetumor::stream::recipe::Recipe;
use serde_json::{Value, json};

use super::common::{EPOCH, FakeService};
use super::{Running, agent, cursor_json};

#[test]
fn bad_requests_are_problems_that_name_the_field() {
    let running = Running::plain();
    let cursor = cursor_json(&running.stream(&json!({"delivery": {"count": 1}})).cursor.unwrap());
    let mut other_bundle = cursor.clone();
    other_bundle["bundle"] = "ab".repeat(32).into();
    let cases = [
        (r#"{"recipe": "#.to_owned(), 400, None),
        (json!({"recipe": {"sed": 1}}).to_string(), 422, Some("recipe.sed")),
        (
            json!({"recipe": {"gate": {"recall": 2.0}}}).to_string(),
            422,
            Some("recipe.gate.recall"),
        ),
        (
            json!({"recipe": {"organs": {"spleen": 1}}}).to_string(),
            422,
            Some("recipe.organs"),
        ),
        (
            json!({"recipe": {"patch": [4096, 16, 16]}}).to_string(),
            422,
            Some("recipe.patch"),
        ),
        (
            json!({"recipe": {"select": {"hold_out": ["trained_on"]}}}).to_string(),
            409,
            Some("recipe.select.hold_out"),
        ),
        (
            json!({"recipe": {"seed": 5}, "delivery": {"cursor": cursor}}).to_string(),
            409,
            Some("delivery.cursor.recipe"),
        ),
        (
            json!({"delivery": {"cursor": other_bundle}}).to_string(),
            410,
            Some("delivery.cursor.bundle"),
        ),
        (
            json!({"delivery": {"rank": 3, "world": 2}}).to_string(),
            422,
            Some("delivery.rank"),
        ),
        (
            json!({"delivery": {"batch_size": 100_000}}).to_string(),
            422,
            Some("delivery.batch_size"),
        ),
        (
            json!({"delivery": {"batch_size": 0}}).to_string(),
            422,
            Some("delivery.batch_size"),
        ),
        (" ".repeat((1 << 20) + 1), 413, None),
    ];
    for (body, status, field) in cases {
        let got = running.post("/v1/stream", &body).problem();
        assert_eq!(
            got,
            (status, field.map(str::to_owned)),
            "{}",
            &body[..body.len().min(200)]
        );
    }
    assert_eq!(running.get("/v1/nothing").problem().0, 404);
    assert_eq!(running.get("/v1/stream").problem().0, 405);
    assert_eq!(running.get("/v1/batch?size=huge").problem(), (422, Some("size".into())));
    assert_eq!(running.get("/v1/batch?idx=1").problem(), (422, Some("idx".into())));
}

#[test]
fn validation_tells_hash_epoch_and_memory() {
    let running = Running::plain();
    let body = running
        .post("/v1/recipes/validate", r#"{"delivery": {"batch_size": 4}}"#)
        .json();
    assert_eq!(body["patches_per_epoch"], EPOCH);
    assert_eq!(body["hash"].as_str().unwrap().len(), 64);
    assert_eq!(body["feasible"]["unlabelled_host"]["liver"], 3);
    assert_eq!(body["batch_bytes"], 4 * 16 * 16 * 24 * 5 + 2 * 64);
}

#[test]
fn a_request_id_is_kept_or_given_and_stands_in_the_problem() {
    let running = Running::plain();
    let ask = |path: &str, id: &str| {
        let mut response = agent()
            .get(running.url(path))
            .header("x-request-id", id)
            .call()
            .unwrap();
        let header = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        (header, response.body_mut().read_to_string().unwrap())
    };
    assert_eq!(ask("/v1/info", "job-7").0, "job-7");
    let (header, body) = ask("/v1/batch?idx=1", "job-8");
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((header.as_str(), &problem["request_id"]), ("job-8", &json!("job-8")));
    let (given, body) = ask("/v1/nothing", "not harmless {}");
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert!(
        given.len() > 16 && problem["request_id"] == given.as_str(),
        "{given} {body}"
    );
    let streamed = agent()
        .post(running.url("/v1/stream"))
        .send(r#"{"delivery": {"count": 1}}"#)
        .unwrap();
    assert!(streamed.headers().contains_key("x-request-id"));
}

/// Sends raw bytes and returns what comes back before the connection ends.
fn raw(running: &Running, request: &str) -> String {
    let mut connection = TcpStream::connect(running.address).unwrap();
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).ok();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn heads_and_bodies_are_refused_before_they_are_read() {
    let running = Running::plain();
    let head = |headers: &str| format!("GET /livez HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n");
    assert!(raw(&running, &head("")).starts_with("HTTP/1.1 200"));
    let long = format!("X-Long: {}\r\n", "x".repeat(64 << 10));
    assert!(raw(&running, &head(&long)).starts_with("HTTP/1.1 431"));
    let many: String = (0..100).map(|n| format!("X-{n}: y\r\n")).collect();
    assert!(raw(&running, &head(&many)).starts_with("HTTP/1.1 431"));
    // Nothing of the declared body is ever sent.
    let declared = "POST /v1/stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000000\r\n\r\n";
    assert!(raw(&running, declared).starts_with("HTTP/1.1 413"));
    let slow = Running::start(FakeService::default(), |config| config.body_seconds = 1);
    let begun = "POST /v1/stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{";
    assert!(raw(&slow, begun).starts_with("HTTP/1.1 408"));
}

#[test]
fn a_foreign_host_is_refused() {
    let status = |running: &Running, host: &str, key: &str| {
        let mut connection = TcpStream::connect(running.address).unwrap();
        write!(
            connection,
            "GET /metrics HTTP/1.1\r\nHost: {host}\r\n{key}Connection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer[9..12].to_owned()
    };
    let open = Running::plain();
    assert_eq!(status(&open, "localhost", ""), "200");
    assert_eq!(status(&open, "evil.example", ""), "421");
    assert_eq!(status(&open, "evil.example", "X-API-Key: secret\r\n"), "421");
    // No web page knows the key; Prometheus does, and calls a pod by an address that nobody can list.
    let with_key = Running::start(FakeService::default(), |config| {
        config.read_keys = vec![ApiKey::new("secret")]
    });
    assert_eq!(status(&with_key, "10.1.2.3:8080", "X-API-Key: secret\r\n"), "200");
    assert_eq!(status(&with_key, "10.1.2.3:8080", "X-API-Key: wrong\r\n"), "421");
    assert_eq!(status(&with_key, "10.1.2.3:8080", ""), "421");
}

#[test]
fn what_is_served_is_described() {
    let running = Running::plain();
    let info = running.get("/v1/info").json();
    assert_eq!(info["plan"]["patch"], json!([16, 16, 24]));
    assert_eq!(info["default"]["numerics"], "fake");
    let document = running.get("/openapi.json").json();
    let paths: Vec<_> = document["paths"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(
        paths,
        [
            "/",
            "/docs",
            "/livez",
            "/metrics",
            "/openapi.json",
            "/readyz",
            "/v1/batch",
            "/v1/drain",
            "/v1/info",
            "/v1/models",
            "/v1/models/roll-back",
            "/v1/models/{name}/activate",
            "/v1/models/{name}/load",
            "/v1/models/{name}/release",
            "/v1/recipes/validate",
            "/v1/reload",
            "/v1/stream",
            "/v1/trainings",
            "/v1/trainings/{name}",
            "/v1/trainings/{name}/events",
            "/v1/trainings/{name}/files/{file}",
            "/v1/trainings/{name}/promote/{models}",
            "/v1/trainings/{name}/resume",
            "/v1/trainings/{name}/stop",
        ]
    );
    for page in ["/", "/docs"] {
        let page = running.get(page);
        assert!(page.status == 200 && !String::from_utf8_lossy(&page.body).contains("https://"));
    }
    running.stream(&json!({}));
    let metrics = String::from_utf8(running.get("/metrics").body).unwrap();
    for name in [
        "freetumor_patches_total{",
        "freetumor_streams_open",
        "freetumor_http_requests_total{",
        "freetumor_http_request_seconds_bucket{",
        "freetumor_connections_open",
        "freetumor_build_info{",
        "freetumor_models_info{",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
}

#[test]
fn a_port_in_use_is_a_clear_error() {
    let running = Running::plain();
    let config = ServerConfig {
        bind: running.address,
        ..ServerConfig::default()
    };
    let error = Server::start(config, Recipe::default(), Arc::new(FakeService::default()))
        .err()
        .unwrap();
    let text = error.to_string();
    assert!(
        text.contains("server.bind") && text.contains("the port is in use"),
        "{text}"
    );
}
