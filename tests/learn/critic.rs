//! Stage 1.

use std::path::Path;

use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Role, load_manifest};
use freetumor::learn::{
    CriticConfig, Keep, LearnError, NetworkChoice, Progress, Quiet, ValidationSettings, train_critic,
};
use freetumor::nn::CubeSides;
use freetumor::store::{CaseKind, Cases};
use freetumor::stream::judges;

use super::{Notes, StopAfter, StopAt, critic_config, job, toy, weights};

#[test]
fn a_resumed_critic_has_the_weights_of_an_uninterrupted_one() {
    let store = toy::store(10, 2);
    let config = critic_config(6);
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_critic(&config, &mut job(&store, out, resume, progress))
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(whole.path(), false, &mut Quiet).unwrap();
    let stopped = run(parts.path(), false, &mut StopAfter(3, 0));
    assert!(matches!(stopped, Err(LearnError::Stopped { step: 3 })), "{stopped:?}");
    assert!(!parts.path().join("critic.json").exists());
    run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(weights(whole.path(), Role::Critic), weights(parts.path(), Role::Critic));
    let lines = |out: &Path| std::fs::read_to_string(out.join("critic.metrics.jsonl")).unwrap();
    assert_eq!(lines(whole.path()), lines(parts.path()));
    assert_eq!(lines(parts.path()).lines().count(), 6);
}

