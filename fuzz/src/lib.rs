//! What reads untrusted files and requests, under a fuzzer: no input may panic, overflow, hang or take memory that it does not hold.
//!
//! The modules are compiled from the server's sources without the networks, which would take a nightly compiler with
//! sanitizers half an hour to build and have nothing to do with files.

#[path = "../../src/digest.rs"]
pub mod digest;
#[path = "../../src/ingest/mod.rs"]
pub mod ingest;
#[path = "../../src/lesion/mod.rs"]
pub mod lesion;
#[path = "../../src/panic.rs"]
mod panic;
#[path = "../../src/rng.rs"]
pub mod rng;
#[path = "../../src/sampler/mod.rs"]
pub mod sampler;
#[path = "../../src/store/mod.rs"]
pub mod store;
#[path = "../../src/volume/mod.rs"]
pub mod volume;

pub mod stream;

pub mod synth;

pub mod wire;

use std::path::Path;
use std::sync::OnceLock;

use crate::store::{CaseInput, CaseKind, Cases, Compression, SourceGeometry, Store, StoreWriter};
use crate::volume::{Affine, Annotation, Grid, Plan, Region};

/// Volumes larger than this are opened and not read whole: what is declared must not decide how long an input takes.
const MAX_VOXELS: usize = 1 << 21;

/// Slices of one series; the one under test takes the place of the second.
const SLICES: [&[u8]; 4] = [
    include_bytes!("../../tests/golden/dicom/oblique/a.dcm"),
    include_bytes!("../../tests/golden/dicom/oblique/b.dcm"),
    include_bytes!("../../tests/golden/dicom/oblique/c.dcm"),
    include_bytes!("../../tests/golden/dicom/oblique/d.dcm"),
];

/// Returns a folder of this process in memory, made once.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let memory = Path::new("/dev/shm");
    FOLDER
        .get_or_init(|| match memory.is_dir() {
            true => tempfile::tempdir_in(memory).expect("memory takes a folder"),
            false => tempfile::tempdir().expect("the disk takes a folder"),
        })
        .path()
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("the folder takes a file");
}

/// Reads bytes as a NIfTI image and as labels.
pub fn nifti(bytes: &[u8]) {
    let path = folder().join("scan.nii");
    write(&path, bytes);
    if let Ok(scan) = ingest::nifti::read_image(&path)
        && scan.voxels.len() <= MAX_VOXELS
    {
        let oriented = ingest::orient::orient(scan);
        ingest::source_hash(&oriented.voxels);
        let grid = volume::resample::resampled_grid(&oriented.grid, [3.0; 3]);
        if grid.voxels() <= MAX_VOXELS {
            volume::resample::resample_image(&oriented.voxels, &oriented.grid, &grid);
        }
    }
    // Whatever it is: an answer, not a panic.
    drop(ingest::nifti::read_labels(&path));
}

/// Reads bytes as the second slice of a DICOM series.
pub fn dicom(bytes: &[u8]) {
    let series = folder().join("series");
    if !series.is_dir() {
        std::fs::create_dir(&series).expect("the folder takes a folder");
        for (slice, name) in SLICES.iter().zip(["a.dcm", "b.dcm", "c.dcm", "d.dcm"]) {
            write(&series.join(name), slice);
        }
    }
    write(&series.join("b.dcm"), bytes);
    if let Ok(scan) = ingest::dicom::read_series(&series) {
        ingest::orient::orient(scan);
    }
}

/// Reads bytes as the only case file of a store, or as its index where they begin like one.
pub fn store(bytes: &[u8]) {
    let dir = folder().join("store");
    let case = dir.join("cases/case.ftc");
    if bytes.starts_with(b"FTINDEX") {
        std::fs::create_dir_all(&dir).expect("the folder takes a folder");
        write(&dir.join("index.bin"), bytes);
        drop(Store::open(&dir));
        return;
    }
    // An index made of the file's own header, so that reading goes on past the comparison of both.
    std::fs::remove_file(dir.join("index.bin")).ok();
    let writer = StoreWriter::create(&dir, &Plan::default()).expect("the folder takes a store");
    write(&case, bytes);
    drop(writer.finish());
    if let Ok(store) = Store::open(&dir)
        && let Some(record) = store.records().first().cloned()
    {
        read_all(&store, &record);
    }
}

