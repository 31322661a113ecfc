//! Files as nibabel reads them, written and read again.

use freetumor::ingest::nifti::{Scan, read_image, read_image_as, read_labels, write_image};
use freetumor::ingest::orient::orient;
use freetumor::ingest::{IngestConfig, NotFinite, source_hash};
use ndarray::Array3;
use serde_json::Value;

use super::{Files, golden, patient};

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