#[test]
fn a_critic_learns_says_what_it_saw_and_calibrates_the_gate() {
    let store = toy::store(10, 2);
    let out = tempfile::tempdir().unwrap();
    let report = train_critic(&critic_config(40), &mut job(&store, out.path(), false, &mut Quiet)).unwrap();
    let lines = std::fs::read_to_string(out.path().join("critic.metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["metrics"]["loss"].as_f64();
    let losses: Vec<f64> = lines.lines().filter_map(loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[30..]) < 0.6 * mean(&losses[..5]), "{losses:?}");
    // Ten labelled cases, a fifth held out; the unlabelled ones are not the critic's.
    assert_eq!(report.training_cases, 8);
    assert_eq!(report.calibration_lesions, 2);
    let manifest = load_manifest(out.path(), Role::Critic).unwrap();
    assert_eq!(manifest.training.unwrap().source_hashes.len(), 8);
    assert_eq!(manifest.calibration.unwrap().entries.len(), 1);
    assert!(out.path().join("critic.report.json").exists());
}

#[test]
fn a_loss_that_is_not_finite_stops_and_saves_nothing() {
    let store = toy::store(10, 0);
    let out = tempfile::tempdir().unwrap();
    let mut config = critic_config(6);
    config.optimizer.learning_rate = 1e30;
    config.checkpoint_every = 1000;
    let error = train_critic(&config, &mut job(&store, out.path(), false, &mut Quiet)).unwrap_err();
    assert!(matches!(error, LearnError::NotFinite { .. }), "{error}");
    // The step is that of the line that the log would have had.
    let logged = std::fs::read_to_string(out.path().join("critic.metrics.jsonl")).unwrap();
    let step = logged.lines().count() + 1;
    assert!(error.to_string().starts_with(&format!("step {step}: ")), "{error}");
    let mut files: Vec<_> = std::fs::read_dir(out.path())
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["critic.broken_off.json", "critic.metrics.jsonl"]);
    let report = std::fs::read(out.path().join("critic.broken_off.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(
        (&report["stage"], &report["cause"]),
        (&"critic".into(), &error.to_string().into())
    );
}

#[test]
fn a_run_that_is_told_to_stop_while_it_judges_real_lesions_comes_back_to_them() {
    let store = toy::store(10, 2);
    let mut config = critic_config(4);
    config.inner_folds = 2;
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_critic(&config, &mut job(&store, out, resume, progress))
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    let stopped = run(parts.path(), false, &mut StopAt("judging real lesions", false)).unwrap_err();
    assert!(matches!(stopped, LearnError::Stopped { step: 4 }), "{stopped}");
    assert!(!parts.path().join("critic.json").exists());
    let resumed = run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(resumed.calibration, report.calibration);
    assert_eq!(weights(whole.path(), Role::Critic), weights(parts.path(), Role::Critic));
}

#[test]
fn organs_of_the_plan_without_enough_lesions_are_named() {
    let store = toy::store(10, 2);
    let mut config = critic_config(1);
    config.inner_folds = 2;
    let out = tempfile::tempdir().unwrap();
    let mut notes = Notes(Vec::new());
    train_critic(&config, &mut job(&store, out.path(), false, &mut notes)).unwrap();
    let said = notes.0.iter().find(|note| note.starts_with("calibrated on"));
    // Ten livers with a tumour each; nobody looked for those of pancreas and kidney, which the plan has.
    assert!(
        said.is_some_and(|said| said.contains("10 real lesions, fewer than 9 of pancreas, kidney: ")),
        "{said:?}"
    );
}

#[test]
fn a_state_of_another_configuration_is_not_resumed() {
    let store = toy::store(10, 0);
    let out = tempfile::tempdir().unwrap();
    let run = |config: &CriticConfig, resume: bool, progress: &mut dyn Progress| {
        train_critic(config, &mut job(&store, out.path(), resume, progress))
    };
    run(&critic_config(4), false, &mut StopAfter(2, 0)).unwrap_err();
    let error = run(&critic_config(5), true, &mut Quiet).unwrap_err().to_string();
    assert!(
        error.contains("critic.state.safetensors") && error.contains("another configuration"),
        "{error}"
    );
    // The same path to a file of folds that now says something else: scans that the weights saw would count as held out.
    let folds = out.path().join("splits_final.json");
    let mut config = critic_config(4);
    config.split.file = Some(folds.clone());
    let write = |held_out: &str| {
        std::fs::write(
            &folds,
            serde_json::json!([{"train": [], "val": [held_out]}]).to_string(),
        )
        .unwrap();
    };
    write("case_003");
    run(&config, false, &mut StopAfter(2, 0)).unwrap_err();
    write("case_004");
    let error = run(&config, true, &mut Quiet).unwrap_err().to_string();
    assert!(error.contains("another configuration"), "{error}");
    write("case_003");
    run(&config, true, &mut Quiet).unwrap();
}

#[test]
fn a_critic_of_all_cases_is_calibrated_by_those_of_inner_folds() {
    let store = toy::store(8, 2);
    let mut config = critic_config(2);
    config.split.folds = 1;
    let out = tempfile::tempdir().unwrap();
    let run = |config: &CriticConfig| train_critic(config, &mut job(&store, out.path(), false, &mut Quiet)).unwrap();
    // Nothing tells what it finds of a case that it did not learn from: no threshold, and all tissue is suspect.
    let report = run(&config);
    assert_eq!((report.training_cases, report.calibration_lesions), (8, 0));
    assert!(report.held_out.cases.is_empty() && report.calibration.entries.is_empty());
    assert_eq!(report.calibration.suspect_from("liver"), Some(0.0));

    config.inner_folds = 2;
    let report = run(&config);
    let labelled = store
        .records()
        .iter()
        .filter(|record| record.kind == CaseKind::Labelled);
    let lesions = labelled.map(|record| record.tumours.len()).sum::<usize>();
    assert_eq!((report.training_cases, report.calibration_lesions), (8, lesions));
    let bundle = Bundle::load(out.path(), &Device::flex()).unwrap();
    assert_eq!((bundle.critic_seen.source_hashes.len(), bundle.inner.len()), (8, 2));
    assert_eq!(bundle.calibration, report.calibration);
    // Every labelled host has a judge that did not see it.
    for (record, judge) in store.records().iter().zip(judges(&store, &bundle)) {
        assert_eq!(judge.is_some(), record.kind == CaseKind::Labelled, "{}", record.id);
    }
}

#[test]
fn inner_folds_calibrate_on_all_lesions_and_leave_every_host_a_critic_that_did_not_see_it() {
    let store = toy::store(8, 2);
    let device = Device::flex();
    let mut config = critic_config(3);
    config.split.folds = 4;
    config.inner_folds = 3;
    let out = tempfile::tempdir().unwrap();
    let run =
        |config: &CriticConfig, resume: bool| train_critic(config, &mut job(&store, out.path(), resume, &mut Quiet));
    let report = run(&config, false).unwrap();
    let lesions = store
        .records()
        .iter()
        .filter(|record| record.kind == CaseKind::Labelled);
    let lesions: usize = lesions.map(|record| record.tumours.len()).sum();
    assert_eq!(report.calibration_lesions, lesions);

    let bundle = Bundle::load(out.path(), &device).unwrap();
    assert_eq!((bundle.inner.len(), bundle.critic_seen.source_hashes.len()), (3, 6));
    for (record, judge) in store.records().iter().zip(judges(&store, &bundle)) {
        assert_eq!(
            judge.is_some(),
            bundle.critic_seen.source_hashes.contains(&record.source_hash),
            "{}",
            record.id
        );
        assert!(judge.is_none_or(|fold| !bundle.inner[fold].seen.source_hashes.contains(&record.source_hash)));
    }
    // Nothing that an inner critic saw was held out of the outer one.
    assert!(
        bundle
            .inner
            .iter()
            .all(|inner| inner.seen.source_hashes.is_subset(&bundle.critic_seen.source_hashes))
    );
    let before = weights(&out.path().join("inner-1"), Role::Critic);
    run(&config, true).unwrap();
    assert_eq!(weights(&out.path().join("inner-1"), Role::Critic), before);

    // Fewer folds later: what is left of the earlier ones is nobody's.
    config.inner_folds = 2;
    run(&config, false).unwrap();
    assert_eq!(Bundle::load(out.path(), &device).unwrap().inner.len(), 2);

    config.inner_folds = 7;
    let error = run(&config, false).unwrap_err().to_string();
    assert!(
        error.starts_with("critic.inner_folds: expected no more than"),
        "{error}"
    );
}

#[test]
fn a_watched_run_keeps_the_best_weights_ends_early_and_resumes_to_the_same() {
    let store = toy::store(10, 0);
    let mut config = critic_config(60);
    config.checkpoint_every = 1;
    config.validation = ValidationSettings {
        every: 2,
        cases: 1,
        patience: 2,
        keep: Keep::Best,
    };
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_critic(&config, &mut job(&store, out, resume, progress))
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    let (score, step) = report.best.unwrap();
    assert_eq!(step % 2, 0);
    // Ended by patience: the last two scores were no better than the best, four steps earlier.
    assert!(
        report.steps == step + 4 || report.steps == 60,
        "{} {step}",
        report.steps
    );
    let lines = |out: &Path| std::fs::read_to_string(out.join("critic.metrics.jsonl")).unwrap();
    let scores: Vec<(u64, f64)> = lines(whole.path())
        .lines()
        .filter_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            Some((
                line["step"].as_u64().unwrap(),
                line["metrics"]["validation_dice"].as_f64()?,
            ))
        })
        .collect();
    let best = scores
        .iter()
        .fold((0, -1.0), |best, at| if at.1 > best.1 { *at } else { best });
    assert_eq!((best.0, best.1 as f32), (step, score));

    run(parts.path(), false, &mut StopAfter(step + 1, 0)).unwrap_err();
    let resumed = run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!((resumed.steps, resumed.best), (report.steps, report.best));
    assert_eq!(weights(whole.path(), Role::Critic), weights(parts.path(), Role::Critic));
    assert_eq!(lines(whole.path()), lines(parts.path()));

    // What a run ended with is what it ends with again, without another step.
    let again = run(whole.path(), true, &mut Quiet).unwrap();
    assert_eq!(
        (again.steps, weights(whole.path(), Role::Critic)),
        (report.steps, weights(parts.path(), Role::Critic))
    );

    config.split.folds = 1;
    let error = train_critic(
        &config,
        &mut job(&store, tempfile::tempdir().unwrap().path(), false, &mut Quiet),
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("no case with labelled tumours is held out"),
        "{error}"
    );
}

