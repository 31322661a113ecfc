//! The training stages on a store of toy volumes: a cubic organ with ball-shaped tumours.

mod toy;
#[path = "toy/service.rs"]
mod toy_service;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Provenance, Role, Weight, Weights, load_manifest};
use freetumor::digest::Digest;
use freetumor::evaluate::HeldOutSettings;
use freetumor::kernel::ComputeDtype;
use freetumor::learn::{
    CriticConfig, FitSettings, Job, Keep, LearnError, Method, Metrics, NetworkChoice, OptimizerSettings, Progress,
    PublishedSettings, Quiet, SegmentorConfig, SynthesizerConfig, Trainee, ValidationSettings, fit, train_critic,
    train_segmentor, train_synthesizer,
};
use freetumor::nn::PublishedConfig;
use freetumor::store::{CaseKind, Cases};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{PatchService, PatchStream, Resolved, StreamConfig, StreamError, Streams};
use freetumor::synth::SynthesizerKind;
use freetumor::volume::{Plan, SizeClass};

/// Stops after a number of steps.
struct StopAfter(u64, u64);

impl Progress for StopAfter {
    fn on_step(&mut self, _stage: &str, step: u64, _steps: u64, _metrics: &Metrics) {
        self.1 = step;
    }
    fn on_note(&mut self, _note: &str) {}
    fn should_stop(&self) -> bool {
        self.1 >= self.0
    }
}

fn critic_config(steps: u64) -> CriticConfig {
    let mut config = CriticConfig {
        widths: vec![4, 8],
        steps,
        voxels_per_step: 2 * 16 * 16 * 16,
        max_cube: 16,
        ..CriticConfig::default()
    };
    config.optimizer.learning_rate = 1e-2;
    config.optimizer.warmup = 2;
    config.held_out = HeldOutSettings {
        cases: 1,
        ..HeldOutSettings::default()
    };
    config.held_out.window.window = [16; 3];
    config
}

fn weights(out: &Path, role: Role) -> Vec<u8> {
    std::fs::read(out.join(format!("{}.safetensors", role.name()))).expect("the stage saved its weights")
}

#[test]
fn a_resumed_critic_has_the_weights_of_an_uninterrupted_one() {
    let store = toy::store(10, 2);
    let device = Device::flex();
    let config = critic_config(6);
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &store,
            out,
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_critic(&config, &mut job)
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
    let device = Device::flex();
    let mut job = Job {
        cases: &store,
        out: out.path(),
        resume: false,
        device: &device,
        dtype: ComputeDtype::F32,
        progress: &mut Quiet,
    };
    let report = train_critic(&critic_config(40), &mut job).unwrap();
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
    let device = Device::flex();
    let mut config = critic_config(6);
    config.optimizer.learning_rate = 1e30;
    config.checkpoint_every = 1000;
    let mut job = Job {
        cases: &store,
        out: out.path(),
        resume: false,
        device: &device,
        dtype: ComputeDtype::F32,
        progress: &mut Quiet,
    };
    let error = train_critic(&config, &mut job).unwrap_err();
    assert!(matches!(error, LearnError::NotFinite { .. }), "{error}");
    assert!(error.to_string().starts_with("step "), "{error}");
    let files: Vec<_> = std::fs::read_dir(out.path())
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    assert_eq!(files, ["critic.metrics.jsonl"]);
}

