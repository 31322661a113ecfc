//! Ingest through its public API: what nibabel makes of small files, real CT, and every kind of bad input.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]
#![expect(clippy::print_stderr, reason = "a skipped test says so")]

mod labels;
mod reading;
mod real;
mod refusals;

use std::path::{Path, PathBuf};

use freetumor::ingest::nifti::{read_image, write_image, write_labels};
use freetumor::ingest::orient::orient;
use freetumor::ingest::{IngestConfig, IngestReport, IngestRequest, Preset, Shard, Status, datalist, ingest};
use freetumor::store::{Cases, Store};
use freetumor::volume::{Affine, Grid, Plan};
use ndarray::{Array3, s};
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ingest")
}

/// A patient of 3 mm voxels: air, a body, a liver, a tumour.
fn patient() -> (Array3<i16>, Array3<u8>, Grid) {
    let shape = [24, 30, 32];
    let mut labels = Array3::zeros(shape);
    labels.slice_mut(s![6..18, 10..22, 10..24]).fill(1);
    labels.slice_mut(s![10..13, 13..16, 14..17]).fill(2);
    let mut image = Array3::from_elem(shape, -1000_i16);
    image.slice_mut(s![.., 5..26, 5..28]).fill(-50);
    image.zip_mut_with(&labels, |hu, label| match label {
        1 => *hu = 90,
        2 => *hu = 30,
        _ => {}
    });
    let grid = Grid {
        shape,
        affine: Affine::axis_aligned([3.0; 3], [-40.0, -30.0, 100.0]),
    };
    (image, labels, grid)
}

struct Files {
    dir: tempfile::TempDir,
    plan: Plan,
}

impl Files {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            plan: Plan {
                spacing_mm: [3.0; 3],
                patch: [16; 3],
                ..Plan::default()
            },
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn good(&self, name: &str) -> (PathBuf, PathBuf) {
        let (image, labels, grid) = patient();
        let paths = (
            self.path(&format!("{name}.nii.gz")),
            self.path(&format!("{name}_seg.nii.gz")),
        );
        write_image(&paths.0, image.view(), &grid).unwrap();
        write_labels(&paths.1, labels.view(), &grid).unwrap();
        paths
    }

    fn ingest(&self, preset: &str, list: &Value) -> IngestReport {
        self.ingest_as(IngestConfig::default(), preset, list)
    }

    fn ingest_as(&self, options: IngestConfig, preset: &str, list: &Value) -> IngestReport {
        let path = self.path("dataset.json");
        std::fs::write(&path, list.to_string()).unwrap();
        let request = IngestRequest {
            entries: datalist::read(&path).unwrap(),
            preset: Preset::named(preset).unwrap(),
            options,
            shard: Shard::default(),
        };
        ingest(&request, &self.path("store"), &self.plan, &|_| {}).unwrap()
    }

    /// Ingests one pair that must be refused, and returns why.
    fn refusal(&self, image: &str, label: Option<&str>) -> String {
        let report = self.ingest(
            "lits",
            &serde_json::json!({"training": [{"image": image, "label": label}]}),
        );
        assert_eq!(report.cases[0].status, Status::Refused, "{report:?}");
        report.cases[0].reason.clone().unwrap()
    }
}

#[test]
fn shards_together_are_the_whole() {
    let files = Files::new();
    let names = ["a", "b", "c"];
    let pairs = names.map(|name| files.good(name));
    let entries: Vec<_> = pairs
        .iter()
        .map(|(image, labels)| datalist::single(image, Some(labels)))
        .collect();
    let run = |dir: &str, shard: Shard| {
        let request = IngestRequest {
            entries: entries.clone(),
            preset: Preset::named("lits").unwrap(),
            options: IngestConfig::default(),
            shard,
        };
        ingest(&request, &files.path(dir), &files.plan, &|_| {}).unwrap()
    };
    assert_eq!(run("whole", Shard::default()).indexed, 3);
    assert_eq!(run("parts", Shard { index: 1, count: 2 }).cases.len(), 1);
    assert_eq!(run("parts", Shard { index: 0, count: 2 }).indexed, 3);
    let snapshot = |dir: &str| Store::open(files.path(dir)).unwrap().snapshot();
    assert_eq!(snapshot("whole"), snapshot("parts"));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 400, ..Default::default() })]
    /// Headers of random content: an error or a volume, never a panic or a huge allocation.
    #[test]
    fn a_lying_header_is_no_danger(at in 0_usize..540, value in proptest::prelude::any::<[u8; 8]>(), version in 1..3) {
        let dir = tempfile::tempdir().unwrap();
        let name = if version == 1 { "uncompressed.nii" } else { "nifti2-big.nii" };
        let mut bytes = std::fs::read(golden().join(name)).unwrap();
        let at = at.min(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&value);
        let path = dir.path().join("lie.nii");
        std::fs::write(&path, bytes).unwrap();
        match read_image(&path) {
            Ok(scan) => drop(orient(scan)),
            Err(error) => assert!(error.to_string().contains("lie.nii"), "{error}"),
        }
    }
}
