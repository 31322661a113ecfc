//! Ingest through its public API: what nibabel makes of small files, real CT, and every kind of bad input.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]
#![expect(clippy::print_stderr, reason = "a skipped test says so")]

use std::path::{Path, PathBuf};

use freetumor::ingest::nifti::{Scan, read_image, read_image_as, read_labels, write_image, write_labels};
use freetumor::ingest::orient::orient;
use freetumor::ingest::regrid::regrid_labels;
use freetumor::ingest::{
    IngestConfig, IngestReport, IngestRequest, LabelGrid, NotFinite, Preset, Shard, Status, datalist, ingest,
    source_hash,
};
use freetumor::store::{CaseKind, Cases, Store};
use freetumor::volume::{AIR_HU, Affine, Grid, Plan, Region};
use ndarray::{Array3, s};
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ingest")
}

#[test]
fn every_orientation_type_and_version_reads_as_nibabel_reads_it() {
    let text = std::fs::read_to_string(golden().join("expected.json")).unwrap();
    let expected: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    assert!(expected.len() >= 60);
    for (name, expected) in &expected {
        let oriented = orient(read_image(&golden().join(name)).unwrap_or_else(|error| panic!("{error}")));
        let numbers = |key: &str| -> Vec<i64> {
            let list = expected[key].as_array().unwrap();
            list.iter().map(|v| v.as_i64().unwrap()).collect()
        };
        let shape: Vec<i64> = oriented.grid.shape.iter().map(|side| *side as i64).collect();
        assert_eq!(shape, numbers("shape"), "{name}");
        let voxels: Vec<i64> = oriented.voxels.iter().map(|hu| i64::from(*hu)).collect();
        assert_eq!(voxels, numbers("voxels"), "{name}");
        for (row, line) in oriented.grid.affine.0.iter().enumerate() {
            for (column, value) in line.iter().enumerate() {
                let nibabel = expected["affine"][row][column].as_f64().unwrap();
                // The files hold single precision; quaternions amplify its rounding a little.
                assert!(
                    (value - nibabel).abs() < 2e-5,
                    "{name} {row} {column}: {value} {nibabel}"
                );
            }
        }
        assert_eq!(
            oriented.source.orientation,
            expected["axcodes"].as_str().unwrap(),
            "{name}"
        );
        assert_eq!(
            source_hash(&oriented.voxels).to_string(),
            expected["source_hash"].as_str().unwrap(),
            "{name}"
        );
    }
}

