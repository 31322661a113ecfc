//! The real server on port 0 with a deterministic patch service.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{EPOCH, FakeService};
use freetumor::http::{ApiKey, Server, ServerConfig};
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

#[test]
fn an_epoch_arrives_whole_and_ends_with_a_frame() {
    let running = Running::plain();
    let all = running.stream(&json!({"delivery": {"batch_size": 2, "codec": "zstd"}}));
    assert_eq!(all.indices, (0..EPOCH).collect::<Vec<_>>());
    assert_eq!(all.end, Some(EndReason::EndOfEpoch));
    let header = all.header.unwrap();
    assert_eq!(
        (header.protocol, header.patches_per_epoch, header.batches),
        (1, EPOCH, 6)
    );
    assert_eq!(header.labels["liver_tumour"], 2);
    let recipe: Value = serde_json::from_str(&header.recipe_json).unwrap();
    assert_eq!(recipe["patch"], json!([16, 16, 24]));
}

#[test]
fn resuming_by_cursor_gives_the_rest() {
    let running = Running::plain();
    let whole = running.stream(&json!({}));
    let first = running.stream(&json!({"delivery": {"count": 2}}));
    assert_eq!((first.end, first.indices.len()), (Some(EndReason::Count), 4));
    let rest = running.stream(&json!({"delivery": {"cursor": cursor_json(&first.cursor.unwrap())}}));
    assert_eq!([first.images, rest.images].concat(), whole.images);
}

#[test]
fn ranks_share_an_epoch_without_overlap() {
    let running = Running::plain();
    let rank = |rank: u32| {
        running
            .stream(&json!({"delivery": {"rank": rank, "world": 3, "batch_size": 2}}))
            .indices
    };
    let mut all = [rank(0), rank(1), rank(2)].concat();
    all.sort_unstable();
    assert_eq!(all, (0..EPOCH).collect::<Vec<_>>());
}

#[test]
fn identical_requests_give_identical_files() {
    let running = Running::plain();
    for format in ["npz", "safetensors"] {
        let path = format!("/v1/batch?index=3&batch_size=2&format={format}&outputs=source,soft_mask&image=f16");
        let (first, second) = (running.get(&path), running.get(&path));
        assert_eq!(first.status, 200, "{}", String::from_utf8_lossy(&first.body));
        assert_eq!(first.body, second.body);
    }
    let other = running.get("/v1/batch?index=3&seed=1");
    assert_ne!(other.body, running.get("/v1/batch?index=3").body);
}

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
fn a_failed_patch_is_an_error_frame_and_a_problem() {
    let service = FakeService {
        broken: Some(5),
        ..FakeService::default()
    };
    let running = Running::start(service, |_| {});
    let all = running.stream(&json!({}));
    assert_eq!((all.indices.len(), all.end), (4, None));
    let error = all.error.unwrap();
    assert_eq!(error.status, 500);
    assert!(error.detail.contains("patch 5: case_003.ftv"), "{}", error.detail);
    let asked = agent().post(running.url("/v1/stream")).header("x-request-id", "job-7");
    let again = Streamed::read(&mut asked.send("{}").unwrap().into_body().into_reader());
    assert_eq!(again.error.unwrap().request_id, "job-7");
    assert_eq!(running.get("/v1/batch?index=4").problem().0, 500);
}

#[test]
fn a_slow_reader_stalls_only_itself_and_holds_little() {
    let running = Running::plain();
    // About 1.3 MiB a batch: neither socket buffer nor channel can swallow the 2000 batches asked for.
    let slow = running.open(&json!({"recipe": {"patch": [64, 64, 64]}, "delivery": {"count": 2000, "batch_size": 1}}));
    let made = || running.service.made.load(Ordering::SeqCst);
    eventually("the producer's start", || made() > 0);
    let mut last = 0;
    eventually_stable(&made, &mut last);
    assert!(last < 40, "{last} batches were made for a client that reads nothing");
    // Another client gets everything meanwhile.
    assert_eq!(running.stream(&json!({})).end, Some(EndReason::EndOfEpoch));
    assert_eq!(made(), last + 6);
    drop(slow);
}

