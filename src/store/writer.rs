//! Writing a store: one immutable file per case, put in place by rename, and the index over all of them.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use ndarray::{Array3, s};

use super::analyse::{self, Voxels};
use super::codec::{self, Compression};
use super::duplicates::{Duplicate, Known, duplicates, find_near};
use super::format::{self, Block, CaseHeader, Chunk, MAX_SIDE, Tiling};
use super::reader::CaseFile;
use super::{
    CASES_DIR, Candidate, CaseKind, CaseRecord, OrganRecord, SourceGeometry, StoreError, TumourRecord, case_path,
    check_id, index,
};
use crate::digest::{Digest, update_i16};
use crate::volume::{AIR_HU, Annotation, Fingerprint, Grid, IGNORE, Plan, Region};

/// How far a case's spacing may differ from the plan's, in mm: rounding in affines.
const SPACING_TOLERANCE_MM: f64 = 1e-3;

/// A case to be written: voxels on the plan's spacing, labels in the plan's ids.
pub struct CaseInput {
    /// The case's opaque id: 1 to 128 of `A-Z a-z 0-9 . _ -`, no leading dot.
    pub id: String,
    /// Whether tumours were annotated.
    pub kind: CaseKind,
    /// Where the voxels lie.
    pub grid: Grid,
    /// What the annotators looked for.
    pub annotation: Annotation,
    /// Whose scan it is, see [`CaseRecord::patient`].
    pub patient: String,
    /// Who made the labels, see [`CaseRecord::labels_by`].
    pub labels_by: String,
    /// BLAKE3 of the canonically oriented source voxels.
    pub source_hash: Digest,
    /// What the source looks like.
    pub fingerprint: Fingerprint,
    /// Where the case came from.
    pub source: SourceGeometry,
    /// HU, at least -1024.
    pub image: Array3<i16>,
    /// Label ids of the plan, or 255.
    pub labels: Array3<u8>,
}

/// What [`StoreWriter::finish`] found.
#[derive(Debug)]
pub struct Finished {
    /// Cases in the index.
    pub cases: usize,
    /// Pairs of them that show one scan.
    pub duplicates: Vec<Duplicate>,
    /// Files that could not be read and are left out of the index.
    pub damaged: Vec<StoreError>,
}

/// Adds cases to a store. Several writers, also on several machines, may fill one store with different cases.
pub struct StoreWriter {
    dir: PathBuf,
    plan: Plan,
    compression: Compression,
}

impl StoreWriter {
    /// Creates a store, or opens one of the same plan to add cases.
    ///
    /// # Errors
    /// [`StoreError::OtherPlan`] names the key in which an existing store differs.
    pub fn create(dir: impl AsRef<Path>, plan: &Plan) -> Result<Self, StoreError> {
        let dir = dir.as_ref().to_path_buf();
        if let Some(refusal) = plan.refusal() {
            return Err(StoreError::invalid(&dir, refusal));
        }
        fs_err::create_dir_all(dir.join(CASES_DIR))?;
        if dir.join(index::INDEX_NAME).exists() {
            let (known, _) = index::read(&dir)?;
            check_same_plan(&dir, &known, plan)?;
        } else {
            let _lock = lock(&dir)?;
            // Another writer may have finished meanwhile.
            if dir.join(index::INDEX_NAME).exists() {
                check_same_plan(&dir, &index::read(&dir)?.0, plan)?;
            } else {
                index::write(&dir, plan, index::Contents::default())?;
            }
        }
        Ok(Self {
            dir,
            plan: plan.clone(),
            compression: Compression::default(),
        })
    }

    /// Chooses whether chunks are compressed; it never changes a hash.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Returns the store's plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the record of a case whose file is already there and whole.
    pub fn existing(&self, id: &str) -> Option<CaseRecord> {
        check_id(id).ok()?;
        let file = CaseFile::open(&case_path(&self.dir, id)).ok()?;
        file.verify().ok()?;
        Some(file.record().clone())
    }

