//! Whose patients and models a folder holds: those of one configuration.

use std::collections::BTreeMap;
use std::fs::TryLockError;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Arm, ExperimentError};
use crate::checkpoint::write_atomically;
use crate::digest::Digest;

/// The most bytes of the file.
const MAX_BYTES: u64 = 1 << 20;

/// What decides everything that is kept under `--out`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    config: Digest,
    own: BTreeMap<Arm, Digest>,
}

/// Takes a folder for a configuration. What another one left there would be taken for this one's.
///
/// # Errors
/// [`ExperimentError::Results`] where the folder is another configuration's.
pub(super) fn claim(folder: &Path, config: Digest, own: BTreeMap<Arm, Digest>) -> Result<(), ExperimentError> {
    let path = folder.join("identity.json");
    let refused = |what: String| ExperimentError::Results {
        path: path.clone(),
        what,
    };
    let ours = Identity { config, own };
    if !path.exists() {
        fs_err::create_dir_all(folder)?;
        let text = serde_json::to_vec_pretty(&ours).expect("digests are representable in JSON");
        return Ok(write_atomically(&path, &text)?);
    }
    if fs_err::metadata(&path)?.len() > MAX_BYTES {
        return Err(refused(format!("expected at most {MAX_BYTES} bytes")));
    }
    let theirs: Identity = serde_json::from_slice(&fs_err::read(&path)?).map_err(|error| refused(error.to_string()))?;
    if theirs == ours {
        return Ok(());
    }
    let which = if theirs.config == ours.config {
        "an arm of its own settings"
    } else {
        "the experiment"
    };
    Err(refused(format!(
        "the folder holds patients, models and runs of another configuration of {which}; choose another --out"
    )))
}

/// Keeps other processes from carrying out runs in the folder for as long as the file is open: they would train the same models at once,
/// and each write its own runs alone.
///
/// # Errors
/// [`ExperimentError::Results`] where another process works there.
pub(super) fn lock(folder: &Path) -> Result<fs_err::File, ExperimentError> {
    let file = fs_err::File::create(folder.join(".lock"))?;
    match file.file().try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ExperimentError::Results {
            path: folder.into(),
            what: "another process carries out runs in this folder; wait for it, or choose another --out".into(),
        }),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_works_in_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path()).unwrap();
        assert!(lock(folder.path()).unwrap_err().to_string().contains("another process"));
        drop(held);
        lock(folder.path()).unwrap();
    }

    #[test]
    fn a_folder_belongs_to_one_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let own = |text: &[u8]| BTreeMap::from([(Arm::Published, Digest::of(text))]);
        let claim = |config: &[u8], arm: &[u8]| {
            claim(folder.path(), Digest::of(config), own(arm)).map_err(|error| error.to_string())
        };
        claim(b"one", b"a").unwrap();
        claim(b"one", b"a").unwrap();
        assert!(claim(b"two", b"a").unwrap_err().contains("identity.json"));
        assert!(claim(b"one", b"b").unwrap_err().contains("an arm"));
    }
}
