//! Streams: epochs, cursors, ranks, failures, slow and absent readers, the end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use freetumor::wire::proto::EndReason;
use freetumor::wire::reader;
use serde_json::{Value, json};

use super::common::{EPOCH, FakeService};
use super::{Running, Streamed, agent, cursor_json, eventually};

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
