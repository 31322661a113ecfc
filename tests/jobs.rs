//! Hosted trainings on toy volumes: their states, their limits, restarts, and what becomes of their segmentors.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod toy;
#[path = "toy/service.rs"]
mod toy_service;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Role, load_manifest};
use freetumor::evaluate::HeldOutSettings;
use freetumor::jobs::{
    Event, JobError, JobName, JobState, JobsConfig, ModelFolders, TrainingConfig, TrainingHost, TrainingParts,
};
use freetumor::kernel::ComputeDtype;
use freetumor::learn::ValidationSettings;
use freetumor::stream::Weights;
use toy_service::ToyService;

/// The longest that a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(120);

fn config(steps: u64) -> TrainingConfig {
    let mut config = TrainingConfig {
        widths: vec![4, 8],
        steps,
        checkpoint_every: 2,
        validation: ValidationSettings {
            every: 2,
            cases: 1,
            ..ValidationSettings::default()
        },
        held_out: HeldOutSettings {
            cases: 1,
            ..HeldOutSettings::default()
        },
        ..TrainingConfig::default()
    };
    config.held_out.window.window = [16; 3];
    config
}

fn start(root: &Path, limits: JobsConfig) -> Result<Arc<TrainingHost>, JobError> {
    start_over(root, limits, 10)
}

/// Starts over a store of so many labelled cases.
fn start_over(root: &Path, limits: JobsConfig, labelled: usize) -> Result<Arc<TrainingHost>, JobError> {
    let cases = Arc::new(toy::store(labelled, 2));
    let service = Arc::new(ToyService(freetumor::store::Cases::plan(&*cases).clone()));
    let models = root.join("models");
    std::fs::create_dir_all(&models).unwrap();
    std::fs::create_dir_all(root.join("jobs")).unwrap();
    TrainingHost::start(TrainingParts {
        root: root.join("jobs"),
        cases,
        service,
        defaults: TrainingConfig::default(),
        config: limits,
        weights: Weights::default(),
        device: Device::flex(),
        dtype: ComputeDtype::F32,
        models: ModelFolders {
            root: Some(models),
            first: None,
        },
    })
}

fn name(text: &str) -> JobName {
    text.parse().unwrap()
}

