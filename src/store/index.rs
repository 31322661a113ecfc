//! `index.bin`: the plan and every case's record, so that opening a store reads one file.

use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};

use super::decode::decode;
use super::{CaseRecord, NearDuplicate, StoreError, check_id};
use crate::digest::canonical_json;
use crate::volume::Plan;

/// The index's name in a store.
pub(super) const INDEX_NAME: &str = "index.bin";
const MAGIC: [u8; 8] = *b"FTINDEX\n";
const VERSION: u32 = 2;
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
    /// Sorted, without repeats.
    near_duplicates: Vec<NearDuplicate>,
}

/// Cases and what is known of them together.
#[derive(Default)]
pub(super) struct Contents {
    /// Sorted by id.
    pub(super) records: Vec<CaseRecord>,
    /// Pairs of them that show the same scan, saved differently.
    pub(super) near_duplicates: Vec<NearDuplicate>,
}

/// Writes the index of a store, replacing the one before.
pub(super) fn write(dir: &Path, plan: &Plan, contents: Contents) -> Result<(), StoreError> {
    let path = dir.join(INDEX_NAME);
    let body = Body {
        plan: canonical_json(plan),
        records: contents.records,
        near_duplicates: contents.near_duplicates,
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
            "expected index version {VERSION}, got {}: written by another release; ingest into a new folder",
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
pub(super) fn read(dir: &Path) -> Result<(Plan, Contents), StoreError> {
    let path = dir.join(INDEX_NAME);
    let damaged = |what: String| StoreError::damaged(&path, what);
    // The file that is read, not one that takes its place meanwhile.
    let mut file = fs_err::File::open(&path).map_err(|error| no_index(&path, error))?;
    let file_bytes = file.metadata()?.len();
    if file_bytes > MAX_BYTES as u64 {
        return Err(damaged(format!("{file_bytes} bytes, at most {MAX_BYTES}")));
    }
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
    let body: Body = decode(&mut reader, file_bytes).map_err(|error| damaged(error.to_string()))?;
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
    if let Some(what) = body.records.iter().find_map(CaseRecord::refusal) {
        return Err(damaged(what));
    }
    if !body.records.is_sorted_by(|a, b| a.id < b.id) {
        return Err(damaged("case ids are not sorted or not unique".into()));
    }
    check_pairs(&body.near_duplicates, body.records.len()).map_err(damaged)?;
    let contents = Contents {
        records: body.records,
        near_duplicates: body.near_duplicates,
    };
    Ok((plan, contents))
}

/// Checks that pairs name cases that are there, so that their users may index with them.
fn check_pairs(pairs: &[NearDuplicate], cases: usize) -> Result<(), String> {
    let is_pair = |pair: &NearDuplicate| pair.first < pair.second && (pair.second as usize) < cases;
    if let Some(pair) = pairs.iter().find(|pair| !is_pair(pair)) {
        return Err(format!("near-duplicates {pair:?} of {cases} cases"));
    }
    if !pairs.is_sorted_by(|a, b| (a.first, a.second) < (b.first, b.second)) {
        return Err("near-duplicates are not sorted or not unique".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::store::{OrganRecord, Store, TumourRecord};
    use crate::volume::{Fingerprint, Region};

    /// Memory of this process, where the system tells it.
    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|kib| kib.parse().ok()).unwrap_or(0)
    }

    /// An abdominal case: three organs, two tumours, a patient and a long fingerprint.
    fn abdominal(number: usize) -> CaseRecord {
        let region = Region::whole([100; 3]);
        let organ = |id| OrganRecord {
            id,
            voxels: 1000,
            region,
            holds_mm: 50.0,
        };
        let tumour = TumourRecord {
            id: 2,
            voxels: 100,
            region,
            centre: [50; 3],
            diameter_mm: 12.0,
            contrast_hu: -40.0,
        };
        CaseRecord {
            patient: format!("{number:016x}"),
            fingerprint: Fingerprint::from_bytes(vec![number as u8; 400]).unwrap(),
            organs: [1, 3, 5].map(organ).to_vec(),
            tumours: vec![tumour; 2],
            ..record(number)
        }
    }

    #[test]
    fn pairs_of_cases_that_are_not_there_are_damage() {
        let dir = tempfile::tempdir().unwrap();
        let pair = |first, second| NearDuplicate {
            first,
            second,
            score: 40,
        };
        let read_back = |near_duplicates: Vec<NearDuplicate>| {
            let contents = Contents {
                records: (0..3).map(record).collect(),
                near_duplicates,
            };
            write(dir.path(), &Plan::default(), contents).unwrap();
            read(dir.path()).map(|(_, contents)| contents.near_duplicates)
        };
        let good = vec![pair(0, 2), pair(1, 2)];
        assert_eq!(read_back(good.clone()).unwrap(), good);
        for bad in [
            vec![pair(0, 3)],
            vec![pair(1, 1)],
            vec![pair(2, 0)],
            vec![pair(1, 2), pair(0, 2)],
            vec![pair(0, 1), pair(0, 1)],
        ] {
            let error = read_back(bad).unwrap_err().to_string();
            assert!(
                error.contains("index.bin") && error.contains("near-duplicates"),
                "{error}"
            );
        }
    }

    /// How long an index of 100,000 cases takes to open, and what it keeps in memory.
    #[test]
    #[ignore = "measures: cargo test --release --lib store::index -- --ignored --nocapture"]
    fn a_large_index_opens_at_once() {
        const CASES: usize = 100_000;
        let dir = tempfile::tempdir().unwrap();
        let contents = Contents {
            records: (0..CASES).map(abdominal).collect(),
            near_duplicates: Vec::new(),
        };
        write(dir.path(), &Plan::default(), contents).unwrap();
        let bytes = fs_err::metadata(dir.path().join(INDEX_NAME)).unwrap().len();
        for _ in 0..5 {
            let before = resident_kib();
            let start = std::time::Instant::now();
            let store = Store::open(dir.path()).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            assert_eq!(crate::store::Cases::records(&store).len(), CASES);
            let more = resident_kib().saturating_sub(before);
            eprintln!("{CASES} cases, {bytes} bytes: opened in {seconds:.3} s, {more} KiB more in memory");
            assert!(seconds < 2.0, "{seconds} s");
        }
    }
}