#[test]
fn every_network_is_trained_from_configuration_and_loads_as_a_critic() {
    let store = toy::store(6, 0);
    let device = Device::flex();
    let stage = |width, stride| {
        format!("{{width = {width}, kernel = [3, 3, 3], stride = [{stride}, {stride}, {stride}], blocks = 1}}")
    };
    let stages = [stage(4, 1), stage(6, 2), stage(8, 2)].join(", ");
    let nnunet = |encoder| format!("[nnunet]\nencoder = \"{encoder}\"\nstages = [{stages}]\ndecoder_blocks = [1, 1]");
    let choices = [
        (nnunet("plain"), 16),
        (nnunet("residual"), 16),
        (
            "[monai_unet]\nwidths = [4, 8]\nstrides = [2]\nresidual_units = 1".into(),
            16,
        ),
        // Cubes of 32 and 48 voxels: it fills the latter up.
        ("[swin_unetr]\nfeature_size = 12".into(), 48),
    ];
    for (choice, cube) in choices {
        let out = tempfile::tempdir().unwrap();
        let network: NetworkChoice = toml::from_str(&choice).unwrap();
        let mut config = critic_config(3);
        config.network = Some(network);
        config.voxels_per_step = 1;
        config.max_cube = cube;
        let report = train_critic(&config, &mut job(&store, out.path(), false, &mut Quiet)).unwrap();
        assert!(report.last_step["gradient_norm"] > 0.0, "{choice}");
        let bundle = Bundle::load(out.path(), &device).unwrap();
        assert_eq!(bundle.cubes, CubeSides::up_to(cube));
        let manifest = load_manifest(out.path(), Role::Critic).unwrap();
        assert_eq!(manifest.architecture.parameters(), report.parameters, "{choice}");
    }
    let mut config = critic_config(1);
    // Deep supervision compares logits of cubes that are halved five times: 48 voxels cannot be.
    let stages = [1, 2, 2, 2, 2, 2].map(|stride| stage(4, stride)).join(", ");
    let deep = format!("[nnunet]\nencoder = \"plain\"\nstages = [{stages}]\ndecoder_blocks = [1, 1, 1, 1, 1]");
    config.network = Some(toml::from_str(&deep).unwrap());
    config.max_cube = 48;
    let error = config.check().unwrap_err().to_string();
    assert!(
        error.contains("critic.max_cube: expected sides that are all multiples of [32, 32, 32]")
            && error.contains("[48, 48, 48]"),
        "{error}"
    );
    config.max_cube = 32;
    config.check().unwrap();
    config.network = Some(toml::from_str("[swin_unetr]\nfeature_size = 13").unwrap());
    let error = config.check().unwrap_err().to_string();
    assert!(error.contains("critic.network"), "{error}");
}
