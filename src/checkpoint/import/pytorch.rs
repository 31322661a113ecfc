//! The tensors of a file that `torch.save` wrote, without executing its pickle.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use pytorch_reader::{DType, PickleValue, PytorchReader, Tensor};
use zip::result::ZipResult;
use zip::{CompressionMethod, ZipArchive, ZipReadOptions};

use super::pickle;
use crate::checkpoint::{CheckpointError, Weight, Weights};

/// No checkpoint is larger: the published bundle of three networks takes 0.5 GB, with its optimizers 1.3 GB.
const MAX_FILE_BYTES: u64 = 8 << 30;
/// No pickle is larger: it holds names and shapes, and what a trainer logged.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Numbers in the tensors of one import: 2 GiB in single precision, the most that a model's file may hold.
const MAX_NUMBERS: u64 = 1 << 29;
/// Tensors of one file, integers included.
const MAX_TENSORS: usize = 100_000;
/// Bytes of all their names together.
const MAX_NAMES: usize = 64 << 20;
/// What a zip archive starts with.
const ZIP_START: [u8; 4] = *b"PK\x03\x04";
/// Keys under which trainers put a network's tensors.
const WRAPPERS: [&str; 5] = ["network_weights", "state_dict", "model_state_dict", "model", "net"];
/// What data-parallel and compiled networks put in front of every name.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];

type Archive = ZipArchive<BufReader<std::fs::File>>;

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
    // Before the reader makes a name of every tensor.
    Census::default().count(&root, 0).map_err(invalid)?;
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
///
/// The reader goes by a file's first bytes, an archive may begin anywhere: only one that begins the file is what the reader reads.
/// `torch.save` compresses nothing, so that no entry is larger than the file.
fn read_pickle(path: &Path) -> Result<Vec<u8>, String> {
    let mut file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let not_zip = |what: String| format!("not a file of `torch.save` (PyTorch 1.6 or later): {what}");
    let mut start = [0; 4];
    let read = file.read_exact(&mut start).and_then(|()| file.rewind());
    if read.is_err() || start != ZIP_START {
        return Err(not_zip("it does not begin with a zip archive".into()));
    }
    let damaged = |error: zip::result::ZipError| not_zip(error.to_string());
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    let (name, index, crc32) = pickle_entry(&mut archive)
        .map_err(damaged)?
        .ok_or("no data.pkl in it: not a file of `torch.save`")?;
    if let Some(name) = compressed_entry(&mut archive).map_err(damaged)? {
        return Err(format!("{name}: compressed, which `torch.save` never does"));
    }
    // PyTorch can be told to leave checksums out; it writes 0 then.
    let options = ZipReadOptions::new().ignore_crc32(crc32 == 0);
    let entry = archive.by_index_with_options(index, options).map_err(damaged)?;
    let mut pickle = Vec::new();
    let read = entry.take(MAX_PICKLE_BYTES + 1).read_to_end(&mut pickle);
    read.map_err(|error| format!("{name}: {error}"))?;
    if pickle.len() as u64 > MAX_PICKLE_BYTES {
        return Err(format!("{name}: more than {MAX_PICKLE_BYTES} bytes"));
    }
    Ok(pickle)
}

/// Returns the name, the place and the checksum of the pickle.
fn pickle_entry(archive: &mut Archive) -> ZipResult<Option<(String, usize, u32)>> {
    let mut found: Option<(String, usize, u32)> = None;
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index)?;
        let name = entry.name()?.into_owned();
        let is_pickle = name == "data.pkl" || name.ends_with("/data.pkl");
        if is_pickle
            && found
                .as_ref()
                .is_none_or(|(shortest, _, _)| name.len() < shortest.len())
        {
            found = Some((name, index, entry.crc32()));
        }
    }
    Ok(found)
}

/// Returns the name of an entry that is compressed.
fn compressed_entry(archive: &mut Archive) -> ZipResult<Option<String>> {
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index)?;
        if entry.compression() != CompressionMethod::Stored {
            return Ok(Some(entry.name()?.into_owned()));
        }
    }
    Ok(None)
}

/// The names that the reader will make: those of the keys on the way to a tensor, joined.
#[derive(Default)]
struct Census {
    path: String,
    names: HashSet<String>,
    bytes: usize,
}

impl Census {
    /// Counts what lies in a value; the reader has bounded how deep it is nested.
    fn count(&mut self, value: &PickleValue, depth: usize) -> Result<(), String> {
        let inside = |census: &mut Self, key: &str, value: &PickleValue| {
            let length = census.path.len();
            if depth > 0 {
                census.path.push('.');
            }
            census.path.push_str(key);
            census.count(value, depth + 1)?;
            census.path.truncate(length);
            Ok(())
        };
        match value {
            PickleValue::Dict(entries) => entries.iter().try_for_each(|(key, value)| inside(self, key, value)),
            PickleValue::List(items) => {
                let mut items = items.iter().enumerate();
                items.try_for_each(|(index, value)| inside(self, &index.to_string(), value))
            }
            PickleValue::Unsupported(class) if class == "torch.Tensor" => self.tensor(),
            _ => Ok(()),
        }
    }

    fn tensor(&mut self) -> Result<(), String> {
        self.bytes += self.path.len();
        if self.bytes > MAX_NAMES || self.names.len() >= MAX_TENSORS {
            return Err(format!(
                "expected at most {MAX_TENSORS} tensors with names of {MAX_NAMES} bytes in all, there are more"
            ));
        }
        match self.names.insert(self.path.clone()) {
            true => Ok(()),
            false => Err(format!("tensor {}: there are two of that name", self.path)),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(count: usize) -> PickleValue {
        PickleValue::List(vec![PickleValue::Unsupported("torch.Tensor".into()); count])
    }

    #[test]
    fn tensors_and_their_names_are_counted_before_they_are_made() {
        let count = |value: &PickleValue| Census::default().count(value, 0);
        assert_eq!(count(&tensors(MAX_TENSORS)), Ok(()));
        assert!(
            count(&tensors(MAX_TENSORS + 1))
                .unwrap_err()
                .contains("at most 100000 tensors")
        );
        let long = PickleValue::Dict([("a".repeat(1 << 20), tensors(64))].into());
        assert!(count(&long).unwrap_err().contains("67108864 bytes in all"));
        let inner = PickleValue::Dict([("b".into(), PickleValue::Unsupported("torch.Tensor".into()))].into());
        let twice = [
            ("a.b".into(), PickleValue::Unsupported("torch.Tensor".into())),
            ("a".into(), inner),
        ];
        let refused = count(&PickleValue::Dict(twice.into())).unwrap_err();
        assert_eq!(refused, "tensor a.b: there are two of that name");
    }
}
