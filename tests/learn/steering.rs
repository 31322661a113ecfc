//! Stage 3 that changes its mix by what it misses.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use freetumor::checkpoint::{Provenance, Role, load_manifest};
use freetumor::digest::Digest;
use freetumor::kernel::ComputeDtype;
use freetumor::learn::{Job, Progress, Quiet, SegmentorConfig, ValidationSettings, train_segmentor};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{PatchService, PatchStream, Resolved, StreamConfig, StreamError, Streams};
use freetumor::synth::SynthesizerKind;
use freetumor::volume::{Plan, SizeClass};

use super::{StopAfter, job, toy, weights};

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
fn mixes_of_a_run_that_left_no_state_are_not_taken_over() {
    let store = Arc::new(toy::store(6, 2));
    let service = Streams::start(store.clone(), None, StreamConfig::default()).unwrap();
    let run = |out: &Path, rate: f64, resume: bool| {
        let mut config = steered();
        config.steering.rate = rate;
        train_segmentor(&config, &*service, &mut job(&*store, out, resume, &mut Quiet)).unwrap()
    };
    let (fresh, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(killed.path(), 0.2, false);
    std::fs::remove_file(killed.path().join("segmentor.state.safetensors")).unwrap();
    // As after a kill before the first state, and a change of the configuration.
    assert_eq!(run(killed.path(), 0.9, true).mixes, run(fresh.path(), 0.9, false).mixes);
}

#[test]
fn a_steered_run_asks_for_what_it_missed_and_resumes_to_the_same() {
    let store = Arc::new(toy::store(6, 2));
    let service = Streams::start(store.clone(), None, StreamConfig::default()).unwrap();
    let config = steered();
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_segmentor(&config, &*service, &mut job(&*store, out, resume, progress))
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
