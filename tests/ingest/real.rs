//! Real CT.

use std::path::{Path, PathBuf};

use freetumor::ingest::nifti::read_image;
use freetumor::ingest::{IngestConfig, IngestReport, IngestRequest, Preset, Shard, Status, datalist, ingest};
use freetumor::store::{CaseKind, Cases, Store};
use freetumor::volume::{AIR_HU, Plan, Region};

fn real(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn ingest_real(preset: &str, image: &Path, labels: Option<&Path>, plan: &Plan) -> (tempfile::TempDir, IngestReport) {
    let dir = tempfile::tempdir().unwrap();
    let request = IngestRequest {
        entries: vec![datalist::single(image, labels)],
        preset: Preset::named(preset).unwrap(),
        options: IngestConfig::default(),
        shard: Shard::default(),
    };
    let report = ingest(&request, dir.path(), plan, &|_| {}).unwrap();
    assert_eq!(report.cases[0].status, Status::Ok, "{report:?}");
    (dir, report)
}

#[test]
fn a_real_ct_with_organs_is_ingested() {
    let (Some(image), Some(labels)) = (
        real("totalsegmentator/example_ct_sm.nii.gz"),
        real("totalsegmentator/example_seg.nii.gz"),
    ) else {
        return;
    };
    // At the source spacing and at the default one; the liver is 1043 mL in the file.
    for spacing_mm in [3.0, 1.5] {
        let plan = Plan {
            spacing_mm: [spacing_mm; 3],
            ..Plan::default()
        };
        let (dir, _) = ingest_real("totalsegmentator", &image, Some(&labels), &plan);
        let store = Store::open(dir.path()).unwrap();
        let record = &store.records()[0];
        let volume_ml = |id: u8| record.organ(id).unwrap().voxels as f64 * spacing_mm.powi(3) / 1000.0;
        assert!((volume_ml(1) - 1043.0).abs() < 2.0, "{}", volume_ml(1));
        assert!((volume_ml(3) - 644.0 * 0.027).abs() < 0.2, "{}", volume_ml(3));
        assert!(record.organ(5).is_some() && record.tumours.is_empty());
        assert!(record.organ(1).unwrap().holds_mm > 50.0 && record.organ(3).unwrap().holds_mm < 30.0);
        assert_eq!(record.kind, CaseKind::Unlabelled);
        // HU of the organs, so that axes and values are right: this scan is without contrast medium.
        let crop = store.read(0, Region::whole(record.grid.shape)).unwrap();
        let mean = |id: u8| {
            let inside = crop.image.iter().zip(&crop.labels).filter(|(_, label)| **label == id);
            let (sum, count) = inside.fold((0.0, 0.0), |(sum, count), (hu, _)| (sum + f64::from(*hu), count + 1.0));
            sum / count
        };
        assert!((30.0..75.0).contains(&mean(1)), "liver {}", mean(1));
        assert!((5.0..25.0).contains(&mean(5)), "kidney {}", mean(5));
        // The liver lies to the right: its mean x is above that of the pancreas.
        let mean_x = |id: u8| {
            let places = crop.labels.indexed_iter().filter(|(_, label)| **label == id);
            let (sum, count) = places.fold((0, 0), |(sum, count), ((_, _, x), _)| (sum + x, count + 1));
            sum / count
        };
        assert!(mean_x(1) > mean_x(3));
        for organ in [1, 3, 5] {
            let candidates = store.candidates(0, organ).unwrap();
            assert!(!candidates.is_empty());
            for candidate in candidates.iter().step_by(50) {
                assert_eq!(crop.labels[candidate.voxel.map(usize::from)], organ);
            }
        }
    }
}

#[test]
fn a_real_ct_without_labels_and_with_padding_is_ingested() {
    let Some(image) = real("crlm/crlm_ct_1006.nii.gz") else {
        return;
    };
    let raw = read_image(&image).unwrap();
    assert!(raw.voxels.iter().any(|hu| *hu == -3024));
    let (dir, report) = ingest_real("lits", &image, None, &Plan::default());
    assert!(
        report.cases[0]
            .warnings
            .iter()
            .any(|warning| warning.contains("no organ labels"))
    );
    let store = Store::open(dir.path()).unwrap();
    let record = &store.records()[0];
    assert_eq!(record.grid.shape[0], 170); // 51 slices of 5 mm at 1.5 mm
    let crop = store.read(0, Region::whole(record.grid.shape)).unwrap();
    assert_eq!(crop.image.iter().min(), Some(&AIR_HU));
    // The mean of a small box in the middle of the body is soft tissue, not padding that bled into it.
    let centre = record.grid.shape.map(|side| side as i64 / 2);
    let middle = store.read(0, Region::centred(centre, [5; 3])).unwrap();
    let mean = middle.image.iter().map(|hu| f64::from(*hu)).sum::<f64>() / 125.0;
    assert!((-200.0..400.0).contains(&mean), "{mean}");
}
