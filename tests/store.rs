//! The store on disk through its public API: what is written comes back, damage is an error that names the file (P6).

mod cases;

use std::path::{Path, PathBuf};

use freetumor::store::{CaseInput, Cases, Compression, MemoryStore, Store, StoreConfig, StoreError, StoreWriter};
use freetumor::volume::{AIR_HU, Affine, Fingerprint, HuWindow, MAX_FINGERPRINT_BYTES, Plan, Region};
use proptest::prelude::*;

use cases::{case, file_of, plan, store_of};

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn any_box_equals_a_slice_of_the_original(
        start in prop::array::uniform3(-40_i64..80),
        size in prop::array::uniform3(0_usize..70),
    ) {
        use std::sync::OnceLock;
        static STORES: OnceLock<(tempfile::TempDir, [Store; 3], MemoryStore)> = OnceLock::new();
        let (_, [zstd, kept, raw], memory) = STORES.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let cases = [("a", [41, 33, 70])];
            let zstd = store_of(&dir.path().join("zstd"), &cases, Compression::Zstd);
            let kept = Store::open(dir.path().join("zstd")).unwrap();
            let kept = kept.with_config(&StoreConfig { cache_mib: 1 });
            let raw = store_of(&dir.path().join("raw"), &cases, Compression::Raw);
            let mut memory = MemoryStore::new(plan());
            let input = case("a", [41, 33, 70]);
            memory.push(zstd.records()[0].clone(), input.image, input.labels);
            (dir, [zstd, kept, raw], memory)
        });
        let region = Region { start, size };
        let expected = memory.read(0, region).unwrap();
        prop_assert_eq!(&zstd.read(0, region).unwrap(), &expected);
        prop_assert_eq!(&raw.read(0, region).unwrap(), &expected);
        // Unpacked, unpacked to be kept, and what was kept.
        for _ in 0..3 {
            prop_assert_eq!(&kept.read(0, region).unwrap(), &expected);
        }
        // The three hold the same cases and plan, so they are the same snapshot.
        prop_assert_eq!(zstd.snapshot(), raw.snapshot());
        prop_assert_eq!(zstd.snapshot(), memory.snapshot());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    /// Headers that lie under a correct checksum: an error or an answer, never a panic or a huge allocation.
    #[test]
    fn a_lying_header_is_no_danger(at in 8_usize..2000, value in any::<[u8; 4]>(), width in 1_usize..5) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("cases")).unwrap();
        let mut bytes = std::fs::read(golden("store-v3.ftc")).unwrap();
        let header_end = 32 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let at = if at < 28 { at.min(24) } else { 32 + at % (header_end - 36) };
        bytes[at..at + width].copy_from_slice(&value[..width]);
        let mut covered = bytes[..28].to_vec();
        covered.extend(&bytes[32..header_end]);
        bytes[28..32].copy_from_slice(&crc32fast::hash(&covered).to_le_bytes());
        std::fs::write(file_of(dir.path(), "golden"), bytes).unwrap();
        // The index is made from the header itself, so that the reader sees the lie.
        let finished = StoreWriter::create(dir.path(), &plan()).unwrap().finish().unwrap();
        prop_assert!(finished.cases + finished.damaged.len() == 1);
        let store = Store::open(dir.path()).unwrap();
        if finished.cases == 1 {
            let shape = store.records()[0].grid.shape;
            drop((store.verify(0), store.read(0, Region::whole(shape)), store.candidates(0, 1)));
        }
    }
}

#[test]
fn every_flipped_byte_is_an_error_that_names_the_file_or_harmless_padding() {
    let dir = tempfile::tempdir().unwrap();
    store_of(dir.path(), &[("flip", [20, 21, 22])], Compression::Zstd);
    let path = file_of(dir.path(), "flip");
    let whole = std::fs::read(&path).unwrap();
    let region = Region::whole([20, 21, 22]);
    let reference = Store::open(dir.path()).unwrap().read(0, region).unwrap();
    let mut caught = 0;
    for at in (0..whole.len()).step_by(whole.len() / 200) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&path, &bytes).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let outcome = store.verify(0).and_then(|()| store.read(0, region));
        match outcome {
            Err(error) => {
                assert!(error.to_string().contains("flip.ftc"), "{error}");
                caught += 1;
            }
            Ok(crop) => assert_eq!(crop, reference, "byte {at} changed data unseen"),
        }
    }
    assert!(caught > 190, "only {caught} of 200 flips were noticed");
}

