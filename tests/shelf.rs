//! Several models beside each other: how many are in memory at a time.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod toy;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use burn::tensor::Device;
use freetumor::checkpoint::Bundle;
use freetumor::digest::Digest;
use freetumor::stream::delivery::Delivery;
use freetumor::stream::negatives::UnlabelledNegatives;
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{
    Activation, ModelSource, ModelsError, PatchService, Shelf, ShelfParts, StreamConfig, StreamError, Streams,
};
use freetumor::synth::SynthesizerKind;

/// The bundled models under any name, with a hash of the name.
#[derive(Clone, Default)]
struct Copies(Arc<Mutex<BTreeMap<Digest, Activation>>>);

fn named(name: &str) -> Bundle {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let mut bundle = Bundle::load(&folder, &Device::flex()).unwrap();
    bundle.hash = Digest::of(name.as_bytes());
    bundle
}

impl ModelSource for Copies {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn load(&self, name: &str) -> Result<Bundle, ModelsError> {
        Ok(named(name))
    }

    fn remember(&self, started_with: Digest, active: &Activation) -> std::io::Result<()> {
        self.0.lock().unwrap().insert(started_with, active.clone());
        Ok(())
    }

    fn remembered(&self, started_with: Digest) -> Option<Activation> {
        self.0.lock().unwrap().get(&started_with).cloned()
    }
}

fn recipe(synthesizer: SynthesizerKind) -> Recipe {
    let mut recipe = Recipe {
        synthesizer: Some(synthesizer),
        unlabelled_negatives: Some(UnlabelledNegatives::Trust),
        ..Recipe::default()
    };
    recipe.gate.enabled = false;
    recipe
}

/// A shelf on which models "a" are active.
fn shelf_of_a() -> Arc<Shelf> {
    let cases = Arc::new(toy::store(2, 1));
    let streams = Streams::start(cases.clone(), Some(Arc::new(named("a"))), StreamConfig::default()).unwrap();
    let parts = ShelfParts {
        cases,
        default_recipe: recipe(SynthesizerKind::Analytic),
        source: Box::new(Copies::default()),
    };
    Shelf::new(parts, "a", streams)
}

/// Replaces active models.
fn exchange(shelf: &Shelf, from: &str, to: &str) {
    shelf.load(to).unwrap();
    shelf.activate(to).unwrap();
    shelf.release(from).unwrap();
}

#[test]
fn released_models_count_as_long_as_a_stream_uses_them() {
    let shelf = shelf_of_a();
    let open = || {
        let resolved = shelf.resolve(recipe(SynthesizerKind::Conditional)).unwrap();
        shelf.open(&resolved, &Delivery::default()).unwrap()
    };
    let of_a = open();
    exchange(&shelf, "a", "b");
    let of_b = open();
    exchange(&shelf, "b", "c");
    // a and b are released, and in memory beside c.
    assert!(matches!(shelf.load("d"), Err(ModelsError::Full)));
    drop(of_a);
    let loaded = shelf.load("d").unwrap();
    assert!(matches!(shelf.load("e"), Err(ModelsError::Full)));
    assert_eq!(loaded.calibration_lesions, Some(16), "those of assets/demo/critic.json");
    drop(of_b);
    shelf.load("e").unwrap();
}

/// A steered training resolves a recipe anew after every validation.
#[test]
fn who_holds_models_goes_on_with_them_after_their_release() {
    let shelf = shelf_of_a();
    let a = Digest::of(b"a");
    assert!(
        shelf.holder(Digest::default()).unwrap().is_none(),
        "recipes without models hold none"
    );
    let holder = shelf.holder(a).unwrap().unwrap();
    exchange(&shelf, "a", "b");
    let of_a = Recipe {
        bundle: Some(a.to_string()),
        ..recipe(SynthesizerKind::Conditional)
    };
    let gone = |refused: Option<StreamError>| matches!(refused, Some(StreamError::BundleGone(hash)) if hash == a);
    assert!(gone(shelf.resolve(of_a.clone()).err()) && gone(shelf.holder(a).err()));
    let resolved = holder.resolve(of_a).unwrap();
    assert_eq!(resolved.bundle, a);
    let one = Delivery {
        count: Some(1),
        ..Delivery::default()
    };
    holder.open(&resolved, &one).unwrap().next_batch().unwrap().unwrap();
    // They are in memory beside b and c.
    shelf.load("c").unwrap();
    assert!(matches!(shelf.load("d"), Err(ModelsError::Full)));
    drop(holder);
    shelf.load("d").unwrap();
}

#[test]
fn what_was_activated_serves_after_a_restart_too() {
    let source = Copies::default();
    let start_anyhow = |name: &str| {
        let cases = Arc::new(toy::store(2, 1));
        let streams = Streams::start(cases.clone(), Some(Arc::new(named(name))), StreamConfig::default()).unwrap();
        let parts = ShelfParts {
            cases,
            default_recipe: recipe(SynthesizerKind::Analytic),
            source: Box::new(source.clone()),
        };
        let shelf = Shelf::new(parts, name, streams);
        (shelf.take_up(), shelf)
    };
    let start = |name: &str| {
        let (taken_up, shelf) = start_anyhow(name);
        taken_up.unwrap();
        shelf
    };
    let serves = |shelf: &Shelf| shelf.resolve(recipe(SynthesizerKind::Conditional)).unwrap().bundle;
    let shelf = start("a");
    shelf.load("b").unwrap();
    shelf.activate("b").unwrap();
    let again = start("a");
    assert_eq!(serves(&again), Digest::of(b"b"));
    // An operator who starts with others means those.
    assert_eq!(serves(&start("c")), Digest::of(b"c"));
    // Nor are other models taken up under the name of those that were active.
    let kept = source.0.lock().unwrap()[&Digest::of(b"a")].clone();
    let replaced = Activation {
        bundle: Digest::of(b"other"),
        ..kept.clone()
    };
    source.0.lock().unwrap().insert(Digest::of(b"a"), replaced);
    let (refused, of_a) = start_anyhow("a");
    assert!(matches!(refused, Err(ModelsError::Replaced { .. })));
    assert_eq!(serves(&of_a), Digest::of(b"a"));
    source.0.lock().unwrap().insert(Digest::of(b"a"), kept);
    again.roll_back().unwrap();
    assert_eq!(serves(&start("a")), Digest::of(b"a"));
}