#[test]
fn a_state_of_another_configuration_is_not_resumed() {
    let store = toy::store(10, 0);
    let out = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let run = |config: &CriticConfig, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &store,
            out: out.path(),
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_critic(config, &mut job)
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
fn a_resumed_synthesizer_has_the_weights_of_an_uninterrupted_one_and_completes_the_bundle() {
    let store = toy::store(10, 4);
    let device = Device::flex();
    let critic = tempfile::tempdir().unwrap();
    let mut job = Job {
        cases: &store,
        out: critic.path(),
        resume: false,
        device: &device,
        dtype: ComputeDtype::F32,
        progress: &mut Quiet,
    };
    train_critic(&critic_config(2), &mut job).unwrap();
    let mut config = SynthesizerConfig {
        widths: vec![4, 8],
        discriminator_widths: vec![4, 8],
        steps: 4,
        voxels_per_step: 2 * 16 * 16 * 16,
        max_cube: 16,
        cube_mix: [(SizeClass::Tiny, 1.0)].into(),
        held_out_lesions: 4,
        ..SynthesizerConfig::default()
    };
    config.optimizer.warmup = 1;
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &store,
            out,
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_synthesizer(&config, critic.path(), &mut job)
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    run(parts.path(), false, &mut StopAfter(2, 0)).unwrap_err();
    run(parts.path(), true, &mut Quiet).unwrap();
    for role in [Role::Generator, Role::Discriminator] {
        assert_eq!(weights(whole.path(), role), weights(parts.path(), role));
    }
    assert_eq!((report.trained.lesions, report.hosts_held_out), (4, true));
    // The texture's mean is taken out, so even an untrained generator keeps the requested contrast.
    assert!((report.untrained.contrast_slope - 1.0).abs() < 0.3, "{report:?}");
    let bundle = Bundle::load(whole.path(), &device).unwrap();
    assert!(bundle.generator.is_some() && bundle.discriminator.is_some() && bundle.provenance.known);
    // Eight labelled and three unlabelled cases were not held out.
    assert_eq!(bundle.provenance.source_hashes.len(), 11);
}

#[test]
fn inner_folds_calibrate_on_all_lesions_and_leave_every_host_a_critic_that_did_not_see_it() {
    let store = toy::store(8, 2);
    let device = Device::flex();
    let mut config = critic_config(3);
    config.split.folds = 4;
    config.inner_folds = 3;
    let out = tempfile::tempdir().unwrap();
    let run = |config: &CriticConfig, resume: bool| {
        let mut job = Job {
            cases: &store,
            out: out.path(),
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress: &mut Quiet,
        };
        train_critic(config, &mut job)
    };
    let report = run(&config, false).unwrap();
    let lesions = store
        .records()
        .iter()
        .filter(|record| record.kind == CaseKind::Labelled);
    let lesions: usize = lesions.map(|record| record.tumours.len()).sum();
    assert_eq!(report.calibration_lesions, lesions);

    let bundle = Bundle::load(out.path(), &device).unwrap();
    assert_eq!((bundle.inner.len(), bundle.critic_seen.len()), (3, 6));
    for record in store.records() {
        let judge = bundle.judge_of(&record.source_hash);
        assert_eq!(
            judge.is_some(),
            bundle.critic_seen.contains(&record.source_hash),
            "{}",
            record.id
        );
        assert!(judge.is_none_or(|fold| !bundle.inner[fold].seen.contains(&record.source_hash)));
    }
    // Nothing that an inner critic saw was held out of the outer one.
    assert!(
        bundle
            .inner
            .iter()
            .all(|inner| inner.seen.is_subset(&bundle.critic_seen))
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
    let mut job = Job {
        cases: &store,
        out: critic.path(),
        resume: false,
        device: &device,
        dtype: ComputeDtype::F32,
        progress: &mut Quiet,
    };
    train_critic(&critic_config(40), &mut job).unwrap();
    let run = |steps, out: &Path, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &store,
            out,
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_synthesizer(&config(steps), critic.path(), &mut job)
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
fn a_resumed_segmentor_has_the_weights_of_an_uninterrupted_one() {
    let store = toy::store(4, 0);
    let service = toy_service::ToyService(store.plan().clone());
    let device = Device::flex();
    let mut config = SegmentorConfig {
        widths: vec![4, 8],
        steps: 12,
        slab_mix: 0.5,
        ..SegmentorConfig::default()
    };
    config.optimizer.learning_rate = 2e-2;
    config.optimizer.warmup = 1;
    config.split.folds = 1;
    config.recipe.select.hold_out = vec!["case_003".into()];
    config.held_out.window.window = [16; 3];
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &store,
            out,
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_segmentor(&config, &service, &mut job)
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    run(parts.path(), false, &mut StopAfter(6, 0)).unwrap_err();
    run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(
        weights(whole.path(), Role::Segmentor),
        weights(parts.path(), Role::Segmentor)
    );
    assert_eq!(report.training_cases, 3);
    assert_eq!(report.held_out.cases, ["case_003"]);
    assert_eq!(report.last_step["synthetic_share"], 0.5);
    let manifest = load_manifest(whole.path(), Role::Segmentor).unwrap();
    assert_eq!(
        manifest.training.unwrap().case_ids,
        ["case_000", "case_001", "case_002"]
    );
}

#[test]
fn a_watched_run_keeps_the_best_weights_ends_early_and_resumes_to_the_same() {
    let store = toy::store(10, 0);
    let device = Device::flex();
    let mut config = critic_config(60);
    config.checkpoint_every = 1;
    config.validation = ValidationSettings {
        every: 2,
        cases: 1,
        patience: 2,
        keep: Keep::Best,
    };
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &store,
            out,
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_critic(&config, &mut job)
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
        &mut Job {
            cases: &store,
            out: tempfile::tempdir().unwrap().path(),
            resume: false,
            device: &device,
            dtype: ComputeDtype::F32,
            progress: &mut Quiet,
        },
    )
    .unwrap_err();
    assert!(error.to_string().contains("no case is held out"), "{error}");
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
        ("[swin_unetr]\nfeature_size = 12".into(), 32),
    ];
    for (choice, cube) in choices {
        let out = tempfile::tempdir().unwrap();
        let network: NetworkChoice = toml::from_str(&choice).unwrap();
        let mut config = critic_config(3);
        config.network = Some(network);
        config.voxels_per_step = 1;
        config.max_cube = cube;
        let mut job = Job {
            cases: &store,
            out: out.path(),
            resume: false,
            device: &device,
            dtype: ComputeDtype::F32,
            progress: &mut Quiet,
        };
        let report = train_critic(&config, &mut job).unwrap();
        assert!(report.last_step["gradient_norm"] > 0.0, "{choice}");
        let bundle = Bundle::load(out.path(), &device).unwrap();
        assert_eq!(bundle.cubes.all(), [cube; 4]);
        let manifest = load_manifest(out.path(), Role::Critic).unwrap();
        assert_eq!(manifest.architecture.parameters(), report.parameters, "{choice}");
    }
    let mut config = critic_config(1);
    config.network = Some(toml::from_str("[swin_unetr]\nfeature_size = 12").unwrap());
    let error = config.check().unwrap_err().to_string();
    assert!(
        error.contains("critic.max_cube: expected multiples of [32, 32, 32]"),
        "{error}"
    );
    config.network = Some(toml::from_str("[swin_unetr]\nfeature_size = 13").unwrap());
    let error = config.check().unwrap_err().to_string();
    assert!(error.contains("critic.network"), "{error}");
}

/// Eight steps that learn from another mix after every second one.
fn steered() -> SegmentorConfig {
    let mut config = SegmentorConfig {
        widths: vec![4, 8],
        steps: 8,
        validation: ValidationSettings {
            every: 2,
            cases: 1,
            ..ValidationSettings::default()
        },
        ..SegmentorConfig::default()
    };
    config.steering.enabled = true;
    config.split.folds = 1;
    config.held_out.window.window = [16; 3];
    config.recipe = Recipe {
        synthesizer: Some(SynthesizerKind::Analytic),
        sizes: BTreeMap::from([(SizeClass::Tiny, 0.5), (SizeClass::Small, 0.5)]),
        ..Recipe::default()
    };
    config.recipe.gate.enabled = false;
    config.recipe.select.hold_out = vec!["case_005".into()];
    config
}

/// A service of several models: it takes their name out of a recipe, as they do, and writes it down.
struct OfModels {
    inner: Arc<Streams>,
    named: Mutex<Vec<Option<String>>>,
}

impl PatchService for OfModels {
    fn plan(&self) -> &Plan {
        self.inner.plan()
    }

    fn resolve(&self, mut recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        self.named
            .lock()
            .expect("nobody panics over it")
            .push(recipe.bundle.take());
        let resolved = Arc::unwrap_or_clone(self.inner.resolve(recipe)?);
        Ok(Arc::new(Resolved {
            bundle: Digest::of(b"models"),
            models: Some(Arc::new(of_elsewhere())),
            ..resolved
        }))
    }

    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        let own = Resolved {
            bundle: Digest::default(),
            ..(**recipe).clone()
        };
        self.inner.open(&Arc::new(own), delivery)
    }
}

