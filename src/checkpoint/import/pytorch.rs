//! The tensors of a file that `torch.save` wrote, without executing its pickle.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use pytorch_reader::{DType, PickleValue, PytorchReader, Tensor};

use super::pickle;
use crate::checkpoint::{CheckpointError, Weight, Weights};

/// No checkpoint is larger: the published bundle of three networks takes 0.5 GB, with its optimizers 1.3 GB.
const MAX_FILE_BYTES: u64 = 8 << 30;
/// No pickle is larger: it holds names and shapes, and what a trainer logged.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Numbers in the tensors of one import: 2 GiB in single precision, the most that a model's file may hold.
const MAX_NUMBERS: u64 = 1 << 29;
/// Tensors of one file.
const MAX_TENSORS: usize = 100_000;
/// Keys under which trainers put a network's tensors.
const WRAPPERS: [&str; 5] = ["network_weights", "state_dict", "model_state_dict", "model", "net"];
/// What data-parallel and compiled networks put in front of every name.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];

/// What a file holds.
pub struct PytorchFile {
    /// Its floating-point tensors, in single precision, under the names of the network's `state_dict()`.
    pub weights: Weights,
    /// Short texts beside them that say how the network came about, such as nnU-Net's `trainer_name`.
    pub notes: BTreeMap<String, String>,
}

/// Reads the tensors of a network. Of the container formats of PyTorch, that of version 1.6 and later is read: a zip
/// archive.
///
/// # Errors
/// [`CheckpointError`] names the file, and the tensor or what the pickle would call.
pub fn read_pytorch(path: &Path) -> Result<PytorchFile, CheckpointError> {
    let invalid = |what: String| CheckpointError::Invalid {
        path: path.into(),
        what,
    };
    let got = fs_err::metadata(path)?.len();
    if got > MAX_FILE_BYTES {
        return Err(CheckpointError::TooLarge {
            path: path.into(),
            limit: MAX_FILE_BYTES,
            got,
        });
    }
    pickle::check(&read_pickle(path).map_err(invalid)?).map_err(invalid)?;
    let damaged = |error: pytorch_reader::PytorchError| invalid(error.to_string());
    let root = PytorchReader::read_pickle_data(path, None).map_err(damaged)?;
    let wrapper = wrapper(&root);
    let reader = match wrapper {
        Some(key) => PytorchReader::with_top_level_key(path, key),
        None => PytorchReader::new(path),
    };
    let weights = single_precision(reader.map_err(damaged)?.into_tensors()).map_err(|(name, what)| {
        invalid(format!(
            "tensor {}{name}: {what}",
            wrapper.map_or(String::new(), |key| format!("{key}."))
        ))
    })?;
    Ok(PytorchFile {
        weights,
        notes: notes(&root),
    })
}

/// Reads the pickle out of the archive: the entry that the reader takes, the one with the shortest path.
fn read_pickle(path: &Path) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let not_zip = |error| format!("not a file of `torch.save` (PyTorch 1.6 or later): {error}");
    let mut archive = zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(not_zip)?;
    let names: Result<Vec<_>, _> = archive.file_names().collect();
    let name = names
        .map_err(not_zip)?
        .into_iter()
        .filter(|name| *name == "data.pkl" || name.ends_with("/data.pkl"))
        .min_by_key(|name| name.len())
        .map(|name| name.to_string())
        .ok_or("no data.pkl in it: not a file of `torch.save`")?;
    let entry = archive.by_name(&name).map_err(not_zip)?;
    let mut pickle = Vec::new();
    let read = entry.take(MAX_PICKLE_BYTES + 1).read_to_end(&mut pickle);
    read.map_err(|error| format!("{name}: {error}"))?;
    if pickle.len() as u64 > MAX_PICKLE_BYTES {
        return Err(format!("{name}: more than {MAX_PICKLE_BYTES} bytes"));
    }
    Ok(pickle)
}

/// Returns the key under which the network's tensors lie, if not at the root.
fn wrapper(root: &PickleValue) -> Option<&'static str> {
    let PickleValue::Dict(root) = root else {
        return None;
    };
    WRAPPERS
        .into_iter()
        .find(|key| matches!(root.get(*key), Some(PickleValue::Dict(_))))
}

/// Returns what nnU-Net notes beside its weights.
fn notes(root: &PickleValue) -> BTreeMap<String, String> {
    let mut notes = BTreeMap::new();
    let PickleValue::Dict(root) = root else {
        return notes;
    };
    let inner = match root.get("init_args") {
        Some(PickleValue::Dict(inner)) => Some(inner),
        _ => None,
    };
    for key in ["trainer_name", "configuration", "fold"] {
        let found = root.get(key).or_else(|| inner.and_then(|inner| inner.get(key)));
        let text = match found {
            Some(PickleValue::String(text)) if text.len() <= 256 => text.clone(),
            Some(PickleValue::Int(number)) => number.to_string(),
            _ => continue,
        };
        notes.insert(key.to_string(), text);
    }
    notes
}

/// Reads the floating-point tensors, once it is known that all of them together are not too large.
fn single_precision(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<Weights, (String, String)> {
    let mut found: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut numbers = 0_u64;
    for (name, tensor) in tensors {
        // nnU-Net names a convolution as itself and as part of a sequence, and the encoder again as part of the decoder.
        let is_alias = name.contains(".all_modules.") || name.contains("decoder.encoder.");
        if is_alias || !matches!(tensor.dtype(), DType::F64 | DType::F32 | DType::F16 | DType::BF16) {
            continue;
        }
        numbers = numbers.saturating_add(tensor.num_elements() as u64);
        if numbers > MAX_NUMBERS || found.len() >= MAX_TENSORS {
            let what = format!("expected at most {MAX_NUMBERS} numbers in {MAX_TENSORS} tensors, there are more");
            return Err((name, what));
        }
        let mut short = name.as_str();
        while let Some(rest) = PREFIXES.iter().find_map(|prefix| short.strip_prefix(prefix)) {
            short = rest;
        }
        let short = short.to_string();
        if found.insert(short.clone(), tensor).is_some() {
            return Err((name, format!("there are two of {short}")));
        }
    }
    let read = found.into_iter().map(|(name, tensor)| match values(&tensor) {
        Ok(values) => {
            let shape = tensor.shape().to_vec();
            Ok((name, Weight { shape, values }))
        }
        Err(what) => Err((name, what)),
    });
    read.collect()
}

fn values(tensor: &Tensor) -> Result<Vec<f32>, String> {
    let bytes = tensor.read().map_err(|error| error.to_string())?;
    let values: Vec<f32> = match tensor.dtype() {
        DType::F64 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b) as f32)
            .collect(),
        DType::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| half::f16::from_le_bytes(*b).to_f32())
            .collect(),
        DType::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| half::bf16::from_le_bytes(*b).to_f32())
            .collect(),
        _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    };
    if !values.iter().all(|value| value.is_finite()) {
        return Err("a value is not finite".into());
    }
    Ok(values)
}
