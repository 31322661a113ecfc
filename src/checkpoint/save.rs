//! Writes models so that nothing half-written is ever loaded: temporary file, fsync, rename; weights first, then the manifest with
//! their checksum. Killed between the two, a run is resumed and writes both again; until then the folder is refused.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{CheckpointError, ModelManifest, Weights, WeightsFile, not_finite, weights_bytes};

/// How weights are stored; they are always loaded to single precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits.
    #[default]
    Single,
    /// 16 bits: half the size, rounded to 11 significant bits.
    Half,
}

impl Precision {
    /// Rounds weights as they will be stored, so that what is measured is what is loaded.
    pub fn rounded(self, mut weights: Weights) -> Weights {
        if self == Self::Half {
            let values = weights.values_mut().flat_map(|weight| &mut weight.values);
            values.for_each(|value| *value = half::f16::from_f32(*value).to_f32());
        }
        weights
    }
}

/// Replaces a file as a whole or not at all.
///
/// # Errors
/// What the operating system refuses, naming the file.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), std::io::Error> {
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let named = |error: std::io::Error| std::io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    // As readable as any new file: the umask decides, not the temporary file's secrecy.
    let readable = Permissions::from_mode(0o666);
    let mut file = (tempfile::Builder::new().permissions(readable).tempfile_in(folder)).map_err(named)?;
    file.write_all(bytes).map_err(named)?;
    file.as_file().sync_all().map_err(named)?;
    file.persist(path).map_err(|error| named(error.error))?;
    // The rename itself is durable only once the folder is.
    fs_err::File::open(folder)?.sync_all()
}

/// Returns the SHA-256 of bytes in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses weights that nobody could load, half precision's overflow included, before they replace any.
fn refuse_not_finite(model: &str, weights: &Weights) -> Result<(), CheckpointError> {
    not_finite(weights).map_or(Ok(()), |(name, value)| {
        Err(CheckpointError::Tensor {
            name: format!("{model}.{name}"),
            expected: "finite values in the precision that is stored".into(),
            got: value.to_string(),
        })
    })
}

/// Writes a model's weights and then its manifest, whose `weights` it fills in and returns.
///
/// # Errors
/// [`CheckpointError::Tensor`] where a value is not finite; what the operating system refuses, naming the file.
pub fn save_model(
    folder: &Path,
    mut manifest: ModelManifest,
    weights: &Weights,
    precision: Precision,
) -> Result<ModelManifest, CheckpointError> {
    let name = manifest.role.name();
    refuse_not_finite(name, weights)?;
    let bytes = weights_bytes(weights, precision, &BTreeMap::new());
    manifest.weights = WeightsFile {
        sha256: sha256(&bytes),
        bytes: bytes.len() as u64,
    };
    write_atomically(&folder.join(format!("{name}.safetensors")), &bytes)?;
    let mut json = serde_json::to_string_pretty(&manifest).expect("a manifest is representable in JSON");
    json.push('\n');
    write_atomically(&folder.join(format!("{name}.json")), json.as_bytes())?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Weight;

    #[test]
    fn a_replaced_file_is_as_readable_as_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let [new, replaced] = ["new", "replaced"].map(|name| folder.path().join(name));
        std::fs::write(&new, "").unwrap();
        write_atomically(&replaced, b"1").unwrap();
        write_atomically(&replaced, b"2").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&replaced), mode(&new));
        assert_eq!(std::fs::read(&replaced).unwrap(), b"2");
    }

    #[test]
    fn weights_that_are_not_finite_replace_nothing() {
        let infinite = Weights::from([(
            "head".to_string(),
            Weight {
                shape: vec![2],
                values: vec![1.0, f32::INFINITY],
            },
        )]);
        let said = refuse_not_finite("critic", &infinite).unwrap_err().to_string();
        assert!(said.contains("critic.head: expected finite values"), "{said}");
        // What overflows is found after the rounding that is stored.
        let large = Weights::from([(
            "head".to_string(),
            Weight {
                shape: vec![1],
                values: vec![1e6],
            },
        )]);
        assert!(refuse_not_finite("critic", &large).is_ok());
        assert!(refuse_not_finite("critic", &Precision::Half.rounded(large)).is_err());
    }
}
