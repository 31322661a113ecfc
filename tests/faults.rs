//! Faults inside the process: a device thread that panics, and a device that is lost.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod support;

use std::io::{BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use freetumor::checkpoint::Bundle;
use freetumor::http::{Server, ServerConfig};
use freetumor::nn::{ContrastOver, GeneratorConfig};
use freetumor::store::Store;
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{StreamConfig, Streams};
use freetumor::wire::proto::{EndReason, Error};
use freetumor::wire::reader::{self, Message};
use serde_json::{Value, json};

use support::run;

/// The bundled models with a generator of another number of organs: it panics over every lesion.
fn panicking() -> Arc<Bundle> {
    let device = Device::flex();
    let mut bundle = Bundle::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo"), &device).unwrap();
    let wrong = GeneratorConfig {
        widths: vec![4, 8],
        organs: bundle.plan.labels.organs().len() + 2,
        spread_hu: 10.0,
        contrast_over: ContrastOver::Lesion,
    };
    bundle.generator = Some(wrong.init(&device, 1));
    Arc::new(bundle)
}

struct Running {
    server: Option<Server>,
    url: String,
    _dir: tempfile::TempDir,
}

impl Running {
    fn start(bundle: Arc<Bundle>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let said = run(&[
            "phantom",
            "--store",
            path.to_str().unwrap(),
            "--labelled",
            "1",
            "--unlabelled",
            "1",
            "--seed",
            "5",
        ]);
        assert_eq!(said.code, Some(0), "{}", said.text);
        let store = Arc::new(Store::open(&path).unwrap());
        let service = Streams::start(store, Some(bundle), StreamConfig::default()).unwrap();
        let config = ServerConfig {
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            drain_seconds: 1,
            ..ServerConfig::default()
        };
        let server = Server::start(config, Recipe::default(), service).unwrap();
        Self {
            url: format!("http://{}", server.address()),
            server: Some(server),
            _dir: dir,
        }
    }

    fn status(&self, path: &str) -> u16 {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        agent
            .get(format!("{}{path}", self.url))
            .call()
            .unwrap()
            .status()
            .as_u16()
    }

    fn stream(&self, recipe: &Value, count: u64) -> (usize, Option<EndReason>, Option<Error>) {
        self.stream_as(recipe, &json!({"count": count, "batch_size": 1}))
    }

    fn stream_as(&self, recipe: &Value, delivery: &Value) -> (usize, Option<EndReason>, Option<Error>) {
        let body = json!({"recipe": recipe, "delivery": delivery}).to_string();
        let answer = ureq::post(format!("{}/v1/stream", self.url)).send(body).unwrap();
        read(&mut BufReader::new(answer.into_body().into_reader()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let server = self.server.take().unwrap();
        server.drain().start();
        server.wait().unwrap();
    }
}

/// Returns how many batches arrived and how the stream ended.
fn read(source: &mut impl Read) -> (usize, Option<EndReason>, Option<Error>) {
    let (mut batches, mut end, mut error) = (0, None, None);
    while let Some(message) = reader::read(source).unwrap() {
        match message {
            Message::Batch { .. } => batches += 1,
            Message::End(last) => end = Some(last.reason()),
            Message::Error(last) => error = Some(last),
            Message::Header(_) | Message::Heartbeat(_) => {}
        }
    }
    (batches, end, error)
}

#[test]
fn a_panic_on_the_device_ends_its_stream_and_the_service_recovers_or_says_that_it_is_lost() {
    let running = Running::start(panicking());
    let analytic = json!({"synthesizer": "analytic", "gate": {"enabled": false}, "unlabelled_negatives": "trust"});
    let conditional = json!({"synthesizer": "conditional", "gate": {"enabled": false},
        "unlabelled_negatives": "trust", "pools": {"unlabelled_host": 1}});
    let (batches, end, error) = running.stream(&conditional, 4);
    let error = error.unwrap();
    assert_eq!((batches, end, error.status), (0, None, 500));
    assert!(error.detail.contains("the device thread failed"), "{}", error.detail);
    // The thread goes on: other streams are served, and one panic does not make the process dead.
    assert_eq!(running.stream(&analytic, 4), (4, Some(EndReason::Count), None));
    assert_eq!(running.status("/livez"), 200);
    // A device on which nothing works any more is told to whoever restarts it.
    let deadline = Instant::now() + Duration::from_secs(60);
    while running.status("/livez") == 200 {
        assert!(Instant::now() < deadline, "the device is lost, and nobody is told");
        running.stream(&conditional, 4);
    }
    assert_eq!(running.status("/livez"), 503);
    // Also who takes failed items is told, instead of getting all that is left of the epoch as such.
    let skipping = json!({"count": 200, "batch_size": 1, "on_failed": "skip"});
    let (batches, end, error) = running.stream_as(&conditional, &skipping);
    assert_eq!((batches, end, error.unwrap().status), (0, None, 500));
}