/// What models of which this store knows nothing learnt from.
fn of_elsewhere() -> Provenance {
    Provenance {
        known: false,
        source_hashes: [Digest::of(b"elsewhere")].into(),
        fingerprints: [].into(),
    }
}

#[test]
fn a_steered_run_keeps_the_models_that_it_began_with_and_what_they_saw() {
    let store = Arc::new(toy::store(6, 2));
    let service = OfModels {
        inner: Streams::start(store.clone(), None, StreamConfig::default()).unwrap(),
        named: Mutex::default(),
    };
    let out = tempfile::tempdir().unwrap();
    let mut job = Job {
        cases: &*store,
        out: out.path(),
        resume: false,
        device: &Device::flex(),
        dtype: ComputeDtype::F32,
        progress: &mut Quiet,
    };
    train_segmentor(&steered(), &service, &mut job).unwrap();
    // The mixes of steps 2, 4 and 6.
    let named = service.named.into_inner().unwrap();
    let models = Digest::of(b"models").to_string();
    assert_eq!(named[named.len() - 3..], [(); 3].map(|()| Some(models.clone())));
    let manifest = load_manifest(out.path(), Role::Segmentor).unwrap();
    let training = manifest.training.unwrap();
    assert!(!manifest.provenance_known);
    assert!(training.source_hashes.is_superset(&of_elsewhere().source_hashes));
    assert!(training.source_hashes.len() > training.case_ids.len());
}