/// Reads bytes as a stream of frames, to its end or to the first that is damaged.
pub fn frame(bytes: &[u8]) {
    let mut source = bytes;
    while let Ok(Some(_)) = wire::reader::read(&mut source) {}
}

/// Reads bytes as a recipe or a delivery: what passes has a hash, and reads back as itself.
pub fn recipe(bytes: &[u8]) {
    if let Ok(recipe) = serde_json::from_slice::<stream::recipe::Recipe>(bytes)
        && recipe.validate().is_ok()
    {
        let text = serde_json::to_vec(&recipe).expect("a valid recipe is representable in JSON");
        let again: stream::recipe::Recipe = serde_json::from_slice(&text).expect("what was written reads back");
        assert_eq!(again.hash(), recipe.hash());
    }
    drop(serde_json::from_slice::<stream::delivery::Delivery>(bytes));
}

fn read_all(store: &Store, record: &store::CaseRecord) {
    for organ in 0..8 {
        drop(store.candidates(0, organ));
    }
    let whole = Region::whole(record.grid.shape);
    if whole.voxels() <= MAX_VOXELS {
        drop(store.read(0, whole));
        drop(store.verify(0));
    }
    drop(store.read(0, Region::centred([3, -2, 5], [9, 40, 17])));
}

/// Writes small stores and returns their case files and the index of one: what the fuzzer starts from.
pub fn store_seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (name, compression) in [("zstd", Compression::Zstd), ("raw", Compression::Raw)] {
        let dir = tempfile::tempdir().expect("the disk takes a folder");
        let writer = StoreWriter::create(dir.path(), &Plan::default()).expect("a store");
        writer.compression(compression).seed(dir.path(), name, &mut seeds);
    }
    seeds
}

impl StoreWriter {
    /// Writes one case and adds its file and the index.
    fn seed(self, dir: &Path, name: &str, seeds: &mut Vec<(String, Vec<u8>)>) {
        self.write(case()).expect("a case");
        self.finish().expect("an index");
        let read = |path: &str| std::fs::read(dir.join(path)).expect("written just now");
        seeds.push((format!("case-{name}"), read("cases/case.ftc")));
        seeds.push((format!("index-{name}"), read("index.bin")));
    }
}

/// A liver with a tumour in it, in a volume of more than one chunk along every axis.
fn case() -> CaseInput {
    let shape = [17, 17, 33];
    let affine = Affine::axis_aligned([1.5; 3], [0.0; 3]);
    let distance = |z: usize, y: usize, x: usize| z.abs_diff(9).max(y.abs_diff(9)).max(x.abs_diff(16));
    CaseInput {
        id: "case".into(),
        kind: CaseKind::Labelled,
        grid: Grid { shape, affine },
        annotation: Annotation {
            classes: vec!["liver".into(), "liver_tumour".into()],
            assumed_tumour_free: false,
        },
        patient: "patient".into(),
        labels_by: String::new(),
        source_hash: digest::Digest::of(b"seed"),
        fingerprint: volume::Fingerprint::default(),
        source: SourceGeometry {
            shape_xyz: [33, 17, 17],
            affine_xyz: affine.0,
            orientation: "RAS".into(),
        },
        image: ndarray::Array3::from_shape_fn(shape, |(z, y, x)| 90 + ((z * 7 + y * 3 + x) % 9) as i16),
        labels: ndarray::Array3::from_shape_fn(shape, |(z, y, x)| match distance(z, y, x) {
            0..3 => 2,
            3..8 => 1,
            _ => 0,
        }),
    }
}
