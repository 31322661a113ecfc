//! The store on disk, open for reading.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::ChunkCache;
use super::reader::CaseFile;
use super::{
    Candidate, CaseRecord, Cases, Crop, NearDuplicate, StoreConfig, StoreError, case_path, index, snapshot_of,
};
use crate::digest::Digest;
use crate::volume::{Plan, Region};

/// How many case files stay open: far below the maps a process may have.
const MAX_OPEN_FILES: usize = 1024;
/// How much memory the chunk tables of open files take: a few megabytes for a body scan, hundreds of bytes for a phantom.
const MAX_OPEN_BYTES: usize = 64 << 20;

/// An open file and when it was last used, counted in uses of any file.
struct OpenFile {
    file: Arc<CaseFile>,
    used: u64,
}

/// The files that stay open.
#[derive(Default)]
struct OpenFiles {
    files: HashMap<usize, OpenFile>,
    bytes: usize,
    uses: u64,
}

impl OpenFiles {
    fn get(&mut self, case: usize) -> Option<Arc<CaseFile>> {
        self.uses += 1;
        let open = self.files.get_mut(&case)?;
        open.used = self.uses;
        Some(open.file.clone())
    }

    /// Keeps a file open, and closes those that were used longest ago where there are too many.
    fn insert(&mut self, case: usize, file: Arc<CaseFile>) {
        self.bytes += file.memory_bytes();
        let used = self.uses;
        self.remove(case);
        self.files.insert(case, OpenFile { file, used });
        while self.files.len() > MAX_OPEN_FILES || (self.bytes > MAX_OPEN_BYTES && self.files.len() > 1) {
            let oldest = self.files.iter().min_by_key(|(_, open)| open.used);
            let Some(oldest) = oldest.map(|(case, _)| *case) else {
                return;
            };
            self.remove(oldest);
        }
    }

    fn remove(&mut self, case: usize) {
        if let Some(open) = self.files.remove(&case) {
            self.bytes -= open.file.memory_bytes();
        }
    }
}

/// A store on disk, opened for reading. The cases are those of the index at the time of opening.
pub struct Store {
    dir: PathBuf,
    plan: Plan,
    records: Vec<CaseRecord>,
    near_duplicates: Vec<NearDuplicate>,
    snapshot: Digest,
    open: Mutex<OpenFiles>,
    cache: Option<Arc<ChunkCache>>,
}

impl Store {
    /// Opens a store.
    ///
    /// # Errors
    /// [`StoreError`] names the file that is missing or damaged.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        let dir = dir.as_ref().to_path_buf();
        let (plan, contents) = index::read(&dir)?;
        let index::Contents {
            records,
            near_duplicates,
        } = contents;
        Ok(Self {
            snapshot: snapshot_of(&records, &plan),
            dir,
            plan,
            records,
            near_duplicates,
            open: Mutex::default(),
            cache: None,
        })
    }

    /// Keeps chunks in memory as the settings say.
    pub fn with_config(mut self, config: &StoreConfig) -> Self {
        self.cache = (config.cache_mib > 0).then(|| Arc::new(ChunkCache::new(config.cache_mib << 20)));
        // Files that are open know of no cache, or of another.
        self.open = Mutex::default();
        self
    }

    /// Checks every block of a case's file.
    ///
    /// # Errors
    /// [`StoreError`] names the file and the first block that is damaged.
    pub fn verify(&self, case: usize) -> Result<(), StoreError> {
        self.with_file(case, CaseFile::verify)
    }

    fn file(&self, case: usize) -> Result<Arc<CaseFile>, StoreError> {
        let record = self
            .records
            .get(case)
            .ok_or_else(|| StoreError::NoCase(case.to_string()))?;
        if let Some(file) = self.open_files().get(case) {
            return Ok(file);
        }
        // Opened outside the lock: a slow disk holds up only those who need this case.
        let path = case_path(&self.dir, &record.id);
        let file = CaseFile::open(&path)?;
        let file = Arc::new(match &self.cache {
            Some(cache) => file.with_cache(cache.clone(), case),
            None => file,
        });
        if file.record() != record {
            return Err(StoreError::damaged(
                &path,
                "its header is not that of the index: the case was written again after the index",
            ));
        }
        self.open_files().insert(case, file.clone());
        Ok(file)
    }

    fn open_files(&self) -> MutexGuard<'_, OpenFiles> {
        // A panic elsewhere cannot leave the list half changed, so a poisoned lock is still good.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses a case's file; one that turns out damaged is closed, so that a healed one is found the next time.
    fn with_file<T>(
        &self,
        case: usize,
        read: impl FnOnce(&CaseFile) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let outcome = read(&*self.file(case)?);
        if let Err(StoreError::Damaged { .. } | StoreError::Io(_)) = outcome {
            self.open_files().remove(case);
        }
        outcome
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

    fn near_duplicates(&self) -> &[NearDuplicate] {
        &self.near_duplicates
    }

    fn read(&self, case: usize, region: Region) -> Result<Crop, StoreError> {
        self.with_file(case, |file| file.read(region))
    }

    fn read_into(&self, case: usize, region: Region, image: &mut [i16], labels: &mut [u8]) -> Result<(), StoreError> {
        super::check_buffers(region, image.len(), labels.len())?;
        self.with_file(case, |file| file.read_into(region, image, labels))
    }

    fn candidates(&self, case: usize, organ_id: u8) -> Result<Vec<Candidate>, StoreError> {
        self.with_file(case, |file| file.candidates(organ_id))
    }
}