#[test]
fn a_file_truncated_after_it_was_mapped_is_an_error_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(
        dir.path(),
        &[("cut", [70, 70, 70]), ("good", [20, 20, 20])],
        Compression::Raw,
    );
    let region = Region::whole([70; 3]);
    store.read(0, region).unwrap();
    let path = file_of(dir.path(), "cut");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(5000).unwrap();
    let error = store.read(0, region).unwrap_err().to_string();
    assert!(
        error.contains("cut.ftc") && error.contains("truncated while open"),
        "{error}"
    );
    // The other case is untouched by it, and a fresh store refuses the short file as well.
    store.read(1, Region::whole([20; 3])).unwrap();
    let error = Store::open(dir.path()).unwrap().read(0, region).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    file.set_len(0).unwrap();
    assert!(store.read(0, region).is_err());
    // Once the same case is there again, the store that saw the damage reads it without being opened anew.
    drop(file);
    let healed = tempfile::tempdir().unwrap();
    store_of(healed.path(), &[("cut", [70; 3])], Compression::Raw);
    std::fs::rename(file_of(healed.path(), "cut"), &path).unwrap();
    let input = case("cut", [70; 3]);
    assert_eq!(store.read(0, region).unwrap().image, input.image);
}

#[test]
fn writing_the_same_case_again_touches_nothing_and_heals_damage() {
    let dir = tempfile::tempdir().unwrap();
    store_of(dir.path(), &[("same", [20, 20, 20])], Compression::Zstd);
    let path = file_of(dir.path(), "same");
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    store_of(dir.path(), &[("same", [20, 20, 20])], Compression::Raw);
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before);
    let mut broken = bytes.clone();
    *broken.last_mut().unwrap() ^= 1;
    std::fs::write(&path, broken).unwrap();
    store_of(dir.path(), &[("same", [20, 20, 20])], Compression::Zstd);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn damaged_cases_do_not_keep_others_out_of_the_index() {
    let dir = tempfile::tempdir().unwrap();
    store_of(
        dir.path(),
        &[("a", [20, 20, 20]), ("b", [20, 20, 20])],
        Compression::Zstd,
    );
    std::fs::write(file_of(dir.path(), "a"), b"not a case").unwrap();
    let finished = StoreWriter::create(dir.path(), &plan()).unwrap().finish().unwrap();
    assert_eq!((finished.cases, finished.damaged.len()), (1, 1));
    assert!(finished.damaged[0].to_string().contains("a.ftc"));
    assert!(Store::open(dir.path()).unwrap().find("b").is_some());
}

#[test]
fn what_the_plan_does_not_allow_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let writer = StoreWriter::create(dir.path(), &plan()).unwrap();
    let refusal = |change: &dyn Fn(&mut CaseInput)| {
        let mut input = case("x", [8, 8, 8]);
        change(&mut input);
        writer.write(input).unwrap_err().to_string()
    };
    assert!(refusal(&|case| case.id = "../x".into()).contains("case id \"../x\""));
    assert!(refusal(&|case| case.id = ".x".into()).contains("no leading dot"));
    assert!(refusal(&|case| case.labels[[0, 0, 0]] = 9).contains("id 9"));
    assert!(refusal(&|case| case.image[[0, 0, 0]] = -3024).contains("got -3024"));
    assert!(refusal(&|case| case.annotation.classes.push("spleen".into())).contains("spleen"));
    assert!(refusal(&|case| case.grid.shape = [9, 8, 8]).contains("shape"));
    assert!(refusal(&|case| case.patient = "p".repeat(129)).contains("patient: expected at most 128 bytes, got 129"));
    assert!(refusal(&|case| case.labels_by = "l".repeat(129)).contains("labels_by"));
    assert!(refusal(&|case| case.grid.affine = Affine::axis_aligned([1.0; 3], [0.0; 3])).contains("spacing"));
    let other = Plan {
        window_hu: HuWindow {
            low: -100.0,
            high: 200.0,
        },
        ..plan()
    };
    let error = StoreWriter::create(dir.path(), &other).err().unwrap().to_string();
    assert!(
        error.contains("index.bin") && error.contains("plan.window_hu"),
        "{error}"
    );
}

