//! What stages do around their networks: finite numbers, provenance, reports, bundles.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use metrics::gauge;
use serde::Serialize;

use super::cubes::side_of;
use super::{Job, LearnError, Metrics, SynthesizerConfig};
use crate::checkpoint::{
    Architecture, FORMAT_VERSION, ModelManifest, Role, Training, Weights, WeightsFile, inner_folder, save_model,
    write_atomically,
};
use crate::evaluate::{Examination, HeldOut, HeldOutSettings, score_held_out};
use crate::nn::{Adapter, VoxelClassifier};
use crate::store::Cases;
use crate::telemetry::metrics::TRAINING_DICE;
use crate::volume::SizeClass;

/// Refuses a number that is not finite.
pub(super) fn check_finite(step: u64, metric: &str, value: f64) -> Result<(), LearnError> {
    if value.is_finite() {
        return Ok(());
    }
    let metric = metric.into();
    Err(LearnError::NotFinite { step, metric, value })
}

/// Returns the arrays under a prefix, without it.
pub(super) fn under(state: &Weights, prefix: &str) -> Weights {
    let found = state
        .iter()
        .filter_map(|(name, weight)| Some((name.strip_prefix(prefix)?.to_string(), weight.clone())));
    found.collect()
}

/// Describes a run on some cases for a manifest; `run` is (steps, seed).
pub(super) fn training_of<C: Serialize>(
    cases: &dyn Cases,
    among: &[usize],
    config: &C,
    run: (u64, u64),
    metrics: Metrics,
) -> Training {
    let records = || among.iter().map(|case| &cases.records()[*case]);
    Training {
        case_ids: records().map(|record| record.id.clone()).collect(),
        source_hashes: records().map(|record| record.source_hash).collect(),
        fingerprints: records()
            .map(|record| record.fingerprint.clone())
            .filter(|fingerprint| !fingerprint.is_empty())
            .collect(),
        snapshot: cases.snapshot(),
        config: serde_json::to_value(config).expect("a configuration is representable in JSON"),
        steps: run.0,
        seed: run.1,
        metrics,
    }
}

/// Writes a stage's report as `<stage>.report.json`.
pub(super) fn write_report<R: Serialize>(out: &Path, stage: &str, report: &R) -> Result<(), LearnError> {
    let mut json = serde_json::to_string_pretty(report).expect("a report is representable in JSON");
    json.push('\n');
    Ok(write_atomically(
        &out.join(format!("{stage}.report.json")),
        json.as_bytes(),
    )?)
}

/// Returns the one number of a tensor.
pub(super) fn scalar(tensor: Tensor<1>) -> f64 {
    f64::from(tensor.into_scalar::<f32>())
}

/// Averages numbers; 0 where there are none.
pub(super) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    if count > 0.0 { sum / count } else { 0.0 }
}

/// Collects named numbers.
pub(super) fn metrics<const N: usize>(entries: [(&str, f64); N]) -> Metrics {
    BTreeMap::from(entries.map(|(name, value)| (name.to_string(), value)))
}

/// Returns the mean Dice of each class by name, and shows it to who scrapes the metrics.
pub(super) fn dice_metrics(scores: &HeldOut) -> Metrics {
    let scored = scores
        .classes
        .iter()
        .filter_map(|(name, score)| Some((name, score.dice?)));
    scored
        .map(|(name, dice)| {
            gauge!(TRAINING_DICE, "class" => name.clone()).set(dice);
            (format!("dice_{name}"), dice)
        })
        .collect()
}

/// Scores a network on a job's held-out cases.
pub(super) fn held_out_scores(
    net: &dyn VoxelClassifier,
    job: &mut Job,
    held_out: &[usize],
    settings: &HeldOutSettings,
) -> Result<HeldOut, LearnError> {
    let exam = Examination {
        net,
        device: job.device,
        cases: job.cases,
        held_out,
        settings,
    };
    Ok(score_held_out(&exam, &mut |scored| {
        job.progress.on_note(&format!("scored {}", scored.score.case));
    })?)
}

/// Writes models of stage 2, whose provenance includes the critic's.
pub(super) fn save_beside(
    config: &SynthesizerConfig,
    critic: &ModelManifest,
    (models, mut record): (Vec<(Role, Architecture, Weights)>, Training),
    out: &Path,
) -> Result<(), LearnError> {
    let seen = critic.training.iter().flat_map(|training| &training.source_hashes);
    record.source_hashes.extend(seen);
    let seen = critic.training.iter().flat_map(|training| &training.fingerprints);
    record.fingerprints.extend(seen.cloned());
    for (role, architecture, weights) in models {
        let manifest = ModelManifest {
            format_version: FORMAT_VERSION,
            role,
            architecture,
            plan: critic.plan.clone(),
            cubes: SizeClass::ALL.map(|size| side_of(size, config.max_cube)).to_vec(),
            provenance_known: critic.provenance_known,
            training: Some(record.clone()),
            calibration: None,
            adapter: Adapter::default(),
            imported: None,
            weights: WeightsFile::default(),
        };
        save_model(out, manifest, &weights, config.precision)?;
    }
    Ok(())
}

/// Completes the bundle: weights first, then the manifest.
pub(super) fn copy_critic(from: &Path, to: &Path) -> Result<(), LearnError> {
    if fs_err::canonicalize(from)? == fs_err::canonicalize(to)? {
        return Ok(());
    }
    let inner = (0..).map(inner_folder);
    let inner = inner.take_while(|folder| from.join(folder).join("critic.json").exists());
    for folder in inner.chain([String::new()]) {
        fs_err::create_dir_all(to.join(&folder))?;
        for name in ["critic.safetensors", "critic.json"] {
            let name = Path::new(&folder).join(name);
            write_atomically(&to.join(&name), &fs_err::read(from.join(&name))?)?;
        }
    }
    Ok(())
}
