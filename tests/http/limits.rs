//! How much one client may take: streams, batches, connections.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::common::FakeService;
use super::{Running, eventually};

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
