//! Models of other programs: PyTorch files become our weights and manifests, without executing their pickles.

mod detect;
mod layout;
mod nnunet;
mod pickle;
mod pytorch;

use std::io::Read;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use sha2::{Digest as _, Sha256};

pub use layout::source_name;
pub use nnunet::NnunetPlans;
pub use pytorch::{PytorchFile, read_pytorch};

use super::load::misfit;
use super::{
    Architecture, CheckpointError, FORMAT_VERSION, Imported, ModelManifest, Role, Weights, WeightsFile, collect,
};
use crate::nn::{Adapter, Merging, OutputActivation};
use crate::volume::Plan;

/// Prefixes of the published file that holds generator, discriminator and segmentor.
const PARTS: [(&str, &[Role]); 3] = [
    ("netG.", &[Role::Generator]),
    ("netD.", &[Role::Discriminator]),
    ("netSeg.", &[Role::Critic, Role::Segmentor]),
];

/// What a file shall become, and what it does not say itself.
#[derive(Clone, Debug)]
pub struct ImportRequest<'a> {
    /// What the model shall do.
    pub role: Role,
    /// The grid, labels and window it was trained on.
    pub plan: &'a Plan,
    /// Names of the network's outputs in order, in the plan's words; the plan's own classes where absent.
    pub classes: Option<&'a [String]>,
    /// In which order a SwinUNETR merges tokens.
    pub merging: Merging,
    /// Strides of MONAI's `UNet`, finest first; what its weights tell where absent.
    pub strides: Option<&'a [usize]>,
    /// What the output of the published generator goes through.
    pub activation: OutputActivation,
    /// What describes an nnU-Net network.
    pub nnunet: Option<&'a NnunetPlans>,
}

/// Reads a PyTorch file as a model of ours, ready to be saved.
///
/// # Errors
/// [`CheckpointError`] names the file, and the tensor, the key or what the pickle would call.
pub fn import_pytorch(path: &Path, request: &ImportRequest) -> Result<(ModelManifest, Weights), CheckpointError> {
    let invalid = |what: String| CheckpointError::Invalid {
        path: path.into(),
        what,
    };
    let file = read_pytorch(path)?;
    let theirs = part(file.weights, request.role).map_err(invalid)?;
    let architecture = detect::detected(&theirs, request).map_err(invalid)?;
    if let Some(what) = architecture.refusal() {
        return Err(invalid(what));
    }
    // Before a network is made: a plans file may describe one that the file does not hold.
    let (needed, held) = (
        architecture.parameters(),
        theirs.values().map(|w| w.values.len() as u64).sum::<u64>(),
    );
    if needed > held {
        return Err(invalid(format!(
            "expected {needed} parameters of {architecture:?}, there are {held}"
        )));
    }
    if let Some(what) = unused_option(&architecture, request) {
        return Err(invalid(what));
    }
    let weights =
        layout::renamed(&architecture, &shapes(&architecture), theirs).map_err(|error| invalid(error.to_string()))?;
    let manifest = ModelManifest {
        format_version: FORMAT_VERSION,
        role: request.role,
        adapter: adapter(&architecture, request).map_err(invalid)?,
        architecture,
        plan: request.plan.clone(),
        cubes: request.plan.patch.to_vec(),
        provenance_known: false,
        training: None,
        calibration: None,
        realism: None,
        imported: Some(Imported {
            file: path
                .file_name()
                .map_or(String::new(), |name| name.to_string_lossy().into_owned()),
            sha256: sha256_of(path)?,
            notes: file.notes,
        }),
        weights: WeightsFile::default(),
    };
    match misfit(&manifest) {
        Some(what) => Err(invalid(what)),
        None => Ok((manifest, weights)),
    }
}

/// Names what is asked for and has no place in that network.
fn unused_option(architecture: &Architecture, request: &ImportRequest) -> Option<String> {
    use Architecture::{Nnunet, Published, SwinUnetr};
    let is_segmenting = matches!(request.role, Role::Critic | Role::Segmentor);
    let (is_swin, is_published) = (
        matches!(architecture, SwinUnetr(_)),
        matches!(architecture, Published(_)),
    );
    let asked = [
        (
            request.nnunet.is_some() && !matches!(architecture, Nnunet(_)),
            "plans and dataset: only for nnU-Net's networks",
        ),
        (
            request.merging != Merging::Released && !is_swin,
            "merging: only for MONAI's SwinUNETR",
        ),
        (
            request.activation != OutputActivation::Tanh && !is_published,
            "activation: only for the published generator",
        ),
        (
            request.classes.is_some() && !is_segmenting,
            "classes: only for critics and segmentors",
        ),
    ];
    let refusal = asked.into_iter().find(|(is_unused, _)| *is_unused);
    refusal.map(|(_, what)| what.into())
}

