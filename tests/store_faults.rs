//! What goes wrong with files: nothing damaged is served, nothing whole is lost, and the process stays up (P6).

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

mod cases;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use freetumor::store::{Cases, Compression, Crop, Store, StoreError, StoreWriter};
use freetumor::volume::Region;
use proptest::prelude::*;

use cases::{case, file_of, plan, store_of};

const SHAPE: [usize; 3] = [17, 18, 33];

/// Reads everything that a store serves of its first case.
fn everything(store: &Store) -> Result<Crop, StoreError> {
    store.candidates(0, 1)?;
    store.read(0, Region::whole(SHAPE))
}

/// A store of one small case, the case's bytes, and what it holds.
struct Whole {
    dir: tempfile::TempDir,
    bytes: Vec<u8>,
    crop: Crop,
}

fn whole(compression: Compression) -> Whole {
    let dir = tempfile::tempdir().unwrap();
    let crop = everything(&store_of(dir.path(), &[("a", SHAPE)], compression)).unwrap();
    let bytes = std::fs::read(file_of(dir.path(), "a")).unwrap();
    Whole { dir, bytes, crop }
}

impl Whole {
    /// Opens the store with other bytes in the place of its case, and reads it.
    fn read_with(&self, bytes: &[u8]) -> Result<Crop, StoreError> {
        // Renamed into place, as files of a store are.
        let path = file_of(self.dir.path(), "a");
        let beside = self.dir.path().join("beside");
        std::fs::write(&beside, bytes).unwrap();
        std::fs::rename(&beside, &path).unwrap();
        everything(&Store::open(self.dir.path()).unwrap())
    }
}

#[test]
fn a_file_cut_at_any_byte_is_an_error_that_names_it() {
    let whole = whole(Compression::Zstd);
    // Every byte of the preamble and the header, where lengths stand, then every seventh.
    let ends = (0..1200).chain((1200..whole.bytes.len()).step_by(7));
    for end in ends {
        let error = whole.read_with(&whole.bytes[..end]).unwrap_err().to_string();
        assert!(error.contains("a.ftc"), "{end}: {error}");
    }
    assert_eq!(whole.read_with(&whole.bytes).unwrap(), whole.crop);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// No flipped bit is served: an error that names the file, or a bit of the padding before the payload.
    #[test]
    fn a_flipped_bit_is_never_served(at in any::<prop::sample::Index>(), bit in 0_u32..8, is_raw in any::<bool>()) {
        use std::sync::OnceLock;
        static STORES: OnceLock<[Whole; 2]> = OnceLock::new();
        let stores = STORES.get_or_init(|| [whole(Compression::Zstd), whole(Compression::Raw)]);
        let whole = &stores[usize::from(is_raw)];
        let mut bytes = whole.bytes.clone();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        match whole.read_with(&bytes) {
            Err(error) => prop_assert!(error.to_string().contains("a.ftc"), "{error}"),
            Ok(crop) => {
                let word = |at: usize| u32::from_le_bytes(whole.bytes[at..at + 4].try_into().unwrap()) as usize;
                let padding = 32 + word(12)..word(16);
                prop_assert!(padding.contains(&at), "byte {at}, padding {padding:?}");
                prop_assert_eq!(&crop, &whole.crop);
            }
        }
    }
}

#[test]
fn bytes_that_change_under_an_open_store_are_not_served() {
    use std::os::unix::fs::FileExt;
    let whole = whole(Compression::Raw);
    let store = Store::open(whole.dir.path()).unwrap();
    assert_eq!(everything(&store).unwrap(), whole.crop);
    let path = file_of(whole.dir.path(), "a");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    // In the middle of the image, in place: every later read sees it, none serves it.
    let at = whole.bytes.len() / 2;
    file.write_all_at(&[whole.bytes[at] ^ 4], at as u64).unwrap();
    for _ in 0..2 {
        let error = everything(&store).unwrap_err().to_string();
        assert!(error.contains("a.ftc") && error.contains("checksum"), "{error}");
    }
    file.write_all_at(&[whole.bytes[at]], at as u64).unwrap();
    assert_eq!(everything(&store).unwrap(), whole.crop);
}

