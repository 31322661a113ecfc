//! Reads models, trusting nothing: sizes, checksums, architectures and shapes are checked before weights are used.

use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;

use super::save::sha256;
use super::{Architecture, Calibration, CheckpointError, FORMAT_VERSION, ModelManifest, Role, fill, read_weights};
use crate::nn::{Body, Generator, Network, Published, Unet};
use crate::volume::Plan;

/// No manifest is larger: hashes of 10^5 training cases take 7 MB.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// No file of weights is larger.
pub const MAX_WEIGHTS_BYTES: u64 = 2 << 30;

/// A model with its manifest.
pub struct Loaded<M> {
    /// What it is and what it was trained on.
    pub manifest: ModelManifest,
    /// The network.
    pub model: M,
}

fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let got = fs_err::metadata(path)?.len();
    if got > limit {
        let path = path.into();
        return Err(CheckpointError::TooLarge { path, limit, got });
    }
    Ok(fs_err::read(path)?)
}

/// Reads and checks the manifest of a model, without its weights.
///
/// # Errors
/// [`CheckpointError`] names the file and the key.
pub fn load_manifest(folder: &Path, role: Role) -> Result<ModelManifest, CheckpointError> {
    let path = folder.join(format!("{}.json", role.name()));
    let bytes = read_limited(&path, MAX_MANIFEST_BYTES)?;
    let invalid = |what: String| {
        Err(CheckpointError::Invalid {
            path: path.clone(),
            what,
        })
    };
    let manifest: ModelManifest = match serde_json::from_slice(&bytes) {
        Ok(manifest) => manifest,
        Err(error) => return invalid(format!("not a model manifest: {error}")),
    };
    if !(1..=FORMAT_VERSION).contains(&manifest.format_version) {
        return invalid(format!(
            "format_version: expected 1 to {FORMAT_VERSION}, got {}",
            manifest.format_version
        ));
    }
    if manifest.role != role {
        return invalid(format!("role: expected {role:?}, got {:?}", manifest.role));
    }
    if let Some(what) = manifest.architecture.refusal() {
        return invalid(format!("architecture.{what}"));
    }
    if let Some(what) = manifest.plan.refusal() {
        return invalid(what);
    }
    if let Some(what) = misfit(&manifest) {
        return invalid(what);
    }
    if let Some(what) = manifest.calibration.as_ref().and_then(Calibration::refusal) {
        return invalid(what);
    }
    if let Some(realism) = &manifest.realism {
        if role != Role::Discriminator {
            return invalid(format!("realism: a {} has none", role.name()));
        }
        if let Some(what) = realism.refusal() {
            return invalid(what);
        }
    }
    Ok(manifest)
}

/// Tells where an architecture does not fit its role and label map.
pub(super) fn misfit(manifest: &ModelManifest) -> Option<String> {
    let labels = &manifest.plan.labels;
    let [inputs, outputs] = manifest.architecture.channels();
    let organs = labels.organs().len();
    match (&manifest.architecture, manifest.role) {
        (Architecture::Generator(config), Role::Generator) => (config.organs != organs).then(|| {
            format!(
                "architecture.organs: expected {organs} of the label map, got {}",
                config.organs
            )
        }),
        (Architecture::Published(_), Role::Generator) => {
            let fits = inputs == 1 && outputs == organs;
            (!fits).then(|| {
                format!("architecture: expected 1 channel in, {organs} out (organs), got {inputs} and {outputs}")
            })
        }
        (Architecture::Unet(config), Role::Discriminator) => {
            let fits = inputs == 1 && outputs == 3 && config.condition == 0;
            (!fits).then(|| format!("architecture: expected 1 channel in, 3 out, no condition, got {config:?}"))
        }
        (Architecture::Unet(config), Role::Critic | Role::Segmentor) if config.condition > 0 => {
            Some(format!("architecture: expected no condition, got {config:?}"))
        }
        (
            Architecture::Unet(_) | Architecture::SwinUnetr(_) | Architecture::Nnunet(_) | Architecture::MonaiUnet(_),
            Role::Critic | Role::Segmentor,
        ) => {
            if inputs != 1 {
                return Some(format!("architecture: expected 1 channel in, got {inputs}"));
            }
            let what = manifest.adapter.refusal(outputs, labels.class_count());
            what.map(|what| format!("adapter.{what}"))
        }
        (architecture, role) => Some(format!("architecture: {architecture:?} cannot be a {role:?}")),
    }
}

