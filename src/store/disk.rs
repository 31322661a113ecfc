//! The store on disk, open for reading.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::reader::CaseFile;
use super::{Candidate, CaseRecord, Cases, Crop, StoreError, case_path, index, snapshot_of};
use crate::digest::Digest;
use crate::volume::{Plan, Region};

/// How many case files stay open; a map costs address space and a descriptor, not memory.
const MAX_OPEN_FILES: usize = 64;

/// A store on disk, opened for reading. The cases are those of the index at the time of opening.
pub struct Store {
    dir: PathBuf,
    plan: Plan,
    records: Vec<CaseRecord>,
    snapshot: Digest,
    /// Open files, least recently used first.
    open: Mutex<Vec<(usize, Arc<CaseFile>)>>,
}

impl Store {
    /// Opens a store.
    ///
    /// # Errors
    /// [`StoreError`] names the file that is missing or damaged.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        let dir = dir.as_ref().to_path_buf();
        let (plan, records) = index::read(&dir)?;
        Ok(Self {
            snapshot: snapshot_of(&records, &plan),
            dir,
            plan,
            records,
            open: Mutex::default(),
        })
    }

    /// Checks every block of a case's file.
    ///
    /// # Errors
    /// [`StoreError`] names the file and the first block that is damaged.
    pub fn verify(&self, case: usize) -> Result<(), StoreError> {
        self.file(case)?.verify()
    }

    fn file(&self, case: usize) -> Result<Arc<CaseFile>, StoreError> {
        let record = self
            .records
            .get(case)
            .ok_or_else(|| StoreError::NoCase(case.to_string()))?;
        // A panic elsewhere cannot leave the list half changed, so a poisoned lock is still good.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = open.iter().position(|(number, _)| *number == case) {
            let entry = open.remove(at);
            let file = entry.1.clone();
            open.push(entry);
            return Ok(file);
        }
        drop(open);
        // Opened outside the lock: a slow disk holds up only those who need this case.
        let path = case_path(&self.dir, &record.id);
        let file = Arc::new(CaseFile::open(&path)?);
        if file.record() != record {
            return Err(StoreError::damaged(
                &path,
                "its header is not that of the index: the case was written again after the index",
            ));
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= MAX_OPEN_FILES {
            open.remove(0);
        }
        open.push((case, file.clone()));
        Ok(file)
    }
}

impl Cases for Store {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn snapshot(&self) -> Digest {
        self.snapshot
    }

    fn records(&self) -> &[CaseRecord] {
        &self.records
    }

    fn read(&self, case: usize, region: Region) -> Result<Crop, StoreError> {
        self.file(case)?.read(region)
    }

    fn candidates(&self, case: usize, organ_id: u8) -> Result<Vec<Candidate>, StoreError> {
        self.file(case)?.candidates(organ_id)
    }
}
