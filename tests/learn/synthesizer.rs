//! Stage 2, both methods.

use std::path::Path;

use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Role};
use freetumor::learn::{
    GuardSettings, LearnError, Method, OptimizerSettings, Progress, PublishedSettings, Quiet, SynthesizerConfig,
    train_critic, train_synthesizer,
};
use freetumor::nn::PublishedConfig;
use freetumor::volume::SizeClass;
use serde_json::Value;

use super::{Notes, StopAfter, StopAt, critic_config, job, toy, weights};

/// A generator of two levels, on cubes of 16 voxels.
fn synthesizer_config(steps: u64) -> SynthesizerConfig {
    let mut config = SynthesizerConfig {
        widths: vec![4, 8],
        discriminator_widths: vec![4, 8],
        steps,
        voxels_per_step: 2 * 16 * 16 * 16,
        max_cube: 16,
        cube_mix: [(SizeClass::Tiny, 1.0)].into(),
        held_out_lesions: 4,
        ..SynthesizerConfig::default()
    };
    config.optimizer.warmup = 1;
    config
}

#[test]
fn a_resumed_synthesizer_has_the_weights_of_an_uninterrupted_one_and_completes_the_bundle() {
    let store = toy::store(10, 4);
    let device = Device::flex();
    let critic = tempfile::tempdir().unwrap();
    train_critic(&critic_config(2), &mut job(&store, critic.path(), false, &mut Quiet)).unwrap();
    let config = synthesizer_config(4);
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_synthesizer(&config, critic.path(), &mut job(&store, out, resume, progress))
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    run(parts.path(), false, &mut StopAfter(2, 0)).unwrap_err();
    // Told to stop while it paints the report's lesions, it has made all its steps, and comes back to the lesions.
    let stopped = run(parts.path(), true, &mut StopAt("painting lesions", false)).unwrap_err();
    assert!(matches!(stopped, LearnError::Stopped { step: 4 }), "{stopped}");
    assert!(!parts.path().join("synthesizer.report.json").exists());
    let resumed = run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(resumed.last_step, report.last_step);
    // The second run had no step left to make, so that there is none to time.
    assert!(resumed.step_seconds.is_none() && resumed.data_wait.is_none());
    assert!(
        report.data_wait.is_some_and(|share| share > 0.0 && share < 1.0),
        "{report:?}"
    );
    for role in [Role::Generator, Role::Discriminator] {
        assert_eq!(weights(whole.path(), role), weights(parts.path(), role));
    }
    assert_eq!((report.trained.lesions, report.hosts_held_out), (4, true));
    // The texture's mean is taken out, so even an untrained generator keeps the requested contrast.
    assert!((report.untrained.contrast_slope - 1.0).abs() < 0.05, "{report:?}");
    let bundle = Bundle::load(whole.path(), &device).unwrap();
    assert!(bundle.generator.is_some() && bundle.discriminator.is_some() && bundle.provenance.known);
    // The lesions of both labelled cases that were held out, one each, tell how real the discriminator finds real ones.
    let realism = bundle.realism.unwrap().scores;
    assert!(
        realism.len() == 2 && realism.iter().all(|score| (0.0..=1.0).contains(score)),
        "{realism:?}"
    );
    // Eight labelled and three unlabelled cases were not held out.
    assert_eq!(bundle.provenance.source_hashes.len(), 11);
}

