//! What a stage leaves: provenance, models, a report.

use std::path::Path;

use serde::Serialize;

use super::cubes::side_of;
use super::inner::forget_inner;
use super::{LearnError, Metrics, SynthesizerConfig};
use crate::checkpoint::{
    Architecture, FORMAT_VERSION, ModelManifest, Provenance, Realism, Role, Training, Weights, WeightsFile,
    inner_folder, save_model, write_atomically,
};
use crate::nn::Adapter;
use crate::store::Cases;
use crate::volume::SizeClass;

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

/// Writes models of stage 2, whose provenance includes the critic's.
pub(super) fn save_beside(
    config: &SynthesizerConfig,
    critic: &ModelManifest,
    (models, realism, mut record): (Vec<(Role, Architecture, Weights)>, Option<Realism>, Training),
    out: &Path,
) -> Result<(), LearnError> {
    record.add_seen(&Provenance::of(&[critic]));
    remove_others(out, &models.iter().map(|(role, ..)| *role).collect::<Vec<_>>())?;
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
            realism: realism.clone().filter(|_| role == Role::Discriminator),
            adapter: Adapter::default(),
            imported: None,
            weights: WeightsFile::default(),
        };
        save_model(out, manifest, &weights, config.precision)?;
    }
    Ok(())
}

/// Removes what another method of stage 2 left in the folder: a bundle takes all that lies there.
fn remove_others(out: &Path, roles: &[Role]) -> Result<(), LearnError> {
    let of_stage_two = [Role::Generator, Role::Discriminator];
    for role in of_stage_two.into_iter().filter(|role| !roles.contains(role)) {
        // The manifest first: without it there is no model.
        for name in [format!("{}.json", role.name()), format!("{}.safetensors", role.name())] {
            let path = out.join(name);
            if path.exists() {
                fs_err::remove_file(path)?;
            }
        }
    }
    Ok(())
}

/// Completes the bundle: weights first, then the manifest.
pub(super) fn copy_critic(from: &Path, to: &Path) -> Result<(), LearnError> {
    if fs_err::canonicalize(from)? == fs_err::canonicalize(to)? {
        return Ok(());
    }
    let inner = (0..).map(inner_folder);
    let inner: Vec<String> = inner
        .take_while(|folder| from.join(folder).join("critic.json").exists())
        .collect();
    // Those of another critic are not this one's.
    forget_inner(to, inner.len())?;
    for folder in inner.into_iter().chain([String::new()]) {
        fs_err::create_dir_all(to.join(&folder))?;
        for name in ["critic.safetensors", "critic.json"] {
            let name = Path::new(&folder).join(name);
            write_atomically(&to.join(&name), &fs_err::read(from.join(&name))?)?;
        }
    }
    Ok(())
}