/// Waits until a job is in a state.
fn wait(host: &TrainingHost, job: &str, state: JobState) {
    let until = Instant::now() + PATIENCE;
    loop {
        let status = host.get(job).unwrap().1;
        if status.state == state {
            return;
        }
        assert!(Instant::now() < until && status.failure.is_none(), "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns every event of a job that has ended.
fn events(host: &Arc<TrainingHost>, job: &str, after: u64) -> Vec<(u64, Event)> {
    let mut follower = host.follow(job, after).unwrap();
    let mut events = Vec::new();
    while !follower.is_over() {
        events.extend(
            follower
                .next(PATIENCE)
                .unwrap()
                .into_iter()
                .map(|entry| (entry.id, entry.event)),
        );
    }
    events
}

fn weights(root: &Path, job: &str) -> Vec<u8> {
    std::fs::read(root.join("jobs").join(job).join("segmentor.safetensors")).unwrap()
}

/// Returns (step, validation Dice) of every validated step, the last told of each.
fn curve(events: &[(u64, Event)]) -> std::collections::BTreeMap<u64, f64> {
    let scores = events.iter().filter_map(|(_, event)| match event {
        Event::Step { step, metrics, .. } => Some((*step, *metrics.get("validation_dice")?)),
        _ => None,
    });
    scores.collect()
}

#[test]
fn a_job_trains_tells_its_steps_and_its_segmentor_becomes_a_critic() {
    let folder = tempfile::tempdir().unwrap();
    let host = start(folder.path(), JobsConfig::default()).unwrap();
    assert_eq!(host.submit(name("liver-1"), config(6)).unwrap().state, JobState::Queued);
    let told = events(&host, "liver-1", 0);
    let ids: Vec<u64> = told.iter().map(|(id, _)| *id).collect();
    assert_eq!(
        ids,
        (1..=told.len() as u64).collect::<Vec<_>>(),
        "events are counted from 1 without a gap"
    );
    assert_eq!((&told[0].1, &told[1].1), (&Event::Queued, &Event::Started));
    assert_eq!(told.last().unwrap().1, Event::Finished);
    assert_eq!(curve(&told).keys().copied().collect::<Vec<_>>(), [2, 4, 6]);
    assert_eq!(
        events(&host, "liver-1", 2),
        told[2..],
        "a client goes on after the last number it has"
    );
    let status = host.get("liver-1").unwrap().1;
    assert_eq!((status.state, status.step, status.steps), (JobState::Finished, 6, 6));
    assert_eq!(status.validation_dice, curve(&told).values().last().copied());

    let promoted = host.promote("liver-1", &name("round-2")).unwrap();
    let models = folder.path().join("models/round-2");
    let bundle = Bundle::load(&models, &Device::flex()).unwrap();
    assert_eq!(bundle.hash, promoted.bundle);
    let lesions: usize = promoted
        .calibration
        .entries
        .iter()
        .map(|entry| entry.lesions)
        .max()
        .unwrap();
    assert_eq!(lesions, 2, "a fifth of ten cases was held out, each with one tumour");
    let (critic, segmentor) = (
        load_manifest(&models, Role::Critic).unwrap(),
        load_manifest(&folder.path().join("jobs/liver-1"), Role::Segmentor).unwrap(),
    );
    assert_eq!(critic.training, segmentor.training, "what it saw goes with it (P7)");
    let again = host.promote("liver-1", &name("round-2")).unwrap_err();
    assert!(matches!(again, JobError::ModelsExist(_)), "{again}");
    let left: Vec<_> = std::fs::read_dir(folder.path().join("models")).unwrap().collect();
    assert_eq!(left.len(), 1, "no half promotion stays behind");
}

#[test]
fn a_promotion_judges_no_case_that_the_segmentor_learnt_from_also_after_the_store_grew() {
    let folder = tempfile::tempdir().unwrap();
    let host = start(folder.path(), JobsConfig::default()).unwrap();
    host.submit(name("a"), config(2)).unwrap();
    wait(&host, "a", JobState::Finished);
    drop(host);
    // Three of fifteen cases are held out now, and dealt anew.
    let host = start_over(folder.path(), JobsConfig::default(), 15).unwrap();
    let promoted = host.promote("a", &name("b")).unwrap();
    let lesions = promoted.calibration.entries.iter().map(|entry| entry.lesions).max();
    assert_eq!(lesions, Some(2), "of the three, one was learnt from");
}

#[test]
fn jobs_that_were_stopped_or_whose_server_ended_come_to_the_same_weights() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let host = start(whole.path(), JobsConfig::default()).unwrap();
    host.submit(name("a"), config(12)).unwrap();
    let uninterrupted = curve(&events(&host, "a", 0));

    let host = start(parts.path(), JobsConfig::default()).unwrap();
    host.submit(name("a"), config(12)).unwrap();
    let mut follower = host.follow("a", 0).unwrap();
    let mut wait_for_step = |least: u64| loop {
        let entries = follower.next(PATIENCE).unwrap();
        let reached = |event: &Event| matches!(event, Event::Step { step, .. } if *step >= least);
        if entries.iter().any(|entry| reached(&entry.event)) {
            return;
        }
    };
    wait_for_step(2);
    host.stop("a").unwrap();
    wait(&host, "a", JobState::Stopped);
    let refused = host.promote("a", &name("early")).unwrap_err();
    assert!(refused.to_string().contains("a is stopped"), "{refused}");
    host.resume("a").unwrap();
    wait_for_step(6);
    host.close(PATIENCE);
    assert_eq!(host.get("a").unwrap().1.state, JobState::Interrupted);
    drop((follower, host));

    let host = start(parts.path(), JobsConfig::default()).unwrap();
    wait(&host, "a", JobState::Finished);
    let told = events(&host, "a", 0);
    assert_eq!(curve(&told), uninterrupted, "the curve goes on where it was");
    assert_eq!(weights(parts.path(), "a"), weights(whole.path(), "a"));
    let states: Vec<&str> = (told.iter())
        .map(|(_, event)| event.name())
        .filter(|name| !matches!(*name, "step" | "note"))
        .collect();
    let expected = [
        "queued",
        "started",
        "stopping",
        "stopped",
        "queued",
        "started",
        "interrupted",
        "queued",
        "started",
        "finished",
    ];
    assert_eq!(states, expected);
}

#[test]
fn a_stop_that_was_asked_for_outlives_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let host = start(root, JobsConfig::default()).unwrap();
    host.submit(name("long"), config(1_000_000)).unwrap();
    wait(&host, "long", JobState::Running);
    host.stop("long").unwrap();
    // The server ends before the training has looked.
    host.close(PATIENCE);
    drop(host);
    let host = start(root, JobsConfig::default()).unwrap();
    assert_eq!(host.get("long").unwrap().1.state, JobState::Stopped);
    host.resume("long").unwrap();
    wait(&host, "long", JobState::Running);
    // Killed where it asked: the wish is all that the journal has.
    let journal = root.join("jobs/long/events.jsonl");
    host.close(PATIENCE);
    drop(host);
    let text = std::fs::read_to_string(&journal).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "interrupted");
    let killed: Vec<&str> = text.lines().take_while(|line| !line.contains("stopping")).collect();
    let asked = text.lines().nth(killed.len()).unwrap();
    std::fs::write(&journal, format!("{}\n{asked}\n", killed.join("\n"))).unwrap();
    let host = start(root, JobsConfig::default()).unwrap();
    assert_eq!(host.get("long").unwrap().1.state, JobState::Stopped);
}

