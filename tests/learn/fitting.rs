//! The training loop alone.

use std::sync::atomic::{AtomicBool, Ordering};

use freetumor::checkpoint::{Weight, Weights};
use freetumor::digest::Digest;
use freetumor::learn::{FitSettings, Keep, LearnError, Metrics, Progress, Quiet, Trainee, ValidationSettings, fit};

/// Has its step as its only weight; its scores are given, and it is killed where they end.
struct Scored<'a> {
    scores: &'a [f64],
    done: u64,
    /// The step in whose scoring the run is asked to stop, and how.
    stopped: Option<(u64, &'a AtomicBool)>,
}

/// Asks to stop once the flag is set.
struct Asking<'a>(&'a AtomicBool);

impl Progress for Asking<'_> {
    fn on_step(&mut self, _stage: &str, _step: u64, _steps: u64, _metrics: &Metrics) {}
    fn on_note(&mut self, _note: &str) {}
    fn should_stop(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Trainee for Scored<'_> {
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError> {
        self.done = step + 1;
        Ok(Metrics::from([("loss".to_owned(), 0.0)]))
    }

    fn state(&self) -> Weights {
        let weight = Weight {
            shape: vec![1],
            values: vec![self.done as f32],
        };
        Weights::from([("step".to_owned(), weight)])
    }

    fn restore(&mut self, _state: Weights, steps: u64) -> Result<(), LearnError> {
        self.done = steps;
        Ok(())
    }

    fn model(&self) -> Weights {
        self.state()
    }

    fn score(&mut self, steps: u64, stop: &dyn Fn() -> bool) -> Result<Option<f64>, LearnError> {
        if let Some((step, flag)) = self.stopped {
            flag.store(step == steps, Ordering::Relaxed);
        }
        if stop() {
            return Err(LearnError::Stopped { step: 0 });
        }
        let score = self.scores.get(steps as usize - 1);
        score
            .map(|score| Some(*score))
            .ok_or_else(|| LearnError::Data("killed".into()))
    }
}

/// Diverges: after its second step a weight is infinite, while its loss is still a number.
struct Diverging(u64);

impl Trainee for Diverging {
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError> {
        self.0 = step + 1;
        Ok(Metrics::from([("loss".to_owned(), 1.0)]))
    }

    fn state(&self) -> Weights {
        let weight = Weight {
            shape: vec![1],
            values: vec![if self.0 > 1 { f32::INFINITY } else { 0.5 }],
        };
        Weights::from([("net.bias".to_owned(), weight)])
    }

    fn restore(&mut self, _state: Weights, steps: u64) -> Result<(), LearnError> {
        self.0 = steps;
        Ok(())
    }

    fn model(&self) -> Weights {
        self.state()
    }
}

#[test]
fn weights_that_are_not_finite_are_never_saved() {
    let out = tempfile::tempdir().unwrap();
    let validation = ValidationSettings::default();
    let settings = FitSettings {
        stage: "critic",
        steps: 9,
        checkpoint_every: 1,
        identity: Digest::default(),
        out: out.path(),
        resume: false,
        validation: &validation,
    };
    let refused = fit(&mut Diverging(0), &settings, &mut Quiet).unwrap_err();
    assert!(refused.to_string().contains("step 2: net.bias is inf"), "{refused}");
    // The checkpoint of the first step is what it was.
    let state = std::fs::read(out.path().join("critic.state.safetensors")).unwrap();
    let read = freetumor::checkpoint::read_weights(&state, out.path()).unwrap();
    assert_eq!(read["net.bias"].values, [0.5]);
}

/// On a GPU the steps after the last saved state may come to other scores when they are made again.
#[test]
fn the_best_weights_are_those_that_the_resumed_state_knows_of() {
    let out = tempfile::tempdir().unwrap();
    let validation = ValidationSettings {
        every: 1,
        keep: Keep::Best,
        ..ValidationSettings::default()
    };
    let run = |scores: &[f64], resume: bool| {
        let settings = FitSettings {
            stage: "critic",
            steps: 6,
            checkpoint_every: 3,
            identity: Digest::default(),
            out: out.path(),
            resume,
            validation: &validation,
        };
        let mut trainee = Scored {
            scores,
            done: 0,
            stopped: None,
        };
        fit(&mut trainee, &settings, &mut Quiet)
    };
    let bests = || {
        let names = std::fs::read_dir(out.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut bests: Vec<String> = names.filter(|name| name.contains("best")).collect();
        bests.sort();
        bests
    };
    // The state is of step 3, whose best is step 2's; then step 5 is better, and the run is killed.
    run(&[0.1, 0.4, 0.3, 0.2, 0.6], false).unwrap_err();
    assert_eq!(bests(), ["critic.best-2.safetensors", "critic.best-5.safetensors"]);
    let fitted = run(&[0.0, 0.0, 0.0, 0.2, 0.3, 0.3], true).unwrap();
    assert_eq!((fitted.best, fitted.model["step"].values[0]), (Some((0.4, 2)), 2.0));
    assert_eq!(bests(), ["critic.best-2.safetensors"]);
    // A run that begins again and is killed before its first state leaves nothing that could be resumed.
    run(&[0.9], false).unwrap_err();
    assert!(!out.path().join("critic.state.safetensors").exists());
}

/// What a run that is stopped while it scores a step leaves, resumed, is what a run leaves that nobody stops.
#[test]
fn a_run_that_is_stopped_while_it_scores_scores_first_when_it_goes_on() {
    let validation = ValidationSettings {
        every: 2,
        keep: Keep::Best,
        ..ValidationSettings::default()
    };
    let run = |out: &std::path::Path, stopped: Option<u64>, resume: bool| {
        let settings = FitSettings {
            stage: "critic",
            steps: 6,
            checkpoint_every: 100,
            identity: Digest::default(),
            out,
            resume,
            validation: &validation,
        };
        let flag = AtomicBool::new(false);
        let mut trainee = Scored {
            scores: &[0.0, 0.2, 0.0, 0.4, 0.0, 0.3],
            done: 0,
            stopped: stopped.map(|step| (step, &flag)),
        };
        fit(&mut trainee, &settings, &mut Asking(&flag))
    };
    let log = |out: &std::path::Path| std::fs::read_to_string(out.join("critic.metrics.jsonl")).unwrap();
    let whole = tempfile::tempdir().unwrap();
    let expected = run(whole.path(), None, false).unwrap();
    assert_eq!((expected.best, expected.model_steps), (Some((0.4, 4)), 4));
    for step in [2, 4, 6] {
        let out = tempfile::tempdir().unwrap();
        let stopped =
            |resume| matches!(run(out.path(), Some(step), resume), Err(LearnError::Stopped { step: at }) if at == step);
        assert!(stopped(false), "the state of step {step} is saved without its score");
        assert!(!log(out.path()).lines().last().unwrap().contains("validation_dice"));
        assert!(stopped(true), "and once more");
        let fitted = run(out.path(), None, true).unwrap();
        assert_eq!(
            (fitted.best, fitted.steps, fitted.model_steps),
            (expected.best, expected.steps, expected.model_steps)
        );
        assert_eq!(log(out.path()), log(whole.path()));
        assert_eq!(fitted.step_seconds.is_none(), step == 6, "no step was left to make");
    }
}