fn load_weights<M: Module>(
    folder: &Path,
    manifest: &ModelManifest,
    init: impl FnOnce() -> M,
) -> Result<M, CheckpointError> {
    let path = folder.join(format!("{}.safetensors", manifest.role.name()));
    let bytes = read_limited(&path, MAX_WEIGHTS_BYTES)?;
    let got = sha256(&bytes);
    if got != manifest.weights.sha256 {
        let expected = manifest.weights.sha256.clone();
        return Err(CheckpointError::Checksum { path, expected, got });
    }
    // A manifest that promises a network larger than its file is refused before the network is allocated.
    let parameters = manifest.architecture.parameters();
    if parameters * 2 > bytes.len() as u64 {
        let what = format!("expected weights of {parameters} parameters, got {} bytes", bytes.len());
        return Err(CheckpointError::Invalid { path, what });
    }
    fill(init(), read_weights(&bytes, &path)?)
}

/// Loads a network that segments.
pub(super) fn load_network(folder: &Path, role: Role, device: &Device) -> Result<Loaded<Network>, CheckpointError> {
    let manifest = load_manifest(folder, role)?;
    let body = match &manifest.architecture {
        Architecture::Unet(config) => Body::Unet(load_weights(folder, &manifest, || config.init(device, 0))?),
        Architecture::SwinUnetr(config) => Body::SwinUnetr(load_weights(folder, &manifest, || config.init(device, 0))?),
        Architecture::Nnunet(config) => Body::Nnunet(load_weights(folder, &manifest, || config.init(device, 0))?),
        Architecture::MonaiUnet(config) => Body::MonaiUnet(load_weights(folder, &manifest, || config.init(device, 0))?),
        Architecture::Generator(_) | Architecture::Published(_) => {
            unreachable!("the manifest of a network that segments was checked to hold one")
        }
    };
    let model = Network::new(body, manifest.architecture.stride(), manifest.adapter.clone());
    Ok(Loaded { manifest, model })
}

/// Loads the discriminator.
pub(super) fn load_discriminator(folder: &Path, device: &Device) -> Result<Loaded<Unet>, CheckpointError> {
    let manifest = load_manifest(folder, Role::Discriminator)?;
    let Architecture::Unet(config) = manifest.architecture.clone() else {
        unreachable!("a discriminator's manifest was checked to hold a U-Net");
    };
    let model = load_weights(folder, &manifest, || config.init(device, 0))?;
    Ok(Loaded { manifest, model })
}

/// A generator of either kind.
pub(super) enum AnyGenerator {
    /// Ours.
    Conditional(Generator),
    /// The published one.
    Published(Published),
}

/// Loads the generator.
pub(super) fn load_generator(folder: &Path, device: &Device) -> Result<Loaded<AnyGenerator>, CheckpointError> {
    let manifest = load_manifest(folder, Role::Generator)?;
    let model = match &manifest.architecture {
        Architecture::Generator(config) => {
            AnyGenerator::Conditional(load_weights(folder, &manifest, || config.init(device, 0))?)
        }
        Architecture::Published(config) => {
            AnyGenerator::Published(load_weights(folder, &manifest, || config.init(device, 0))?)
        }
        _ => unreachable!("a generator's manifest was checked to hold a generator"),
    };
    Ok(Loaded { manifest, model })
}

/// Loads a segmentor.
///
/// # Errors
/// [`CheckpointError`] names the file and what is wrong with it.
pub fn load_segmentor(folder: &Path, device: &Device) -> Result<Loaded<Network>, CheckpointError> {
    load_network(folder, Role::Segmentor, device)
}

/// Checks that two plans have voxels of one size, where what is computed on one is not resampled to the other.
///
/// # Errors
/// [`CheckpointError::PlanMismatch`] names the field.
pub fn check_spacing(left: (&str, &Plan), right: (&str, &Plan)) -> Result<(), CheckpointError> {
    let [a, b] = [left.1.spacing_mm, right.1.spacing_mm];
    if a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6) {
        return Ok(());
    }
    Err(CheckpointError::PlanMismatch {
        field: "spacing_mm",
        left_name: left.0.into(),
        left: format!("{a:?}"),
        right_name: right.0.into(),
        right: format!("{b:?} (ingest at the model's spacing)"),
    })
}

/// Checks that two plans agree on labels and window. Grids may differ: residuals are resampled (promise P5).
///
/// # Errors
/// [`CheckpointError::PlanMismatch`] names the field.
pub fn check_plan(left: (&str, &Plan), right: (&str, &Plan)) -> Result<(), CheckpointError> {
    let differs = |field, a: String, b: String| CheckpointError::PlanMismatch {
        field,
        left_name: left.0.into(),
        left: a,
        right_name: right.0.into(),
        right: b,
    };
    let (a, b) = (left.1, right.1);
    if a.labels != b.labels {
        let json = |plan: &Plan| crate::digest::canonical_json(&plan.labels);
        return Err(differs("labels", json(a), json(b)));
    }
    if a.window_hu != b.window_hu {
        let text = |plan: &Plan| format!("{:?}", plan.window_hu);
        return Err(differs("window_hu", text(a), text(b)));
    }
    Ok(())
}
