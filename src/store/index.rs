//! `index.bin`: the plan and every case's record, so that opening a store reads one file.

use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};

use super::{CaseRecord, StoreError, check_id};
use crate::digest::canonical_json;
use crate::volume::Plan;

/// The index's name in a store.
pub(super) const INDEX_NAME: &str = "index.bin";
const MAGIC: [u8; 8] = *b"FTINDEX\n";
const VERSION: u32 = 1;
/// Magic, version, CRC-32 of the body, length of the body.
const PREAMBLE_BYTES: usize = 24;
/// The most bytes of an index, decoded: over 10^6 cases.
const MAX_BYTES: usize = 1 << 30;

/// Of the file at a time.
const BUFFER_BYTES: usize = 1 << 18;

type IndexConfig = Configuration<LittleEndian, Fixint, Limit<MAX_BYTES>>;

fn config() -> IndexConfig {
    bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<MAX_BYTES>()
}

/// What an index holds.
#[derive(bincode::Encode, bincode::Decode)]
struct Body {
    /// The plan as canonical JSON, which outlives changes of the plan's type better than its fields would.
    plan: String,
    /// Sorted by id.
    records: Vec<CaseRecord>,
}

/// Writes the index of a store, replacing the one before.
pub(super) fn write(dir: &Path, plan: &Plan, records: Vec<CaseRecord>) -> Result<(), StoreError> {
    let path = dir.join(INDEX_NAME);
    let body = Body {
        plan: canonical_json(plan),
        records,
    };
    let body = bincode::encode_to_vec(&body, config())
        .map_err(|error| StoreError::invalid(&path, format!("the index cannot be encoded: {error}")))?;
    let mut bytes = Vec::with_capacity(PREAMBLE_BYTES + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    super::writer::replace(&path, &[&bytes])
}

/// Says what a missing index means.
fn no_index(path: &Path, error: std::io::Error) -> std::io::Error {
    if error.kind() != ErrorKind::NotFound {
        return error;
    }
    let meaning = "not found: there is no store, or its ingest has not ended";
    std::io::Error::new(ErrorKind::NotFound, format!("{}: {meaning}", path.display()))
}

/// Reads and checks the bytes before the body, and returns its CRC-32.
fn read_preamble(file: &mut impl Read, file_bytes: u64) -> Result<u32, String> {
    let mut bytes = [0; PREAMBLE_BYTES];
    if file.read_exact(&mut bytes).is_err() || bytes[..8] != MAGIC {
        return Err("expected the magic bytes of a store's index".into());
    }
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes of a slice of four"));
    if word(8) != VERSION {
        return Err(format!(
            "expected index version {VERSION}, got {}: written by another release, ingest again",
            word(8)
        ));
    }
    let length = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes of a slice of eight"));
    let there = file_bytes - PREAMBLE_BYTES as u64;
    if length != there {
        return Err(format!("expected {length} bytes after the preamble, got {there}"));
    }
    Ok(word(12))
}

/// Returns the CRC-32 of what is left of a file.
fn hash_rest(file: &mut impl Read) -> std::io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// A reader that hashes what passes through it.
struct Hashed<R> {
    inner: R,
    hasher: crc32fast::Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Reads and checks the index of a store.
pub(super) fn read(dir: &Path) -> Result<(Plan, Vec<CaseRecord>), StoreError> {
    let path = dir.join(INDEX_NAME);
    let damaged = |what: String| StoreError::damaged(&path, what);
    let file_bytes = fs_err::metadata(&path).map_err(|error| no_index(&path, error))?.len();
    if file_bytes > MAX_BYTES as u64 {
        return Err(damaged(format!("{file_bytes} bytes, at most {MAX_BYTES}")));
    }
    let mut file = fs_err::File::open(&path)?;
    let crc = read_preamble(&mut file, file_bytes).map_err(damaged)?;
    // Checked before it is decoded, so that no length in it is believed unseen; hashed again while it is decoded, so that
    // what is used is what was checked. Neither holds the file in memory.
    if hash_rest(&mut file)? != crc {
        return Err(damaged("the checksum does not match".into()));
    }
    file.seek(SeekFrom::Start(PREAMBLE_BYTES as u64))?;
    let mut hashed = Hashed {
        inner: file,
        hasher: crc32fast::Hasher::new(),
    };
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, &mut hashed);
    let body: Body =
        bincode::decode_from_std_read(&mut reader, config()).map_err(|error| damaged(error.to_string()))?;
    if !reader.fill_buf()?.is_empty() {
        return Err(damaged("bytes after the last case".into()));
    }
    drop(reader);
    if hashed.hasher.finalize() != crc {
        return Err(damaged("it changed while it was read".into()));
    }
    let plan: Plan = serde_json::from_str(&body.plan).map_err(|error| damaged(format!("plan: {error}")))?;
    if let Some(refusal) = plan.refusal() {
        return Err(damaged(refusal));
    }
    body.records.iter().try_for_each(|record| check_id(&record.id))?;
    if !body.records.is_sorted_by(|a, b| a.id < b.id) {
        return Err(damaged("case ids are not sorted or not unique".into()));
    }
    Ok((plan, body.records))
}