    /// Writes a case and returns its record; an identical case that is already there and whole is left untouched.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] names the field of a case that the plan does not allow.
    pub fn write(&self, case: CaseInput) -> Result<CaseRecord, StoreError> {
        check_id(&case.id)?;
        let path = case_path(&self.dir, &case.id);
        self.check(&case).map_err(|what| StoreError::invalid(&path, what))?;
        let (record, candidates) = self.analyse(case_hash(&case), &case);
        if let Some(what) = record.refusal() {
            return Err(StoreError::invalid(&path, what));
        }
        if self.existing(&case.id).as_ref() == Some(&record) {
            return Ok(record);
        }
        let (header, payload) = self.pack(&path, record, &candidates, &case)?;
        let head = format::encode_head(&header).map_err(|what| StoreError::invalid(&path, what))?;
        replace(&path, &[&head, &payload])?;
        Ok(header.record)
    }

    /// Writes the index over all case files that are there; call it when all cases are written.
    ///
    /// # Errors
    /// [`StoreError::Io`] where the store cannot be listed or written; damaged cases are reported, not errors.
    pub fn finish(self) -> Result<Finished, StoreError> {
        // Two shards that finish together must not overwrite each other's newer index.
        let _lock = lock(&self.dir)?;
        let (plan, before) = index::read(&self.dir)?;
        check_same_plan(&self.dir, &plan, &self.plan)?;
        let (mut records, mut damaged) = (Vec::new(), Vec::new());
        for entry in fs_err::read_dir(self.dir.join(CASES_DIR))? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "ftc") {
                continue;
            }
            match CaseFile::open(&path) {
                Ok(file) if case_path(&self.dir, &file.record().id) == path => {
                    let record = file.record();
                    match self.check_plan(&record.grid, &record.annotation) {
                        Ok(()) => records.push(record.clone()),
                        Err(what) => damaged.push(StoreError::damaged(&path, what)),
                    }
                }
                Ok(file) => damaged.push(StoreError::damaged(
                    &path,
                    format!("it holds case {:?}", file.record().id),
                )),
                Err(error) => damaged.push(error),
            }
        }
        records.sort_by(|a, b| a.id.cmp(&b.id));
        let known = Known {
            records: &before.records,
            near: &before.near_duplicates,
        };
        let near_duplicates = find_near(&records, &known);
        let (cases, duplicates) = (records.len(), duplicates(&records, &near_duplicates));
        let contents = index::Contents {
            records,
            near_duplicates,
        };
        index::write(&self.dir, &self.plan, contents)?;
        Ok(Finished {
            cases,
            duplicates,
            damaged,
        })
    }

    fn check(&self, case: &CaseInput) -> Result<(), String> {
        let shape = case.grid.shape;
        if !shape.iter().all(|side| (1..=MAX_SIDE).contains(side)) {
            return Err(format!(
                "grid.shape: expected 1 to {MAX_SIDE} voxels a side, got {shape:?}"
            ));
        }
        let found = (
            <[usize; 3]>::from(case.image.dim()),
            <[usize; 3]>::from(case.labels.dim()),
        );
        if found != (shape, shape) {
            return Err(format!(
                "image and labels: expected the grid's shape {shape:?}, got {found:?}"
            ));
        }
        self.check_plan(&case.grid, &case.annotation)?;
        if let Some(hu) = case.image.iter().find(|hu| **hu < AIR_HU) {
            return Err(format!("image: expected at least {AIR_HU} HU, got {hu}"));
        }
        let known = |label: u8| label == IGNORE || self.plan.labels.name(label).is_some();
        let mut seen = [false; 256];
        case.labels.iter().for_each(|label| seen[usize::from(*label)] = true);
        if let Some(label) = (0..=255).find(|label| seen[usize::from(*label)] && !known(*label)) {
            return Err(format!("labels: id {label} is not in the plan's label map"));
        }
        Ok(())
    }

    /// Refuses a case of another plan: its file does not say of which it is.
    fn check_plan(&self, grid: &Grid, annotation: &Annotation) -> Result<(), String> {
        let spacing_mm = grid.spacing_mm();
        let near = |axis: usize| (spacing_mm[axis] - self.plan.spacing_mm[axis]).abs() <= SPACING_TOLERANCE_MM;
        if !(0..3).all(near) {
            return Err(format!(
                "grid.affine: expected the plan's spacing {:?} mm, got {spacing_mm:?}",
                self.plan.spacing_mm
            ));
        }
        annotation
            .admissible(&self.plan.labels)
            .map(drop)
            .map_err(|error| format!("annotation: {error}"))
    }

    fn analyse(&self, content_hash: Digest, case: &CaseInput) -> (CaseRecord, Vec<(u8, Vec<Candidate>)>) {
        let voxels = Voxels {
            grid: &case.grid,
            image: &case.image,
            labels: &case.labels,
        };
        let boxes = analyse::boxes(&case.labels);
        let mut organs: Vec<OrganRecord> = Vec::new();
        let mut tumours: Vec<TumourRecord> = Vec::new();
        let mut candidates = Vec::new();
        for organ in self.plan.labels.organs() {
            if let Some(region) = boxes.get(&organ.id) {
                let (record, places) = analyse::organ(voxels, &organ, *region);
                organs.push(record);
                candidates.push((organ.id, places));
            }
            if let Some(region) = boxes.get(&organ.tumour_id) {
                tumours.extend(analyse::tumours(voxels, &organ, *region));
            }
        }
        let record = CaseRecord {
            id: case.id.clone(),
            kind: case.kind,
            grid: case.grid,
            annotation: case.annotation.clone(),
            patient: case.patient.clone(),
            labels_by: case.labels_by.clone(),
            source_hash: case.source_hash,
            fingerprint: case.fingerprint.clone(),
            content_hash,
            source: case.source.clone(),
            organs,
            tumours,
        };
        (record, candidates)
    }

    fn pack(
        &self,
        path: &Path,
        record: CaseRecord,
        candidates: &[(u8, Vec<Candidate>)],
        case: &CaseInput,
    ) -> Result<(CaseHeader, Vec<u8>), StoreError> {
        let tiling = Tiling {
            shape: record.grid.shape,
            sides: format::CHUNK_SIDES,
        };
        let mut payload = Vec::new();
        let mut chunks = Vec::with_capacity(tiling.counts().iter().product());
        for place in tiling.places() {
            chunks.push(self.pack_chunk(case, tiling.region(place), &mut payload)?);
        }
        let places = bincode::encode_to_vec(candidates, format::header_config())
            .map_err(|error| StoreError::invalid(path, format!("candidates: {error}")))?;
        let candidate_bytes = u32::try_from(places.len())
            .ok()
            .filter(|bytes| *bytes as usize <= format::MAX_CANDIDATE_BYTES)
            .ok_or_else(|| StoreError::invalid(path, format!("{} bytes of candidates", places.len())))?;
        let (codec, packed) = codec::pack_bytes(places, self.compression)?;
        let candidates = Block {
            codec,
            offset: payload.len() as u64,
            length: u32::try_from(packed.len()).expect("at most as many bytes as were checked above"),
            crc: crc32fast::hash(&packed),
        };
        payload.extend(packed);
        let header = CaseHeader {
            record,
            tiling,
            chunks,
            candidates,
            candidate_bytes,
        };
        Ok((header, payload))
    }

    /// Appends a chunk to the payload.
    fn pack_chunk(&self, case: &CaseInput, region: Region, payload: &mut Vec<u8>) -> Result<Chunk, StoreError> {
        let hu = window(&case.image, region);
        let labels = window(&case.labels, region);
        let (image_codec, image) = codec::pack_hu(&hu, region.size, self.compression)?;
        let (labels_codec, labels) = codec::pack_bytes(labels, self.compression)?;
        let offset = payload.len();
        payload.extend(&image);
        payload.extend(&labels);
        let stored = "a chunk is far below 4 GiB";
        Ok(Chunk {
            offset: offset as u64,
            image_length: u32::try_from(image.len()).expect(stored),
            labels_length: u32::try_from(labels.len()).expect(stored),
            crc: crc32fast::hash(&payload[offset..]),
            image_codec,
            labels_codec,
        })
    }
}