#[test]
fn a_file_replaced_while_open_is_still_the_one_that_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &[("a", SHAPE)], Compression::Zstd);
    let before = everything(&store).unwrap();
    let mut other = case("a", SHAPE);
    other.image.mapv_inplace(|hu| hu + 1);
    StoreWriter::create(dir.path(), &plan()).unwrap().write(other).unwrap();
    // The snapshot is what was opened, until a reload.
    assert_eq!(everything(&store).unwrap(), before);
    // Opened anew before the index is written again, the two disagree, which is said and not served.
    let error = everything(&Store::open(dir.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("a.ftc") && error.contains("index"), "{error}");
    StoreWriter::create(dir.path(), &plan()).unwrap().finish().unwrap();
    let after = everything(&Store::open(dir.path()).unwrap()).unwrap();
    assert_eq!(after.image, &before.image + 1);
}

#[test]
fn a_truncation_while_threads_read_ends_in_errors_and_not_in_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let shape = [64, 96, 96];
    let store = store_of(dir.path(), &[("a", shape), ("good", SHAPE)], Compression::Raw);
    let reference = store.read(0, Region::whole(shape)).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(file_of(dir.path(), "a"))
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // Whatever comes back as a patch is the patch.
                while let Ok(crop) = store.read(0, Region::whole(shape)) {
                    assert_eq!(crop, reference);
                }
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        file.set_len(70_000).unwrap();
    });
    store.read(1, Region::whole(SHAPE)).unwrap();
}

#[test]
fn an_unfinished_write_is_no_case_and_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    store_of(dir.path(), &[("a", SHAPE)], Compression::Zstd);
    // What a crash between the temporary file and its rename leaves behind.
    std::fs::write(dir.path().join("cases/.tmp-xyz"), b"FTCASE\r\nhalf").unwrap();
    std::fs::write(dir.path().join(".tmp-index"), b"FTINDEX\n").unwrap();
    let finished = StoreWriter::create(dir.path(), &plan()).unwrap().finish().unwrap();
    assert!(finished.cases == 1 && finished.damaged.is_empty(), "{finished:?}");
    everything(&Store::open(dir.path()).unwrap()).unwrap();
}

#[test]
fn writers_of_one_store_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let dir = dir.path();
            scope.spawn(move || {
                let store = StoreWriter::create(dir, &plan()).unwrap();
                // One case of its own, and one that all of them write.
                store.write(case(&format!("own-{writer}"), [8, 8, 8])).unwrap();
                store.write(case("shared", SHAPE)).unwrap();
                assert!(store.finish().unwrap().damaged.is_empty());
            });
        }
    });
    let store = Store::open(dir.path()).unwrap();
    let ids: Vec<_> = store.records().iter().map(|record| record.id.as_str()).collect();
    assert_eq!(ids, ["own-0", "own-1", "own-2", "own-3", "shared"]);
    (0..5).for_each(|case| store.verify(case).unwrap());
}

/// Returns every file below a folder with its time of change.
fn files(dir: &Path) -> BTreeMap<std::path::PathBuf, SystemTime> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        found.insert(path.clone(), std::fs::metadata(&path).unwrap().modified().unwrap());
        if path.is_dir() {
            found.extend(files(&path));
        }
    }
    found
}

#[test]
fn reading_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    store_of(dir.path(), &[("a", SHAPE)], Compression::Zstd);
    let before = files(dir.path());
    let store = Store::open(dir.path()).unwrap();
    everything(&store).unwrap();
    store.verify(0).unwrap();
    assert_eq!(
        files(dir.path()),
        before,
        "a store on a read-only disk could not be read"
    );
}

#[test]
fn a_store_that_vanishes_is_an_error_for_what_was_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &[("a", SHAPE), ("b", SHAPE)], Compression::Zstd);
    let open = everything(&store).unwrap();
    std::fs::remove_dir_all(dir.path()).unwrap();
    // An open file lives on without its name.
    assert_eq!(everything(&store).unwrap(), open);
    let error = store.read(1, Region::whole(SHAPE)).unwrap_err().to_string();
    assert!(error.contains("b.ftc"), "{error}");
    assert!(Store::open(dir.path()).is_err());
}
