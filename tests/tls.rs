//! TLS: the server's certificate, and its exchange without a restart.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::FakeService;
use freetumor::http::{Server, ServerConfig};
use freetumor::stream::recipe::Recipe;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

fn path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls").join(name)
}

/// Copies a pair to where the server looks for it.
fn install(folder: &Path, pair: &str) {
    for kind in ["crt", "key"] {
        std::fs::copy(path(&format!("{pair}.{kind}")), folder.join(format!("server.{kind}"))).unwrap();
    }
}

type Connection = StreamOwned<ClientConnection, TcpStream>;

/// Connects as a client that trusts one certificate only.
fn connect(address: SocketAddr, trusted: &str) -> Connection {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(path(trusted)).unwrap())
        .unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    StreamOwned::new(client, TcpStream::connect(address).unwrap())
}

fn ask(connection: &mut Connection) -> std::io::Result<String> {
    write!(connection, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = vec![0; 1024];
    let length = connection.read(&mut answer)?;
    answer.truncate(length);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn start(folder: &Path) -> Server {
    let config = ServerConfig {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        tls_certificate: Some(folder.join("server.crt")),
        tls_key: Some(folder.join("server.key")),
        drain_seconds: 1,
        ..ServerConfig::default()
    };
    Server::start(config, Recipe::default(), Arc::new(FakeService::default())).unwrap()
}

#[test]
fn a_certificate_is_exchanged_under_open_connections() {
    let folder = tempfile::tempdir().unwrap();
    install(folder.path(), "first");
    let server = start(folder.path());
    let mut open = connect(server.address(), "first.crt");
    assert!(ask(&mut open).unwrap().starts_with("HTTP/1.1 200"));
    assert!(ask(&mut connect(server.address(), "second.crt")).is_err());
    // Half of a pair is refused, and the old one stays.
    std::fs::copy(path("second.crt"), folder.path().join("server.crt")).unwrap();
    let error = server.reload().now().unwrap_err().to_string();
    assert!(error.contains("server.tls_key"), "{error}");
    assert!(ask(&mut connect(server.address(), "first.crt")).is_ok());
    install(folder.path(), "second");
    server.reload().now().unwrap();
    assert!(
        ask(&mut connect(server.address(), "second.crt"))
            .unwrap()
            .starts_with("HTTP/1.1 200")
    );
    assert!(ask(&mut connect(server.address(), "first.crt")).is_err());
    assert!(ask(&mut open).unwrap().starts_with("HTTP/1.1 200"));
    server.drain().start();
    server.wait().unwrap();
}

#[test]
fn the_health_check_of_a_container_asks_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    install(folder.path(), "first");
    let server = start(folder.path());
    let port = server.address().port();
    let check = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_freetumor"))
            .arg("healthcheck")
            .args(arguments)
            .env("FREETUMOR_HEALTHCHECK_URL", format!("https://localhost:{port}"))
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let [trusted, other, key] = ["first.crt", "second.crt", "first.key"].map(|name| path(name).display().to_string());
    assert_eq!(check(&["--ca", &trusted]), (true, String::new()));
    assert!(!check(&["--ca", &other]).0);
    let (_, said) = check(&["--ca", &key]);
    assert!(said.contains("first.key: expected a certificate"), "{said}");
    assert!(check(&["--insecure", "--url", &format!("https://127.0.0.1:{port}")]).0);
    let (is_ready, said) = check(&[]);
    assert!(
        !is_ready && said.contains("expected --ca FILE, or --insecure"),
        "{said}"
    );
    server.drain().start();
    server.wait().unwrap();
}

#[test]
fn plain_http_gets_no_answer_and_other_connections_go_on() {
    let folder = tempfile::tempdir().unwrap();
    install(folder.path(), "first");
    let server = start(folder.path());
    // A handshake that never comes holds up nobody.
    let _silent = TcpStream::connect(server.address()).unwrap();
    let mut plain = TcpStream::connect(server.address()).unwrap();
    plain
        .write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).ok();
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert!(ask(&mut connect(server.address(), "first.crt")).is_ok());
    server.drain().start();
    server.wait().unwrap();
}

#[test]
fn files_that_are_no_certificate_are_named() {
    let folder = tempfile::tempdir().unwrap();
    install(folder.path(), "first");
    std::fs::write(folder.path().join("server.crt"), "no certificate").unwrap();
    let config = ServerConfig {
        tls_certificate: Some(folder.path().join("server.crt")),
        tls_key: Some(folder.path().join("server.key")),
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        ..ServerConfig::default()
    };
    let refused = Server::start(config, Recipe::default(), Arc::new(FakeService::default()));
    let error = refused.err().unwrap().to_string();
    assert!(
        error.contains("server.tls_certificate") && error.contains("server.crt"),
        "{error}"
    );
}
