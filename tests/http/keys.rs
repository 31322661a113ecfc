//! Who may ask: keys, their rotation, the admin, addresses that others reach.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use freetumor::http::{ApiKey, Server, ServerConfig};
use freetumor::stream::recipe::Recipe;

use super::common::FakeService;
use super::{Running, agent, eventually};

/// Asks with a key, and returns the status.
fn with_key(running: &Running, method: &str, path: &str, key: &str) -> u16 {
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(running.url(path))
        .header("authorization", format!("Bearer {key}"))
        .body(())
        .unwrap();
    agent().run(request).unwrap().status().as_u16()
}

#[test]
fn a_key_is_asked_for_where_one_is_configured() {
    let running = Running::start(FakeService::default(), |config| {
        config.read_keys = vec![ApiKey::new("secret"), ApiKey::new("next")];
    });
    assert_eq!(running.get("/v1/info").problem().0, 401);
    assert_eq!(running.get("/metrics").problem().0, 401);
    assert_eq!(running.get("/readyz").status, 200);
    let with = |name: &str, value: &str| {
        agent()
            .get(running.url("/v1/info"))
            .header(name, value)
            .call()
            .unwrap()
            .status()
    };
    assert_eq!(with("x-api-key", "secret"), 200);
    assert_eq!(with("authorization", "Bearer secret"), 200);
    assert_eq!(with("authorization", "Bearer next"), 200);
    assert_eq!(with("authorization", "Bearer secreT"), 401);
}

#[test]
fn admin_routes_exist_only_with_an_admin_key_and_only_for_it() {
    let without = Running::plain();
    assert_eq!(without.post("/v1/drain", "").problem().0, 404);
    let running = Running::start(FakeService::default(), |config| {
        config.read_keys = vec![ApiKey::new("reader")];
        config.admin_keys = vec![ApiKey::new("admin")];
    });
    assert_eq!(running.post("/v1/drain", "").problem().0, 401);
    assert_eq!(with_key(&running, "POST", "/v1/drain", "reader"), 403);
    assert_eq!(with_key(&running, "POST", "/v1/drain", "wrong"), 401);
    assert_eq!(with_key(&running, "GET", "/v1/info", "admin"), 200);
    assert_eq!(with_key(&running, "POST", "/v1/reload", "admin"), 204);
    assert_eq!(running.get("/readyz").status, 200);
    assert_eq!(with_key(&running, "POST", "/v1/drain", "admin"), 202);
    eventually("the end", || TcpStream::connect(running.address).is_err());
}

#[test]
fn keys_are_rotated_by_their_file_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    std::fs::write(&path, "# in use\nold\n").unwrap();
    let running = Running::start(FakeService::default(), |config| {
        config.read_keys_file = Some(path.clone());
    });
    let status = |key: &str| with_key(&running, "GET", "/v1/info", key);
    assert_eq!((status("old"), status("new")), (200, 401));
    let reload = running.server.as_ref().unwrap().reload();
    std::fs::write(&path, "old\nnew\n").unwrap();
    reload.now().unwrap();
    assert_eq!((status("old"), status("new")), (200, 200));
    // A damaged file changes nothing, and its error shows no key.
    std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
    let error = reload.now().unwrap_err().to_string();
    assert!(
        error.contains("server.read_keys") && !error.contains("three"),
        "{error}"
    );
    assert_eq!((status("old"), status("new")), (200, 200));
    // The server may look at the file by itself before it is told to.
    std::fs::write(&path, "new\n").unwrap();
    reload.now().unwrap();
    assert_eq!((status("old"), status("new")), (401, 200));
}

#[test]
fn an_address_that_others_reach_needs_a_key_or_a_word() {
    let config = ServerConfig {
        bind: SocketAddr::from(([0, 0, 0, 0], 0)),
        ..ServerConfig::default()
    };
    let refused = Server::start(config.clone(), Recipe::default(), Arc::new(FakeService::default()));
    let error = refused.err().unwrap().to_string();
    assert!(
        error.contains("server.bind") && error.contains("server.read_keys"),
        "{error}"
    );
    for change in [
        |config: &mut ServerConfig| config.allow_anonymous = true,
        |config: &mut ServerConfig| config.read_keys = vec![ApiKey::new("secret")],
    ] {
        drop(Running::start(FakeService::default(), |fresh| {
            *fresh = ServerConfig {
                drain_seconds: 0,
                ..config.clone()
            };
            change(fresh);
        }));
    }
}