/// Takes the network of a role out of a file that may hold several.
fn part(weights: Weights, role: Role) -> Result<Weights, String> {
    let has = |prefix: &str| weights.keys().any(|name| name.starts_with(prefix));
    if !PARTS.iter().any(|(prefix, _)| has(prefix)) {
        return Ok(weights);
    }
    let wanted = PARTS
        .iter()
        .find(|(prefix, roles)| roles.contains(&role) && has(prefix));
    let Some((prefix, _)) = wanted else {
        let held: Vec<&str> = PARTS.iter().map(|part| part.0).filter(|prefix| has(prefix)).collect();
        return Err(format!(
            "expected the {} of a file with {held:?}, it has none",
            role.name()
        ));
    };
    let mut inner = Weights::new();
    for (name, weight) in weights {
        let Some(short) = name.strip_prefix(prefix) else {
            continue;
        };
        let short = short.strip_prefix("module.").unwrap_or(short).to_string();
        if inner.insert(short.clone(), weight).is_some() {
            return Err(format!("tensor {name}: there are two of {short}"));
        }
    }
    Ok(inner)
}

/// Returns the names and shapes of an architecture's parameters.
fn shapes(architecture: &Architecture) -> Weights {
    fn of<M: Module>(net: M) -> Weights {
        collect(&net)
    }
    let device = Device::flex();
    match architecture {
        Architecture::Unet(config) => of(config.init(&device, 0)),
        Architecture::Generator(config) => of(config.init(&device, 0)),
        Architecture::Published(config) => of(config.init(&device, 0)),
        Architecture::SwinUnetr(config) => of(config.init(&device, 0)),
        Architecture::Nnunet(config) => of(config.init(&device, 0)),
        Architecture::MonaiUnet(config) => of(config.init(&device, 0)),
    }
}

fn adapter(architecture: &Architecture, request: &ImportRequest) -> Result<Adapter, String> {
    if !matches!(request.role, Role::Critic | Role::Segmentor) {
        return Ok(Adapter::default());
    }
    let mut adapter = Adapter::default();
    let mut classes = request.classes;
    if let (Architecture::Nnunet(_), Some(plans)) = (architecture, request.nnunet) {
        adapter.intensity = Some(plans.intensity(request.plan.window_hu)?);
        adapter.axes = plans.axes;
        classes = classes.or(Some(&plans.classes));
    }
    let Some(classes) = classes else {
        return Ok(adapter);
    };
    let [_, outputs] = architecture.channels();
    if classes.len() != outputs {
        return Err(format!(
            "classes: expected {outputs} names, one per output, got {classes:?}"
        ));
    }
    if let Some(again) = (1..classes.len()).find(|i| classes[..*i].contains(&classes[*i])) {
        return Err(format!("classes: {:?} stands there twice", classes[again]));
    }
    let labels = &request.plan.labels;
    if let Some(unknown) = classes
        .iter()
        .find(|name| !labels.iter().any(|(known, _)| known == name.as_str()))
    {
        let known: Vec<&str> = labels.iter().map(|(name, _)| name).collect();
        return Err(format!(
            "class {unknown:?} is none of the plan's {known:?}; name the network's outputs in the plan's words with --classes"
        ));
    }
    let mut of_ids: Vec<(u8, Option<usize>)> = labels
        .iter()
        .map(|(name, id)| (id, classes.iter().position(|class| class == name)))
        .collect();
    of_ids.sort_unstable_by_key(|(id, _)| *id);
    let of_ids: Vec<Option<usize>> = of_ids.into_iter().map(|(_, output)| output).collect();
    let in_order = of_ids.iter().enumerate().all(|(id, output)| *output == Some(id));
    adapter.outputs = (!in_order).then_some(of_ids);
    Ok(adapter)
}

/// Returns a file's SHA-256 in hexadecimal, however large it is.
fn sha256_of(path: &Path) -> Result<String, CheckpointError> {
    let mut file = fs_err::File::open(path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Weight;

    fn weights(names: &[&str]) -> Weights {
        let weight = Weight {
            shape: vec![1],
            values: vec![0.0],
        };
        names.iter().map(|name| (name.to_string(), weight.clone())).collect()
    }

    #[test]
    fn a_file_of_three_networks_gives_the_one_that_the_role_needs() {
        let file = weights(&["netG.a", "netG.module.b", "netD.a", "netSeg.c"]);
        let names = |role| part(file.clone(), role).map(|found| found.into_keys().collect::<Vec<_>>());
        assert_eq!(names(Role::Generator).unwrap(), ["a", "b"]);
        assert_eq!(names(Role::Critic).unwrap(), ["c"]);
        assert_eq!(names(Role::Segmentor).unwrap(), ["c"]);
        let error = part(weights(&["netD.a"]), Role::Generator).unwrap_err();
        assert!(
            error.contains("expected the generator") && error.contains("netD."),
            "{error}"
        );
        let twice = part(weights(&["netG.a", "netG.module.a"]), Role::Generator).unwrap_err();
        assert!(twice.contains("two of a"), "{twice}");
        assert_eq!(
            part(weights(&["conv.weight"]), Role::Critic).unwrap(),
            weights(&["conv.weight"])
        );
    }
}
