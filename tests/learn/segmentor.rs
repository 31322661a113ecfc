//! Stage 3.

use std::path::Path;

use freetumor::checkpoint::{Role, load_manifest};
use freetumor::learn::{LearnError, Progress, Quiet, SegmentorConfig, train_segmentor};
use freetumor::store::Cases;

use super::{StopAfter, StopAt, job, toy, toy_service, weights};

#[test]
fn a_resumed_segmentor_has_the_weights_of_an_uninterrupted_one() {
    let store = toy::store(5, 0);
    let service = toy_service::ToyService(store.plan().clone());
    let mut config = SegmentorConfig {
        widths: vec![4, 8],
        steps: 12,
        slab_mix: 0.5,
        ..SegmentorConfig::default()
    };
    config.optimizer.learning_rate = 2e-2;
    config.optimizer.warmup = 1;
    config.split.folds = 1;
    config.recipe.select.hold_out = vec!["case_003".into(), "case_004".into()];
    config.held_out.window.window = [16; 3];
    let run = |out: &Path, resume: bool, progress: &mut dyn Progress| {
        train_segmentor(&config, &service, &mut job(&store, out, resume, progress))
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let report = run(whole.path(), false, &mut Quiet).unwrap();
    run(parts.path(), false, &mut StopAfter(6, 0)).unwrap_err();
    // Told to stop while it scores its cases, it has made all its steps, and comes back to the scores.
    let stopped = run(parts.path(), true, &mut StopAt("scored", false)).unwrap_err();
    assert!(matches!(stopped, LearnError::Stopped { step: 12 }), "{stopped}");
    assert!(!parts.path().join("segmentor.json").exists());
    let resumed = run(parts.path(), true, &mut Quiet).unwrap();
    assert_eq!(resumed.last_step, report.last_step);
    assert_eq!(
        weights(whole.path(), Role::Segmentor),
        weights(parts.path(), Role::Segmentor)
    );
    assert_eq!(report.training_cases, 3);
    assert_eq!(report.held_out.cases, ["case_003", "case_004"]);
    assert_eq!(report.last_step["synthetic_share"], 0.5);
    let manifest = load_manifest(whole.path(), Role::Segmentor).unwrap();
    assert_eq!(
        manifest.training.unwrap().case_ids,
        ["case_000", "case_001", "case_002"]
    );
}