#[test]
fn records_and_candidates_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &[("a", [40, 40, 40])], Compression::Zstd);
    let record = &store.records()[0];
    let liver = record.organ(1).unwrap();
    let candidates = store.candidates(0, 1).unwrap();
    assert!(!candidates.is_empty() && candidates.len() <= 4096);
    assert_eq!(liver.holds_mm, 2.0 * candidates[0].depth_mm);
    assert!(store.candidates(0, 3).unwrap().is_empty());
    assert_eq!(
        (record.patient.as_str(), record.labels_by.as_str()),
        ("patient of a", "")
    );
    assert_eq!(record.fingerprint.as_bytes(), [1, 2, 3]);
    assert_eq!(record.tumours.len(), 1);
    assert!((record.tumours[0].contrast_hu + 40.0).abs() < 2.0);
    let voxel = candidates[0].voxel.map(i64::from);
    assert_eq!(
        store.read(0, Region::centred(voxel, [1; 3])).unwrap().labels[[0, 0, 0]],
        1
    );
    let far = Region {
        start: [i64::MAX - 1; 3],
        size: [4; 3],
    };
    assert!(store.read(0, far).unwrap_err().to_string().contains("too far"));
    let outside = store.read(0, Region::centred([-50; 3], [4; 3])).unwrap();
    assert!(outside.image.iter().all(|hu| *hu == AIR_HU) && outside.labels.iter().all(|label| *label == 0));
}

#[test]
fn patient_labeller_and_fingerprint_are_kept_and_no_part_of_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let writer = StoreWriter::create(dir.path(), &plan()).unwrap();
    let before = writer.write(case("a", [8; 3])).unwrap();
    let input = CaseInput {
        patient: "somebody".into(),
        labels_by: "pseudo:0123".into(),
        fingerprint: Fingerprint::from_bytes(vec![9; MAX_FINGERPRINT_BYTES]).unwrap(),
        ..case("a", [8; 3])
    };
    let after = writer.write(input).unwrap();
    assert_eq!(after.content_hash, before.content_hash);
    writer.finish().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let record = &store.records()[0];
    assert_eq!(*record, after);
    assert_eq!(
        (record.patient.as_str(), record.labels_by.as_str()),
        ("somebody", "pseudo:0123")
    );
    assert_eq!(record.fingerprint.as_bytes(), [9; MAX_FINGERPRINT_BYTES]);
}

#[test]
fn a_damaged_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    store_of(dir.path(), &[("a", [8, 8, 8])], Compression::Zstd);
    let path = dir.path().join("index.bin");
    let whole = std::fs::read(&path).unwrap();
    for at in [0, 8, 12, 17, 30, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = Store::open(dir.path())
            .err()
            .expect("a flipped byte must be seen")
            .to_string();
        assert!(error.contains("index.bin"), "{error}");
    }
    std::fs::write(&path, &whole[..40]).unwrap();
    assert!(Store::open(dir.path()).is_err());
    assert!(
        Store::open(dir.path().join("nowhere"))
            .err()
            .unwrap()
            .to_string()
            .contains("nowhere")
    );
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The golden store: uncompressed, so that no release of a compression library changes it.
fn write_golden(dir: &Path) {
    store_of(dir, &[("golden", [5, 18, 34])], Compression::Raw);
}

#[test]
fn the_layout_never_changes() {
    let dir = tempfile::tempdir().unwrap();
    write_golden(dir.path());
    for (written, kept) in [
        ("cases/golden.ftc", "store-v3.ftc"),
        ("index.bin", "store-v3.index.bin"),
    ] {
        let written = std::fs::read(dir.path().join(written)).unwrap();
        assert!(
            written == std::fs::read(golden(kept)).unwrap(),
            "{kept} differs: raise the layout's version"
        );
    }
    // The kept bytes open, too.
    std::fs::copy(golden("store-v3.ftc"), file_of(dir.path(), "golden")).unwrap();
    std::fs::copy(golden("store-v3.index.bin"), dir.path().join("index.bin")).unwrap();
    let crop = Store::open(dir.path())
        .unwrap()
        .read(0, Region::whole([5, 18, 34]))
        .unwrap();
    let input = case("golden", [5, 18, 34]);
    assert_eq!((crop.image, crop.labels), (input.image, input.labels));
}

/// Writes the golden bytes; run it once for a new layout version.
#[test]
#[ignore = "writes tests/golden"]
fn write_golden_bytes() {
    let dir = tempfile::tempdir().unwrap();
    write_golden(dir.path());
    std::fs::copy(file_of(dir.path(), "golden"), golden("store-v3.ftc")).unwrap();
    std::fs::copy(dir.path().join("index.bin"), golden("store-v3.index.bin")).unwrap();
}