/// Copies a box out of a volume, row by row.
fn window<T: Copy>(volume: &Array3<T>, region: Region) -> Vec<T> {
    let [z, y, x] = region.start.map(|v| v as usize);
    let [d, h, w] = region.size;
    let mut copy = Vec::with_capacity(d * h * w);
    for row in volume.slice(s![z..z + d, y..y + h, x..x + w]).rows() {
        match row.as_slice() {
            Some(row) => copy.extend_from_slice(row),
            None => copy.extend(row),
        }
    }
    copy
}

/// Waits for the store's lock, which is held until the file is closed.
fn lock(dir: &Path) -> Result<fs_err::File, StoreError> {
    let file = fs_err::File::create(dir.join(".lock"))?;
    match file.file().lock() {
        Ok(()) => Ok(file),
        // A file system without locks (or one whose lock service does not answer): run the shards' last `finish` alone, as
        // `docs/ingest.md` says.
        Err(error) if error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(libc::ENOLCK) => Ok(file),
        Err(error) => Err(error.into()),
    }
}

/// Hashes everything stored that can change a patch; never ids, patients, codecs, paths or times.
fn case_hash(case: &CaseInput) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"freetumor.case.v1");
    for side in case.grid.shape {
        hasher.update(&(side as u64).to_le_bytes());
    }
    for value in case.grid.affine.0.iter().flatten() {
        hasher.update(&value.to_le_bytes());
    }
    hasher.update(&[
        u8::from(case.kind == CaseKind::Labelled),
        u8::from(case.annotation.assumed_tumour_free),
    ]);
    hasher.update(&(case.annotation.classes.len() as u64).to_le_bytes());
    for class in &case.annotation.classes {
        hasher.update(&(class.len() as u64).to_le_bytes());
        hasher.update(class.as_bytes());
    }
    for plane in case.image.outer_iter() {
        update_i16(&mut hasher, plane.iter());
    }
    for plane in case.labels.outer_iter() {
        match plane.as_slice() {
            Some(bytes) => hasher.update(bytes),
            None => hasher.update(&plane.iter().copied().collect::<Vec<u8>>()),
        };
    }
    hasher.finalize().into()
}

