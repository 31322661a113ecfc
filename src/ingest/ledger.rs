//! What every case was made from: kept beside the store, so that a second run can skip what has not changed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::IngestError;
use crate::digest::Digest;
use crate::store::{self, StoreError};

/// The folder of a store that remembers which files became which case.
const LEDGER_DIR: &str = "ingest";

/// The folder with one entry a case.
pub(super) struct Ledger {
    folder: PathBuf,
}

/// What a case was made from.
#[derive(PartialEq, Serialize, Deserialize)]
pub(super) struct LedgerEntry {
    /// Digest of everything that decides what the case becomes.
    pub(super) key: Digest,
    /// Digest of what was stored.
    pub(super) content_hash: Digest,
    /// What was said of it, to be said again.
    pub(super) warnings: Vec<String>,
    /// The ids in its label files.
    #[serde(default)]
    pub(super) label_ids: BTreeSet<u8>,
    /// The file of its image, as the datalist has it.
    #[serde(default)]
    pub(super) image: Option<PathBuf>,
}

impl Ledger {
    /// Opens the ledger of a store, or begins one.
    pub(super) fn open(store_dir: &Path) -> Result<Self, IngestError> {
        let folder = store_dir.join(LEDGER_DIR);
        fs_err::create_dir_all(&folder).map_err(StoreError::from)?;
        Ok(Self { folder })
    }

    /// Returns a case's entry; none where it is missing or damaged, and the case is made again.
    pub(super) fn entry(&self, id: &str) -> Option<LedgerEntry> {
        let bytes = fs_err::read(self.path(id)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes a case's entry.
    pub(super) fn write(&self, id: &str, entry: &LedgerEntry) -> Result<(), IngestError> {
        let bytes = serde_json::to_vec(entry).expect("an entry is representable in JSON");
        Ok(store::replace(&self.path(id), &[&bytes])?)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}