#[test]
fn oblique_and_sheared_axes_turn_as_nibabel_turns_them() {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(golden().join("affines.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 100);
    for (number, case) in cases.iter().enumerate() {
        let matrix = |key: &str| -> [[f64; 4]; 4] { serde_json::from_value(case[key].clone()).unwrap() };
        let scan = Scan {
            affine_xyz: matrix("given"),
            // nibabel's [i, j, k] of 0 to 23 with k fastest.
            voxels: Array3::from_shape_fn([4, 3, 2], |(k, j, i)| (12 * i + 4 * j + k) as i16),
        };
        let oriented = orient(scan);
        assert_eq!(
            oriented.source.orientation,
            case["axcodes"].as_str().unwrap(),
            "{number}"
        );
        let voxels: Vec<i16> = oriented.voxels.iter().copied().collect();
        assert_eq!(serde_json::json!(voxels), case["voxels"], "{number}");
        for (ours, nibabel) in oriented
            .grid
            .affine
            .0
            .iter()
            .flatten()
            .zip(matrix("affine").iter().flatten())
        {
            // Both are double precision; an origin of hundreds of mm comes from one product and one sum.
            assert!((ours - nibabel).abs() < 1e-10, "{number}: {ours} {nibabel}");
        }
    }
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
fn what_was_written_is_what_is_read() {
    let files = Files::new();
    let (image_path, label_path) = files.good("a");
    let (image, labels, grid) = patient();
    let read = orient(read_image(&image_path).unwrap());
    assert_eq!((&read.voxels, read.grid), (&image, grid));
    assert_eq!(orient(read_labels(&label_path).unwrap()).voxels, labels);
}

#[test]
fn slope_and_intercept_scale_unless_the_slope_is_zero_or_no_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scaled.nii");
    let (image, _, grid) = patient();
    write_image(&path, image.view(), &grid).unwrap();
    let plain = read_image(&path).unwrap().voxels;
    let bytes = std::fs::read(&path).unwrap();
    // NIfTI-1: y = slope x + inter where scl_slope (byte 112, f32) is neither 0 nor NaN, else the values as stored.
    let read = |slope: f32, intercept: f32| {
        let mut scaled = bytes.clone();
        scaled[112..116].copy_from_slice(&slope.to_le_bytes());
        scaled[116..120].copy_from_slice(&intercept.to_le_bytes());
        std::fs::write(&path, scaled).unwrap();
        read_image(&path).unwrap().voxels
    };
    let scaled =
        |slope: f64, intercept: f64| plain.mapv(|hu| (slope * f64::from(hu) + intercept).round_ties_even() as i16);
    assert_eq!(read(1.0, 0.0), plain);
    assert_eq!(read(0.5, -10.25), scaled(0.5, -10.25));
    assert_eq!(read(-1.0, 24.0), scaled(-1.0, 24.0));
    for (slope, intercept) in [(0.0, 0.0), (0.0, -1024.0), (f32::NAN, 0.0), (f32::NAN, f32::NAN)] {
        assert_eq!(read(slope, intercept), plain, "slope {slope}, intercept {intercept}");
    }
}

#[test]
fn one_bad_case_does_not_stop_the_others_and_a_second_run_skips() {
    let files = Files::new();
    files.good("a");
    files.good("b");
    std::fs::write(files.path("broken.nii.gz"), b"nothing").unwrap();
    let list = serde_json::json!({
        "training": [{"image": "a.nii.gz", "label": "a_seg.nii.gz"}, "broken.nii.gz", "missing.nii.gz"],
        "unlabeled": [{"image": "b.nii.gz", "label": "b_seg.nii.gz"}, {"image": "b.nii.gz", "id": "bare"}],
    });
    let report = files.ingest("lits", &list);
    let statuses: Vec<_> = report.cases.iter().map(|case| case.status).collect();
    use Status::{Ok, Refused, Skipped};
    assert_eq!(statuses, [Ok, Refused, Refused, Ok, Ok]);
    assert!(report.cases[1].reason.as_ref().unwrap().contains("broken.nii.gz"));
    assert!(report.cases[2].reason.as_ref().unwrap().contains("missing.nii.gz"));
    assert!(report.cases[4].warnings[0].contains("no organ labels: stored, refused as a host"));
    assert!(
        report.cases[3]
            .warnings
            .iter()
            .any(|warning| warning.contains("1 tumours"))
    );
    let store = Store::open(files.path("store")).unwrap();
    let case = store.find("a").unwrap();
    let record = &store.records()[case];
    assert_eq!((record.kind, record.tumours.len()), (CaseKind::Labelled, 1));
    assert_eq!(record.tumours[0].contrast_hu, -60.0);
    let unlabelled = &store.records()[store.find("b").unwrap()];
    assert_eq!(unlabelled.kind, CaseKind::Unlabelled);
    assert_eq!(unlabelled.annotation.classes, ["liver"]);
    assert!(unlabelled.annotation.assumed_tumour_free);
    assert!(
        store.records()[store.find("bare").unwrap()]
            .annotation
            .classes
            .is_empty()
    );
    let stored = report.cases[0].stored.as_ref().unwrap();
    assert_eq!(
        (stored.source_shape, stored.source_spacing_mm),
        ([32, 30, 24], [3.0; 3])
    );
    assert_eq!(
        (stored.source_orientation.as_str(), stored.shape),
        ("RAS", [24, 29, 31])
    );
    // 27 mm3 a voxel: 12 x 12 x 14 of them, 27 of which are tumour.
    assert_eq!(stored.organs_ml["liver"], (2016 - 27) as f64 * 0.027);
    assert_eq!(stored.tumours, 1);
    assert!(report.cases[0].seconds > 0.0 && report.cases[1].stored.is_none());
    // The air around the body is cropped to a margin of 10 mm, four voxels; the affine follows.
    assert_eq!(record.grid.shape, [24, 29, 31]);
    assert_eq!(record.grid.affine.to_mm([0.0; 3]), [-37.0, -27.0, 100.0]);
    let snapshot = store.snapshot();
    let modified = |name: &str| std::fs::metadata(files.path(name)).unwrap().modified().unwrap();
    let before = modified("store/cases/a.ftc");
    let again = files.ingest("lits", &list);
    let statuses: Vec<_> = again.cases.iter().map(|case| case.status).collect();
    assert_eq!(statuses, [Skipped, Refused, Refused, Skipped, Skipped]);
    assert_eq!(again.cases[4].warnings, report.cases[4].warnings);
    assert_eq!(modified("store/cases/a.ftc"), before);
    assert_eq!(Store::open(files.path("store")).unwrap().snapshot(), snapshot);
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

#[test]
fn labels_on_another_grid_become_what_nibabel_makes_of_them() {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(golden().join("regrid.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 12);
    for (number, case) in cases.iter().enumerate() {
        let scan = |voxels: &str, name: &str| {
            let [i, j, k]: [usize; 3] = serde_json::from_value(case[format!("{name}_shape")].clone()).unwrap();
            let values: Vec<u8> = serde_json::from_value(case[voxels].clone()).unwrap();
            orient(Scan {
                affine_xyz: serde_json::from_value(case[format!("{name}_affine")].clone()).unwrap(),
                voxels: Array3::from_shape_vec([k, j, i], values).unwrap(),
            })
        };
        let expected = scan("expected", "image");
        let regridded = regrid_labels(&scan("labels", "labels"), &expected.grid);
        assert_eq!(regridded.voxels, expected.voxels, "{number}");
    }
}

#[test]
fn labels_on_another_grid_are_resampled_on_request() {
    let files = Files::new();
    files.good("a");
    let (_, ids, grid) = patient();
    // Shifted by eight voxels to the head: the two uppermost planes of labels lie outside the image.
    let moved = Grid {
        shape: [18, 30, 32],
        affine: grid.affine.shifted([8, 0, 0]),
    };
    write_labels(&files.path("moved.nii.gz"), ids.slice(s![..18, .., ..]), &moved).unwrap();
    let list = serde_json::json!({"training": [{"image": "a.nii.gz", "label": "moved.nii.gz"}]});
    assert_eq!(files.ingest("lits", &list).cases[0].status, Status::Refused);
    let options = IngestConfig {
        label_grid: LabelGrid::Resample,
        ..IngestConfig::default()
    };
    let report = files.ingest_as(options, "lits", &list);
    // 12 planes of labels, at 14 to 25 of 24.
    assert_eq!(
        report.cases[0].warnings,
        [
            "labels of [18, 30, 32] voxels resampled to the image's [24, 30, 32] (z, y, x): 16.67 % of 2016 labelled voxels \
          lie outside"
        ]
    );
    let store = Store::open(files.path("store")).unwrap();
    let record = &store.records()[store.find("a").unwrap()];
    assert_eq!(record.tumours[0].voxels, 27);
    assert_eq!(record.organ(1).unwrap().voxels, 10 * 12 * 14 - 27);
    // Labels of another patient, beside the image: nothing of them is a healthy liver.
    let far = Grid {
        affine: grid.affine.shifted([500, 0, 0]),
        ..moved
    };
    write_labels(&files.path("moved.nii.gz"), ids.slice(s![..18, .., ..]), &far).unwrap();
    let options = IngestConfig {
        label_grid: LabelGrid::Resample,
        ..IngestConfig::default()
    };
    let report = files.ingest_as(options, "lits", &list);
    let reason = report.cases[0].reason.clone().unwrap();
    assert!(
        reason.contains("moved.nii.gz") && reason.contains("labelled voxels lie outside the image"),
        "{reason}"
    );
}

#[test]
fn voxels_that_are_no_numbers_are_air_on_request_and_a_header_that_contradicts_itself_is_named() {
    let files = Files::new();
    let (hu, _, grid) = patient();
    write_image(&files.path("plain.nii"), hu.view(), &grid).unwrap();
    let mut floats = std::fs::read(files.path("plain.nii")).unwrap()[..352].to_vec();
    floats[70..74].copy_from_slice(&[16, 0, 32, 0]);
    // pixdim says 5 mm along i.
    floats[80..84].copy_from_slice(&5_f32.to_le_bytes());
    floats.extend(hu.iter().enumerate().flat_map(|(n, hu)| {
        let value = if n % 1000 == 0 { f32::INFINITY } else { f32::from(*hu) };
        value.to_le_bytes()
    }));
    std::fs::write(files.path("float.nii"), floats).unwrap();
    assert!(
        files
            .refusal("float.nii", None)
            .contains("24 voxels are NaN or infinite; `ingest.not_finite")
    );
    let options = IngestConfig {
        not_finite: NotFinite::Air,
        ..IngestConfig::default()
    };
    let report = files.ingest_as(options, "lits", &serde_json::json!({"training": ["float.nii"]}));
    assert_eq!(
        report.cases[0].warnings[..2],
        [
            "voxels of 5.0000 x 3.0000 x 3.0000 mm by pixdim and of 3.0000 x 3.0000 x 3.0000 mm by the sform: the sform counts",
            "24 voxels are NaN or infinite: read as air",
        ]
    );
}

#[test]
fn of_several_volumes_one_must_be_chosen() {
    let files = Files::new();
    let (hu, _, grid) = patient();
    write_image(&files.path("plain.nii"), hu.view(), &grid).unwrap();
    let plain = std::fs::read(files.path("plain.nii")).unwrap();
    let mut series = plain[..352].to_vec();
    series[40..42].copy_from_slice(&4_u16.to_le_bytes());
    series[48..50].copy_from_slice(&3_u16.to_le_bytes());
    for shift in 0..3_i16 {
        series.extend(hu.iter().flat_map(|hu| (hu + shift).to_le_bytes()));
    }
    std::fs::write(files.path("series.nii"), &series).unwrap();
    assert!(
        files
            .refusal("series.nii", None)
            .contains("a series of 3; `ingest.volume` chooses one")
    );
    let read = |name: &str, volume| {
        let options = IngestConfig {
            volume: Some(volume),
            ..IngestConfig::default()
        };
        read_image_as(&files.path(name), &options).map(|(scan, _)| orient(scan).voxels)
    };
    for volume in 0..3 {
        let shift = i16::try_from(volume).unwrap();
        assert_eq!(read("series.nii", volume).unwrap(), hu.mapv(|hu| hu + shift));
    }
    assert_eq!(read("plain.nii", 2).unwrap(), hu);
    assert!(
        read("series.nii", 3)
            .unwrap_err()
            .to_string()
            .contains("ingest.volume: expected below 3, got 3")
    );
    std::fs::write(files.path("cut.nii"), &series[..series.len() - 2]).unwrap();
    assert!(
        read("cut.nii", 0)
            .unwrap_err()
            .to_string()
            .contains("bytes of other volumes")
    );
}

#[test]
fn a_preset_that_does_not_fit_is_named_with_those_that_do() {
    let files = Files::new();
    files.good("a");
    let (image, mut labels, grid) = patient();
    // Livers without tumours: ids 0 and 1 in three cases.
    labels.mapv_inplace(|id| id.min(1));
    let mut training = Vec::new();
    for name in ["x", "y", "z"] {
        write_image(&files.path(&format!("{name}.nii.gz")), image.view(), &grid).unwrap();
        write_labels(&files.path(&format!("{name}_seg.nii.gz")), labels.view(), &grid).unwrap();
        training.push(serde_json::json!({"image": format!("{name}.nii.gz"), "label": format!("{name}_seg.nii.gz")}));
    }
    let two = files.ingest("lits", &serde_json::json!({"training": training[..2]}));
    assert!(two.warnings.is_empty(), "{two:?}");
    let three = serde_json::json!({"training": training});
    let warning = "preset lits: liver_tumour occurs in none of 3 cases; the ids found are 0, 1; its ids look like \
                   msd-spleen, msd-colon, chaos";
    assert_eq!(files.ingest("lits", &three).warnings, [warning]);
    // A second run skips the cases and says the same; where nobody looked for tumours there is nothing to say.
    assert_eq!(files.ingest("lits", &three).warnings, [warning]);
    assert!(
        files
            .ingest("lits", &serde_json::json!({"unlabeled": training}))
            .warnings
            .is_empty()
    );
    // Ids that the preset lacks refuse the case, and point to a preset that has them.
    write_labels(
        &files.path("odd.nii.gz"),
        labels.mapv(|id| [0, 3][usize::from(id)]).view(),
        &grid,
    )
    .unwrap();
    let reason = files.refusal("a.nii.gz", Some("odd.nii.gz"));
    assert!(reason.ends_with("which knows 0, 1, 2"), "{reason}");
    let ids: Array3<u8> = Array3::from_shape_fn(labels.dim(), |(_, _, x)| (x % 14) as u8);
    write_labels(&files.path("flare.nii.gz"), ids.view(), &grid).unwrap();
    let reason = files.refusal("a.nii.gz", Some("flare.nii.gz"));
    assert!(
        reason.contains("knows 0, 1, 2; its ids look like flare22, btcv"),
        "{reason}"
    );
}

#[test]
fn bad_volumes_are_refused_by_name() {
    let files = Files::new();
    let (image, _) = files.good("a");
    // Truncated gzip, a flipped byte in it, and a header that declares more than there is.
    let bytes = std::fs::read(&image).unwrap();
    std::fs::write(files.path("cut.nii.gz"), &bytes[..bytes.len() / 2]).unwrap();
    let reason = files.refusal("cut.nii.gz", None);
    assert!(
        reason.contains("cut.nii.gz: truncated: expected 46080 bytes of voxels"),
        "{reason}"
    );
    let mut flipped = bytes.clone();
    let last = flipped.len() - 6;
    flipped[last] ^= 1;
    std::fs::write(files.path("crc.nii.gz"), flipped).unwrap();
    assert!(files.refusal("crc.nii.gz", None).contains("crc.nii.gz: cannot read"));
    let (hu, _, grid) = patient();
    write_image(&files.path("plain.nii"), hu.view(), &grid).unwrap();
    let plain = std::fs::read(files.path("plain.nii")).unwrap();
    let variant = |name: &str, at: usize, value: &[u8]| {
        let mut bytes = plain.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        std::fs::write(files.path(name), bytes).unwrap();
        files.refusal(name, None)
    };
    assert!(variant("long.nii", 46, &2000_u16.to_le_bytes()).contains("truncated: expected"));
    assert!(variant("short.nii", 46, &20_u16.to_le_bytes()).contains("holds more than the"));
    assert!(variant("huge.nii", 46, &30_000_u16.to_le_bytes()).contains("2 to 2048 voxels"));
    assert!(variant("flat.nii", 40, &2_u16.to_le_bytes()).contains("2-D image"));
    assert!(variant("type.nii", 70, &128_u16.to_le_bytes()).contains("datatype"));
    assert!(variant("magic.nii", 344, b"ni1\0").contains("magic"));
    assert!(variant("offset.nii", 108, &9e8_f32.to_le_bytes()).contains("vox_offset"));
    assert!(variant("affine.nii", 280, &f32::NAN.to_le_bytes()).contains("affine: expected finite"));
    assert!(variant("singular.nii", 280, &[0; 12]).contains("expected voxels of"));
    let parallel: Vec<u8> = [3_f32, 3.0, 0.0, 0.0, 3.0, 3.0, 0.0, 0.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    assert!(variant("plane.nii", 280, &parallel).contains("independent axes"));
    // The same bytes as floats: NaN among them.
    let mut floats = plain[..352].to_vec();
    floats[70..74].copy_from_slice(&[16, 0, 32, 0]);
    floats.extend(hu.iter().enumerate().flat_map(|(n, hu)| {
        let value = if n % 1000 == 0 { f32::NAN } else { f32::from(*hu) };
        value.to_le_bytes()
    }));
    std::fs::write(files.path("nan.nii"), floats).unwrap();
    assert!(files.refusal("nan.nii", None).contains("24 voxels are NaN or infinite"));
}

#[test]
fn bad_labels_are_refused_by_name() {
    let files = Files::new();
    files.good("a");
    let (_, ids, grid) = patient();
    // Labels: another shape, another place, an id of no meaning, a value that is no id.
    let small = ids.slice(s![..20, .., ..]);
    write_labels(
        &files.path("small.nii.gz"),
        small,
        &Grid {
            shape: [20, 30, 32],
            ..grid
        },
    )
    .unwrap();
    let reason = files.refusal("a.nii.gz", Some("small.nii.gz"));
    assert!(
        reason.contains("small.nii.gz") && reason.contains("a.nii.gz") && reason.contains("shape"),
        "{reason}"
    );
    let moved = Grid {
        affine: grid.affine.shifted([0, 0, 1]),
        ..grid
    };
    write_labels(&files.path("moved.nii.gz"), ids.view(), &moved).unwrap();
    assert!(
        files
            .refusal("a.nii.gz", Some("moved.nii.gz"))
            .contains("3.0000 mm away")
    );
    write_labels(&files.path("id.nii.gz"), ids.mapv(|id| 4 * id).view(), &grid).unwrap();
    let reason = files.refusal("a.nii.gz", Some("id.nii.gz"));
    assert!(
        reason.contains("id.nii.gz: label id 4 is not in preset lits, which knows 0, 1, 2"),
        "{reason}"
    );
    assert!(
        files
            .refusal("a.nii.gz", Some("a.nii.gz"))
            .contains("expected label ids 0 to 255")
    );
}

#[test]
fn a_folder_of_masks_is_what_one_file_of_labels_is() {
    let files = Files::new();
    let (_, label_path) = files.good("a");
    let (_, labels, grid) = patient();
    // As TotalSegmentator writes them: its liver is 5, its right and left kidneys are 2 and 3, every structure has a file.
    let ids = labels.mapv(|label| [0, 5, 3][usize::from(label)]);
    write_labels(&label_path, ids.view(), &grid).unwrap();
    std::fs::create_dir(files.path("masks")).unwrap();
    let write = |name: &str, id: u8, grid: &Grid| {
        let mask = ids.mapv(|label| u8::from(label == id));
        write_labels(&files.path(&format!("masks/{name}.nii.gz")), mask.view(), grid).unwrap();
    };
    for (name, id) in [
        ("liver", 5),
        ("kidney_left", 3),
        ("kidney_right", 2),
        ("pancreas", 7),
        ("rib_left_1", 1),
    ] {
        write(name, id, &grid);
    }
    let list = serde_json::json!({"training": [
        {"image": "a.nii.gz", "label": "a_seg.nii.gz", "id": "one"}, {"image": "a.nii.gz", "label": "masks", "id": "many"},
    ]});
    let report = files.ingest("totalsegmentator", &list);
    assert!(report.cases.iter().all(|case| case.status == Status::Ok), "{report:?}");
    let store = Store::open(files.path("store")).unwrap();
    let [one, many] = ["one", "many"].map(|id| store.records()[store.find(id).unwrap()].content_hash);
    assert_eq!(one, many);
    assert_eq!(files.ingest("totalsegmentator", &list).count(Status::Skipped), 2);

    let reason = || {
        let report = files.ingest("totalsegmentator", &list);
        assert_eq!(report.cases[0].status, Status::Skipped);
        report.cases[1].reason.clone().unwrap()
    };
    write("pancreas", 5, &grid);
    assert!(
        reason().contains("masks/pancreas.nii.gz: 1989 voxels also lie in a mask"),
        "{}",
        reason()
    );
    let moved = Grid {
        affine: grid.affine.shifted([0, 1, 0]),
        ..grid
    };
    write("pancreas", 7, &moved);
    assert!(
        reason().contains("masks/pancreas.nii.gz: on another grid"),
        "{}",
        reason()
    );
    std::fs::remove_file(files.path("masks/pancreas.nii.gz")).unwrap();
    assert!(reason().contains("masks/pancreas.nii.gz: missing"), "{}", reason());
    // A preset that names no masks.
    let other = files.ingest(
        "lits",
        &serde_json::json!({"training": [{"image": "a.nii.gz", "label": "masks"}]}),
    );
    assert!(
        other.cases[0]
            .reason
            .as_ref()
            .unwrap()
            .contains("the preset names none")
    );
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

#[test]
fn a_gzip_bomb_is_not_unpacked() {
    use std::io::Write;
    let files = Files::new();
    let (hu, _, grid) = patient();
    write_image(&files.path("plain.nii"), hu.view(), &grid).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder
        .write_all(&std::fs::read(files.path("plain.nii")).unwrap())
        .unwrap();
    // 256 MiB of zeros behind the voxels: one byte of them is read.
    let zeros = vec![0; 1 << 20];
    (0..256).for_each(|_| encoder.write_all(&zeros).unwrap());
    std::fs::write(files.path("bomb.nii.gz"), encoder.finish().unwrap()).unwrap();
    let start = std::time::Instant::now();
    assert!(
        files
            .refusal("bomb.nii.gz", None)
            .contains("holds more than the 46080 bytes")
    );
    assert!(start.elapsed().as_millis() < 500, "{:?}", start.elapsed());
}

#[test]
fn another_plan_or_preset_is_refused_as_a_whole() {
    let files = Files::new();
    let (image, labels) = files.good("a");
    let request = |preset: &str| IngestRequest {
        entries: vec![datalist::single(&image, Some(&labels))],
        preset: Preset::named(preset).unwrap(),
        options: IngestConfig::default(),
        shard: Shard::default(),
    };
    ingest(&request("lits"), &files.path("store"), &files.plan, &|_| {}).unwrap();
    let other = Plan {
        spacing_mm: [2.0; 3],
        ..files.plan.clone()
    };
    let error = ingest(&request("lits"), &files.path("store"), &other, &|_| {})
        .unwrap_err()
        .to_string();
    assert!(error.contains("plan.spacing_mm"), "{error}");
}

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