fn eventually_stable(value: &impl Fn() -> u64, last: &mut u64) {
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(300));
        let now = value();
        if now == *last {
            return;
        }
        *last = now;
    }
    panic!("the producer never stopped");
}

#[test]
fn too_many_streams_are_refused_and_a_client_that_left_frees_its_place() {
    let running = Running::start(FakeService::default(), |config| config.max_streams = 1);
    let held = running.open(&json!({"recipe": {"patch": [64, 64, 64]}, "delivery": {"count": 2000}}));
    let refused = running.post("/v1/stream", "{}");
    assert_eq!(refused.problem(), (429, None));
    assert_eq!(refused.retry_after.as_deref(), Some("2"));
    drop(held);
    eventually("the stream's end", || running.service.open.load(Ordering::SeqCst) == 0);
    eventually("a free place", || {
        running.post("/v1/stream", r#"{"delivery": {"count": 1}}"#).status == 200
    });
}

#[test]
fn heartbeats_fill_a_long_wait() {
    let service = FakeService {
        batch_time: Duration::from_millis(1500),
        ..FakeService::default()
    };
    let running = Running::start(service, |config| config.heartbeat_seconds = 1);
    let all = running.stream(&json!({"delivery": {"count": 1}}));
    assert_eq!((all.heartbeats, all.end), (1, Some(EndReason::Count)));
}

#[test]
fn an_old_stream_ends_with_rebalance() {
    let service = FakeService {
        batch_time: Duration::from_millis(300),
        ..FakeService::default()
    };
    let running = Running::start(service, |config| config.max_stream_age_seconds = Some(1));
    let all = running.stream(&json!({}));
    assert_eq!(all.end, Some(EndReason::Rebalance));
    assert_eq!(all.cursor.unwrap().next_index, all.indices.len() as u64);
}

#[test]
fn draining_ends_streams_with_a_cursor_and_refuses_new_ones() {
    let service = FakeService {
        batch_time: Duration::from_millis(200),
        ..FakeService::default()
    };
    let running = Running::start(service, |config| config.drain_seconds = 10);
    let mut stream = running.open(&json!({"delivery": {"count": 1000}}));
    let mut all = Streamed::default();
    for _ in 0..2 {
        all.take(reader::read(&mut stream).unwrap().unwrap());
    }
    assert_eq!(running.get("/readyz").status, 200);
    running.server.as_ref().unwrap().drain().start();
    assert_eq!(running.get("/readyz").problem().0, 503);
    assert_eq!(running.post("/v1/stream", "{}").problem().0, 503);
    while let Some(message) = reader::read(&mut stream).unwrap() {
        all.take(message);
    }
    assert_eq!(all.end, Some(EndReason::Shutdown));
    assert_eq!(all.cursor.unwrap().next_index, all.indices.len() as u64);
    let started = Instant::now();
    drop(running);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_stalled_client_does_not_hold_up_a_shutdown() {
    let running = Running::plain();
    let _stalled = running.open(&json!({"recipe": {"patch": [64, 64, 64]}, "delivery": {"count": 2000}}));
    let open = running.service.open.clone();
    let started = Instant::now();
    drop(running);
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    eventually("the stream's end", || open.load(Ordering::SeqCst) == 0);
}

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

#[test]
fn a_batch_that_nobody_takes_holds_a_place_until_it_is_taken() {
    let running = Running::start(FakeService::default(), |config| config.max_streams = 1);
    // 40 MiB: more than socket buffers swallow.
    let request = "GET /v1/batch?patch=128&batch_size=4 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let mut slow = TcpStream::connect(running.address).unwrap();
    slow.write_all(request.as_bytes()).unwrap();
    let mut head = [0; 15];
    slow.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK");
    let refused = running.get("/v1/batch");
    assert_eq!(refused.problem(), (429, None));
    assert!(refused.retry_after.is_some());
    assert_eq!(slow.read_to_end(&mut Vec::new()).unwrap() >> 20, 40);
    eventually("a free place", || running.get("/v1/batch").status == 200);
}

#[test]
fn one_key_cannot_take_more_work_than_it_may() {
    // Two patches of 64^3 voxels, four attempts each: 2 MiVoxels.
    let running = Running::start(FakeService::default(), |config| {
        config.max_voxels_per_key = 3 << 20;
    });
    let body = json!({"recipe": {"patch": [64, 64, 64]}, "delivery": {"count": 2000}});
    let held = running.open(&body);
    let refused = running.post("/v1/stream", &body.to_string());
    assert_eq!(refused.problem(), (429, None));
    assert!(refused.retry_after.is_some() && refused.json()["type"] == "urn:freetumor:problem:budget");
    let never = json!({"recipe": {"patch": [64, 64, 64]}, "delivery": {"batch_size": 4}});
    let refused = running.post("/v1/stream", &never.to_string()).problem();
    assert_eq!(refused, (422, Some("delivery.batch_size".into())));
    drop(held);
    eventually("the stream's end", || running.service.open.load(Ordering::SeqCst) == 0);
    eventually("a free budget", || running.get("/v1/batch?patch=64").status == 200);
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
fn a_client_that_left_before_its_batch_was_begun_costs_none() {
    let service = FakeService {
        resolve_time: Duration::from_millis(400),
        ..FakeService::default()
    };
    let running = Running::start(service, |_| {});
    let mut leaves = TcpStream::connect(running.address).unwrap();
    leaves
        .write_all(b"GET /v1/batch HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(leaves);
    // Begun later, and served: the first had its turn.
    assert_eq!(running.get("/v1/batch").status, 200);
    assert_eq!(running.service.made.load(Ordering::SeqCst), 1);
}

#[test]
fn a_batch_that_is_not_ready_in_time_is_given_up() {
    let service = FakeService {
        resolve_time: Duration::from_secs(3),
        ..FakeService::default()
    };
    let running = Running::start(service, |config| config.batch_seconds = 20);
    let late = running.get("/v1/batch?deadline_seconds=1");
    assert_eq!(late.problem(), (503, None));
    assert!(late.retry_after.is_some() && late.json()["type"] == "urn:freetumor:problem:deadline");
    assert_eq!(running.get("/v1/batch?deadline_seconds=15").status, 200);
    // Of the first one nothing was made: its time was over before its turn.
    assert_eq!(running.service.made.load(Ordering::SeqCst), 1);
    for refused in ["0", "21", "-1"] {
        let refused = running.get(&format!("/v1/batch?deadline_seconds={refused}"));
        assert_eq!(refused.problem(), (422, Some("deadline_seconds".into())));
    }
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
fn connections_beyond_the_limit_are_closed_and_do_not_stop_those_that_are_open() {
    let running = Running::start(FakeService::default(), |config| config.max_connections = 16);
    let mut held = TcpStream::connect(running.address).unwrap();
    let mut others: Vec<TcpStream> = (0..15).map(|_| TcpStream::connect(running.address).unwrap()).collect();
    let ask = |connection: &mut TcpStream| {
        connection
            .write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .ok();
        let mut start = [0; 12];
        connection
            .read_exact(&mut start)
            .is_ok_and(|()| start == *b"HTTP/1.1 200")
    };
    eventually("a full house", || {
        !ask(&mut TcpStream::connect(running.address).unwrap())
    });
    assert!(ask(&mut held));
    others.clear();
    eventually(
        "a free place",
        || ask(&mut TcpStream::connect(running.address).unwrap()),
    );
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