#[test]
fn who_waited_keeps_its_turn_over_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let mut host = start(folder.path(), JobsConfig::default()).unwrap();
    // In the order of neither names nor events: "b" was stopped and queued again.
    host.submit(name("z"), config(1_000_000)).unwrap();
    wait(&host, "z", JobState::Running);
    for job in ["b", "y", "c", "x"] {
        host.submit(name(job), config(2)).unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
    host.stop("b").unwrap();
    wait(&host, "b", JobState::Stopped);
    host.resume("b").unwrap();
    for _ in 0..2 {
        host.close(PATIENCE);
        drop(host);
        host = start(folder.path(), JobsConfig::default()).unwrap();
        wait(&host, "z", JobState::Running);
    }
    host.stop("z").unwrap();
    let started = |job: &str| {
        wait(&host, job, JobState::Finished);
        let journal = std::fs::read_to_string(folder.path().join("jobs").join(job).join("events.jsonl")).unwrap();
        let line = journal.lines().find(|line| line.contains("\"started\"")).unwrap();
        serde_json::from_str::<serde_json::Value>(line).unwrap()["unix_ms"]
            .as_u64()
            .unwrap()
    };
    let mut order = ["b", "c", "x", "y"].map(|job| (started(job), job));
    order.sort();
    assert_eq!(order.map(|(_, job)| job), ["y", "c", "x", "b"]);
}

