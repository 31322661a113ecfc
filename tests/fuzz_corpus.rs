//! Reads the fuzzers' corpora with the readers that the server uses: an answer or an error that names the file, no panic.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::{Path, PathBuf};

use freetumor::ingest::{dicom, nifti};
use freetumor::store::{Store, StoreWriter};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::recipe::Recipe;
use freetumor::volume::Plan;
use freetumor::wire::reader;

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus of {target}");
    files
}

fn names(error: &dyn std::error::Error, path: &Path) {
    let (said, name) = (error.to_string(), path.file_name().unwrap().to_string_lossy());
    assert!(said.contains(&*name), "{said}");
}

#[test]
fn nifti_files_are_read_or_refused_by_name() {
    for path in corpus("nifti") {
        nifti::read_image(&path).map_or_else(|error| names(&error, &path), drop);
        nifti::read_labels(&path).map_or_else(|error| names(&error, &path), drop);
    }
}

#[test]
fn dicom_series_with_a_strange_slice_are_read_or_refused() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dicom/oblique");
    for path in corpus("dicom") {
        let series = tempfile::tempdir().unwrap();
        for name in ["a.dcm", "c.dcm", "d.dcm"] {
            std::fs::copy(golden.join(name), series.path().join(name)).unwrap();
        }
        std::fs::copy(&path, series.path().join("b.dcm")).unwrap();
        dicom::read_series(series.path()).map_or_else(|error| names(&error, series.path()), drop);
    }
}

#[test]
fn store_files_of_lying_checksums_are_damage() {
    for path in corpus("store") {
        let dir = tempfile::tempdir().unwrap();
        let writer = StoreWriter::create(dir.path(), &Plan::default()).unwrap();
        std::fs::copy(&path, dir.path().join("cases/case.ftc")).unwrap();
        let finished = writer.finish().unwrap();
        assert_eq!(finished.cases + finished.damaged.len(), 1);
        std::fs::copy(&path, dir.path().join("index.bin")).unwrap();
        Store::open(dir.path()).map_or_else(|error| names(&error, Path::new("index.bin")), drop);
    }
}

#[test]
fn frames_are_read_or_refused() {
    for path in corpus("frame") {
        let bytes = std::fs::read(&path).unwrap();
        let mut source = &bytes[..];
        while let Ok(Some(_)) = reader::read(&mut source) {}
    }
}

#[test]
fn recipes_and_deliveries_are_read_or_refused_and_read_back_as_themselves() {
    for path in corpus("recipe") {
        let bytes = std::fs::read(&path).unwrap();
        if let Ok(recipe) = serde_json::from_slice::<Recipe>(&bytes)
            && recipe.validate().is_ok()
        {
            let text = serde_json::to_vec(&recipe).unwrap();
            assert_eq!(serde_json::from_slice::<Recipe>(&text).unwrap().hash(), recipe.hash());
        }
        drop(serde_json::from_slice::<Delivery>(&bytes));
    }
}