fn check_same_plan(dir: &Path, known: &Plan, asked: &Plan) -> Result<(), StoreError> {
    let json = |plan: &Plan| serde_json::to_value(plan).expect("a plan is representable in JSON");
    let (known, asked) = (json(known), json(asked));
    let keys = known.as_object().into_iter().flatten();
    for (key, value) in keys {
        if asked.get(key) != Some(value) {
            return Err(StoreError::OtherPlan {
                path: dir.join(index::INDEX_NAME),
                key: format!("plan.{key}"),
                expected: value.to_string(),
                got: asked.get(key).unwrap_or_default().to_string(),
            });
        }
    }
    Ok(())
}

/// Puts a file in place at once: a temporary file beside it, flushed to disk, then renamed.
pub(crate) fn replace(path: &Path, parts: &[&[u8]]) -> Result<(), StoreError> {
    let named = |error: std::io::Error| {
        StoreError::Io(std::io::Error::new(
            error.kind(),
            format!("{}: cannot write: {error}", path.display()),
        ))
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    #[cfg(unix)]
    {
        // Temporary files are private by default; a store is read by other users, as the umask allows.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(dir).map_err(named)?;
    for part in parts {
        file.write_all(part).map_err(named)?;
    }
    file.as_file().sync_all().map_err(named)?;
    file.persist(path).map_err(|error| named(error.error))?;
    // The rename itself is durable once the directory is.
    fs_err::File::open(dir)?.sync_all()?;
    Ok(())
}