#[test]
fn what_could_not_come_to_its_end_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let host = start(folder.path(), JobsConfig::default()).unwrap();
    let error = |name_: &str, config: TrainingConfig| host.submit(name(name_), config).unwrap_err().to_string();
    let mut huge = config(2);
    huge.widths = vec![1024; 7];
    huge.held_out.window.window = [64; 3];
    huge.recipe.patch = Some([64; 3]);
    let said = error("a", huge);
    assert!(said.starts_with("segmentor.network: expected at most"), "{said}");
    let mut crowd = config(2);
    crowd.batch_size = u32::MAX;
    let said = error("a", crowd);
    assert!(said.starts_with("segmentor.batch_size: expected at most"), "{said}");
    let mut batch = config(2);
    batch.batch_size = 65;
    let said = error("a", batch);
    assert!(said.starts_with("segmentor.batch_size: expected 1 to 64"), "{said}");
    let mut unwatched = config(2);
    unwatched.validation.every = 1;
    unwatched.split.folds = 1;
    let said = error("a", unwatched);
    assert!(said.starts_with("segmentor.validation.every: expected 0"), "{said}");
    let mut idle = config(2);
    idle.optimizer.accumulate = 3;
    let said = error("a", idle);
    assert!(
        said.starts_with("segmentor.optimizer.accumulate: expected 1 to 2"),
        "{said}"
    );
    assert!(host.list().is_empty());
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let limits = JobsConfig {
        max_queued: 1,
        max_kept: 3,
        ..JobsConfig::default()
    };
    let host = start(folder.path(), limits.clone()).unwrap();
    let long = config(1_000_000);
    host.submit(name("long"), long.clone()).unwrap();
    wait(&host, "long", JobState::Running);
    host.submit(name("waits"), config(2)).unwrap();
    let error = |name_: &str, config: TrainingConfig| host.submit(name(name_), config).unwrap_err().to_string();
    assert!(error("waits", config(2)).contains("already"));
    assert!(error("third", config(2)).contains("1 trainings are waiting"));
    assert!(error("third", TrainingConfig { steps: 0, ..config(2) }).starts_with("segmentor.steps: expected"));
    let mut foreign = config(2);
    foreign.split.file = Some("/etc/hostname".into());
    assert!(error("third", foreign).starts_with("segmentor.split.file: expected none"));
    assert!(
        host.resume("waits")
            .unwrap_err()
            .to_string()
            .contains("only one that was stopped")
    );
    assert!(matches!(host.stop("../long"), Err(JobError::Unknown(_))));
    assert!(matches!(host.file("long", "../job.json"), Err(JobError::Unknown(_))));
    assert!(matches!(host.file("long", "job.json"), Err(JobError::Unknown(_))));
    assert_eq!(host.stop("waits").unwrap().state, JobState::Stopped);
    assert!(host.stop("waits").unwrap_err().to_string().contains("waits is stopped"));
    host.submit(name("third"), config(2)).unwrap();
    host.stop("third").unwrap();
    assert!(error("fourth", config(2)).contains("3 trainings are kept"));
    assert!(!folder.path().join("jobs/fourth").exists());
    assert!(host.remove("long").unwrap_err().to_string().contains("long is running"));
    host.remove("third").unwrap();
    assert!(!folder.path().join("jobs/third").exists());
    assert!(matches!(host.get("third"), Err(JobError::Unknown(_))));
    // What somebody left there would be taken for the training's own.
    std::fs::create_dir(folder.path().join("jobs/foreign")).unwrap();
    let said = error("foreign", config(2));
    assert!(said.starts_with("there is a folder foreign already"), "{said}");
    host.submit(name("fourth"), config(2)).unwrap();
    host.stop("fourth").unwrap();

    let second = start(folder.path(), limits.clone()).err().unwrap().to_string();
    assert!(second.contains("another server has this folder"), "{second}");
    host.close(PATIENCE);
    let closed = host.resume("waits").unwrap_err();
    assert!(matches!(closed, JobError::Stopping), "{closed}");
    drop(host);

    // A removal that was cut off is carried out. Stopped jobs stay stopped; a damaged one is named, and nothing starts.
    let cut_off = folder.path().join("jobs/.removed-third");
    std::fs::create_dir(&cut_off).unwrap();
    std::fs::write(cut_off.join("events.jsonl"), "").unwrap();
    drop(start(folder.path(), limits.clone()).unwrap());
    assert!(!cut_off.exists());
    std::fs::write(folder.path().join("jobs/waits/job.json"), "{}").unwrap();
    let damaged = start(folder.path(), limits).err().unwrap().to_string();
    assert!(damaged.contains("waits/job.json"), "{damaged}");
}

#[test]
fn a_job_that_fails_says_why_and_the_next_one_runs() {
    let folder = tempfile::tempdir().unwrap();
    let host = start(folder.path(), JobsConfig::default()).unwrap();
    let mut bad = config(6);
    bad.optimizer.learning_rate = 1e30;
    bad.optimizer.warmup = 0;
    bad.validation.every = 0;
    host.submit(name("bad"), bad).unwrap();
    host.submit(name("good"), config(2)).unwrap();
    wait(&host, "good", JobState::Finished);
    let failed = host.get("bad").unwrap().1;
    assert_eq!(failed.state, JobState::Failed);
    assert!(failed.failure.unwrap().contains("the last checkpoint is untouched"));
}