#[test]
fn a_steered_run_asks_for_what_it_missed_and_resumes_to_the_same() {
    let store = Arc::new(toy::store(6, 2));
    let service = Streams::start(store.clone(), None, StreamConfig::default()).unwrap();
    let (device, config) = (Device::flex(), steered());
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        let mut job = Job {
            cases: &*store,
            out,
            resume,
            device: &device,
            dtype: ComputeDtype::F32,
            progress,
        };
        train_segmentor(&config, &*service, &mut job)
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    run(parts.path(), false, &mut StopAfter(5, 0)).unwrap_err();
    let resumed = run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(
        weights(whole.path(), Role::Segmentor),
        weights(parts.path(), Role::Segmentor)
    );
    assert_eq!(report.mixes, resumed.mixes);
    let numbers: Vec<_> = (report.mixes.iter())
        .map(|mix| (mix.number, mix.from_step, mix.from_index))
        .collect();
    assert_eq!(numbers, [(1, 2, 4), (2, 4, 8), (3, 6, 12), (4, 8, 16)]);
    // The held-out tumour, of 9 mm, is missed by a network of so few steps: tiny ones are asked for more often.
    let tiny: Vec<f64> = report.mixes.iter().map(|mix| mix.sizes[&SizeClass::Tiny]).collect();
    assert!(tiny[0] > 0.5 && tiny.is_sorted(), "{tiny:?}");
    let base = service.resolve(config.recipe.clone()).unwrap().recipe.clone();
    for mix in &report.mixes {
        let recipe = Recipe {
            organs: Some(mix.organs.clone()),
            sizes: mix.sizes.clone(),
            ..base.clone()
        };
        assert_eq!(
            recipe.hash(),
            mix.recipe,
            "the hash is that of the stream it names (P1)"
        );
        assert_eq!(service.resolve(recipe).unwrap().hash, mix.recipe);
    }
}

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
