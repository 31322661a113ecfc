//! The training loop alone.

use freetumor::checkpoint::{Weight, Weights};
use freetumor::digest::Digest;
use freetumor::learn::{FitSettings, Keep, LearnError, Metrics, Quiet, Trainee, ValidationSettings, fit};

/// Has its step as its only weight; its scores are given, and it is killed where they end.
struct Scored<'a> {
    scores: &'a [f64],
    done: u64,
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

    fn score(&mut self, steps: u64) -> Result<Option<f64>, LearnError> {
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
        fit(&mut Scored { scores, done: 0 }, &settings, &mut Quiet)
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