#[test]
fn sizes_that_no_real_tumour_has_are_named() {
    let store = toy::store(10, 4);
    let [critic, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    train_critic(&critic_config(1), &mut job(&store, critic.path(), false, &mut Quiet)).unwrap();
    // The toy's tumours have 9 mm.
    let said = |cube_mix: &[(SizeClass, f64)]| {
        let config = SynthesizerConfig {
            cube_mix: cube_mix.iter().copied().collect(),
            ..synthesizer_config(1)
        };
        let mut notes = Notes(Vec::new());
        train_synthesizer(&config, critic.path(), &mut job(&store, out.path(), false, &mut notes)).unwrap();
        notes.0.into_iter().find(|note| note.starts_with("no real tumour"))
    };
    assert_eq!(said(&[(SizeClass::Tiny, 1.0), (SizeClass::Large, 0.0)]), None);
    let note = said(&[(SizeClass::Tiny, 0.8), (SizeClass::Small, 0.2)]).unwrap();
    assert!(note.contains("is small (liver): in steps of that size"), "{note}");
}

#[test]
fn a_loss_that_is_not_finite_stops_stage_2_and_saves_nothing() {
    let store = toy::store(10, 4);
    let critic = tempfile::tempdir().unwrap();
    train_critic(&critic_config(2), &mut job(&store, critic.path(), false, &mut Quiet)).unwrap();
    for method in [Method::Conditional, Method::Published] {
        let out = tempfile::tempdir().unwrap();
        let mut config = synthesizer_config(6);
        config.method = method;
        config.published.width = 4;
        config.optimizer.learning_rate = 1e30;
        let error =
            train_synthesizer(&config, critic.path(), &mut job(&store, out.path(), false, &mut Quiet)).unwrap_err();
        assert!(matches!(error, LearnError::NotFinite { .. }), "{error}");
        let mut files: Vec<_> = std::fs::read_dir(out.path())
            .unwrap()
            .map(|file| file.unwrap().file_name())
            .collect();
        files.sort();
        assert_eq!(files, ["synthesizer.broken_off.json", "synthesizer.metrics.jsonl"]);
        let report = std::fs::read(out.path().join("synthesizer.broken_off.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["cause"], error.to_string());
        assert_eq!(report["stage"], "synthesizer");
    }
}

#[test]
fn a_critic_of_other_voxels_or_cubes_is_refused_before_the_first_step() {
    let store = toy::store(10, 4);
    let [critic, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    train_critic(&critic_config(2), &mut job(&store, critic.path(), false, &mut Quiet)).unwrap();
    let refused = |config: &SynthesizerConfig| {
        let done = train_synthesizer(config, critic.path(), &mut job(&store, out.path(), false, &mut Quiet));
        done.unwrap_err().to_string()
    };
    let config = SynthesizerConfig {
        max_cube: 32,
        ..synthesizer_config(2)
    };
    let said = refused(&config);
    assert!(
        said.starts_with("plan field cubes: the critic has [16, 16, 16, 16], max_cube = 32 has"),
        "{said}"
    );
    // As an imported critic's may be.
    let manifest = critic.path().join("critic.json");
    let mut other: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    other["plan"]["spacing_mm"] = serde_json::json!([1.25, 1.25, 1.25]);
    std::fs::write(&manifest, other.to_string()).unwrap();
    let said = refused(&synthesizer_config(2));
    assert!(
        said.starts_with("plan field spacing_mm: the critic has [1.25, 1.25, 1.25], the store has"),
        "{said}"
    );
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

/// The published stage 2 at toy size: it learns to be recognised, resumes to the same weights, and its generator can be streamed.
#[test]
fn the_published_generator_learns_resumes_and_completes_a_bundle() {
    let store = toy::store(10, 4);
    let device = Device::flex();
    let critic = tempfile::tempdir().unwrap();
    let config = |steps| SynthesizerConfig {
        method: Method::Published,
        published: PublishedSettings {
            width: 4,
            ..PublishedSettings::default()
        },
        steps,
        voxels_per_step: 2 * 16 * 16 * 16,
        max_cube: 16,
        cube_mix: [(SizeClass::Tiny, 1.0)].into(),
        held_out_lesions: 4,
        optimizer: OptimizerSettings {
            learning_rate: 2e-3,
            warmup: 1,
            ..OptimizerSettings::default()
        },
        ..SynthesizerConfig::default()
    };
    train_critic(&critic_config(40), &mut job(&store, critic.path(), false, &mut Quiet)).unwrap();
    let run = |steps, out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_synthesizer(&config(steps), critic.path(), &mut job(&store, out, resume, progress))
    };
    let [whole, parts, longer] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    // As another method left it, which trains a discriminator against its own generator.
    for name in ["discriminator.json", "discriminator.safetensors"] {
        std::fs::write(whole.path().join(name), "{}").unwrap();
    }
    let report = run(6, whole.path(), false, &mut Quiet).unwrap();
    run(6, parts.path(), false, &mut StopAfter(3, 0)).unwrap_err();
    run(6, parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(
        weights(whole.path(), Role::Generator),
        weights(parts.path(), Role::Generator)
    );
    assert_eq!((report.trained.lesions, report.hosts_held_out), (4, true));
    assert_eq!(report.parameters[0], PublishedConfig::generator(4, 3).parameters());
    let bundle = Bundle::load(whole.path(), &device).unwrap();
    assert!(bundle.published.is_some() && bundle.generator.is_none() && bundle.discriminator.is_none());

    // Forty steps against the critic: its lesions are recognised better than those of the fresh generator.
    let learnt = run(40, longer.path(), false, &mut Quiet).unwrap();
    assert!(learnt.trained.soft_recall > learnt.untrained.soft_recall, "{learnt:?}");
}

#[test]
fn a_guard_stops_stage_two_and_leaves_a_report_of_why() {
    let store = toy::store(10, 4);
    let (critic, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    train_critic(&critic_config(2), &mut job(&store, critic.path(), false, &mut Quiet)).unwrap();
    // More than any generator reaches, three steps long.
    let guard = GuardSettings {
        steps: 3,
        least_diversity: 1.0,
        ..GuardSettings::default()
    };
    let config = SynthesizerConfig {
        guard,
        ..synthesizer_config(40)
    };
    let error = train_synthesizer(&config, critic.path(), &mut job(&store, out.path(), false, &mut Quiet)).unwrap_err();
    assert!(matches!(error, LearnError::Guard { step: 3, steps: 3, .. }), "{error}");
    let report = std::fs::read(out.path().join("synthesizer.broken_off.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["cause"], error.to_string());
    assert!(
        error.to_string().contains("other noise gives the same texture") && error.to_string().contains("loss.sameness"),
        "{error}"
    );
    assert!(report["last_metrics"]["diversity"].as_f64().unwrap() < 1.0, "{report}");
    assert!(!out.path().join("synthesizer.report.json").exists());
}
