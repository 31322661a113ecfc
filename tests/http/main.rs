//! The real server on port 0 with a deterministic patch service.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod keys;
mod limits;
mod requests;
mod streams;

use std::io::{BufReader, Read};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::FakeService;
use freetumor::http::{Server, ServerConfig};
use freetumor::stream::recipe::Recipe;
use freetumor::wire::proto::{Cursor, EndReason};
use freetumor::wire::reader::{self, Message};
use serde_json::{Value, json};

/// A server that is drained when the test ends.
struct Running {
    server: Option<Server>,
    address: SocketAddr,
    service: Arc<FakeService>,
}

impl Running {
    fn start(service: FakeService, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut config = ServerConfig {
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            drain_seconds: 1,
            ..ServerConfig::default()
        };
        change(&mut config);
        let service = Arc::new(service);
        let server = Server::start(config, Recipe::default(), service.clone()).unwrap();
        Self {
            address: server.address(),
            server: Some(server),
            service,
        }
    }

    fn plain() -> Self {
        Self::start(FakeService::default(), |_| {})
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn get(&self, path: &str) -> Answer {
        Answer::of(agent().get(self.url(path)).call().unwrap())
    }

    fn post(&self, path: &str, body: &str) -> Answer {
        Answer::of(agent().post(self.url(path)).send(body).unwrap())
    }

    fn open(&self, body: &Value) -> impl Read + use<> {
        let response = agent().post(self.url("/v1/stream")).send(body.to_string()).unwrap();
        assert_eq!(response.status(), 200);
        BufReader::new(response.into_body().into_reader())
    }

    fn stream(&self, body: &Value) -> Streamed {
        Streamed::read(&mut self.open(body))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let server = self.server.take().unwrap();
        server.drain().start();
        server.wait().unwrap();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        .into()
}

struct Answer {
    status: u16,
    content_type: String,
    retry_after: Option<String>,
    body: Vec<u8>,
}

impl Answer {
    fn of(mut response: ureq::http::Response<ureq::Body>) -> Self {
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        Self {
            status: response.status().as_u16(),
            content_type: header("content-type").unwrap_or_default(),
            retry_after: header("retry-after"),
            body: response.body_mut().read_to_vec().unwrap(),
        }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.body)))
    }

    fn problem(&self) -> (u16, Option<String>) {
        assert_eq!(
            self.content_type,
            "application/problem+json",
            "{}",
            String::from_utf8_lossy(&self.body)
        );
        let body = self.json();
        assert_eq!(body["status"], self.status);
        (self.status, body["field"].as_str().map(str::to_owned))
    }
}

/// Everything a stream sent, in order.
#[derive(Default)]
struct Streamed {
    header: Option<freetumor::wire::proto::StreamHeader>,
    indices: Vec<u64>,
    images: Vec<Vec<u8>>,
    heartbeats: usize,
    cursor: Option<Cursor>,
    end: Option<EndReason>,
    error: Option<freetumor::wire::proto::Error>,
}

impl Streamed {
    fn read(source: &mut impl Read) -> Self {
        let mut all = Self::default();
        while let Some(message) = reader::read(source).unwrap() {
            all.take(message);
        }
        all
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Header(header) => self.header = Some(header),
            Message::Batch { header, tensors } => {
                self.indices.extend(header.patches.iter().map(|patch| patch.index));
                self.images.push(tensors[0].bytes.clone());
                self.cursor = header.next;
            }
            Message::Heartbeat(_) => self.heartbeats += 1,
            Message::End(end) => {
                self.end = Some(end.reason());
                self.cursor = end.cursor;
            }
            Message::Error(error) => self.error = Some(error),
        }
    }
}

fn cursor_json(cursor: &Cursor) -> Value {
    json!({"recipe": cursor.recipe, "snapshot": cursor.snapshot, "bundle": cursor.bundle,
        "revision": cursor.revision, "next_index": cursor.next_index})
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}
