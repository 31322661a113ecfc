//! DICOM series: what pydicom and SimpleITK make of small ones, a real CT in both formats, and bad input.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

use std::path::{Path, PathBuf};

use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_dictionary_std::{tags, uids};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject, open_file};
use freetumor::digest::Digest;
use freetumor::ingest::dicom::read_series;
use freetumor::ingest::nifti::read_image;
use freetumor::ingest::orient::orient;
use freetumor::ingest::{Entry, IngestConfig, IngestRequest, Preset, Shard, Status, datalist, ingest, source_hash};
use freetumor::store::{Cases, Store};
use freetumor::volume::Plan;
use ndarray::Axis;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/dicom")
        .join(name)
}

/// Returns a folder with a copy of a golden series and another file.
fn copy_of(series: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(series)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(dir.path().join("LICENSE"), "not a slice").unwrap();
    dir
}

#[test]
fn series_read_as_simpleitk_and_pydicom_read_them() {
    let expected: Value = serde_json::from_slice(&std::fs::read(golden("expected.json")).unwrap()).unwrap();
    for (name, expected) in expected.as_object().unwrap() {
        let scan = read_series(copy_of(name).path()).unwrap();
        let voxels: Vec<i64> = scan.voxels.iter().map(|hu| i64::from(*hu)).collect();
        assert_eq!(serde_json::json!(voxels), expected["voxels"], "{name}");
        assert_eq!(serde_json::json!(scan.voxels.shape()), expected["shape"], "{name}");
        for (row, line) in scan.affine_xyz.iter().enumerate() {
            for (column, value) in line.iter().enumerate() {
                let other = expected["affine"][row][column].as_f64().unwrap();
                // Files hold six digits; SimpleITK makes its directions unit vectors at right angles again.
                assert!((value - other).abs() < 5e-6, "{name} {row} {column}: {value} {other}");
            }
        }
        assert_eq!(orient(scan).source.orientation, expected["axcodes"].as_str().unwrap());
    }
}

/// Whose series is written.
const PATIENT: &str = "Doe, Jane 1970";

/// Writes a series of one slice per plane, as scanners do: unsigned, intercept -1024 or what the HU need.
fn write_series(folder: &Path, scan: &freetumor::ingest::nifti::Scan<i16>) {
    let column = |j: usize| -> [f64; 3] { [-scan.affine_xyz[0][j], -scan.affine_xyz[1][j], scan.affine_xyz[2][j]] };
    let (i, j, k, origin) = (column(0), column(1), column(2), column(3));
    let length = |v: [f64; 3]| v.iter().map(|c| c * c).sum::<f64>().sqrt();
    let low = *scan.voxels.iter().min().unwrap();
    let strings = |values: &[f64]| PrimitiveValue::Strs(values.iter().map(|v| format!("{v:.9}")).collect());
    for (number, plane) in scan.voxels.axis_iter(Axis(0)).enumerate() {
        let position: Vec<f64> = (0..3).map(|a| origin[a] + number as f64 * k[a]).collect();
        let directions: Vec<f64> = (i.map(|c| c / length(i)).into_iter())
            .chain(j.map(|c| c / length(j)))
            .collect();
        let pixels: Vec<u16> = plane
            .iter()
            .map(|hu| (i32::from(*hu) - i32::from(low)) as u16)
            .collect();
        let uid = format!("1.2.826.0.1.3680043.8.498.{number}");
        let text = |tag, vr, value: &str| DataElement::new(tag, vr, PrimitiveValue::from(value));
        let short = |tag, value: u16| DataElement::new(tag, VR::US, PrimitiveValue::from(value));
        let object = InMemDicomObject::from_element_iter([
            text(tags::SOP_CLASS_UID, VR::UI, uids::CT_IMAGE_STORAGE),
            text(tags::SOP_INSTANCE_UID, VR::UI, &uid),
            text(tags::SERIES_INSTANCE_UID, VR::UI, "1.2.826.0.1.3680043.8.498.1"),
            text(tags::PATIENT_ID, VR::LO, PATIENT),
            text(tags::MODALITY, VR::CS, "CT"),
            text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "MONOCHROME2"),
            DataElement::new(tags::IMAGE_POSITION_PATIENT, VR::DS, strings(&position)),
            DataElement::new(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, strings(&directions)),
            DataElement::new(tags::PIXEL_SPACING, VR::DS, strings(&[length(j), length(i)])),
            DataElement::new(tags::RESCALE_SLOPE, VR::DS, strings(&[1.0])),
            DataElement::new(tags::RESCALE_INTERCEPT, VR::DS, strings(&[f64::from(low)])),
            short(tags::SAMPLES_PER_PIXEL, 1),
            short(tags::ROWS, plane.nrows() as u16),
            short(tags::COLUMNS, plane.ncols() as u16),
            short(tags::BITS_ALLOCATED, 16),
            short(tags::BITS_STORED, 16),
            short(tags::HIGH_BIT, 15),
            short(tags::PIXEL_REPRESENTATION, 0),
            DataElement::new(tags::PIXEL_DATA, VR::OW, PrimitiveValue::U16(pixels.into())),
        ]);
        let meta = FileMetaTableBuilder::new().transfer_syntax(uids::EXPLICIT_VR_LITTLE_ENDIAN);
        // Names that do not sort as positions do.
        let path = folder.join(format!("{}.dcm", number.reverse_bits() >> 48));
        object.with_meta(meta).unwrap().write_to_file(path).unwrap();
    }
}

#[test]
fn a_real_ct_is_the_same_case_from_dicom_and_from_nifti() {
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/totalsegmentator/example_ct_sm.nii.gz");
    if !image.exists() {
        eprintln!("skipped: {} is absent", image.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let series = dir.path().join("series");
    std::fs::create_dir(&series).unwrap();
    let scan = read_image(&image).unwrap();
    write_series(&series, &scan);
    let from_series = orient(read_series(&series).unwrap());
    let from_nifti = orient(scan);
    // What a trainer's held-out list names is found in either format.
    assert_eq!(source_hash(&from_series.voxels), source_hash(&from_nifti.voxels));
    let far = from_nifti.grid.shape.map(|side| side as f64);
    let (a, b) = (from_series.grid.affine.to_mm(far), from_nifti.grid.affine.to_mm(far));
    // Nine digits in the files.
    assert!((0..3).all(|axis| (a[axis] - b[axis]).abs() < 1e-4), "{a:?} {b:?}");

    let labels = image.with_file_name("example_seg.nii.gz");
    let request = IngestRequest {
        entries: vec![datalist::single(&series, Some(&labels))],
        preset: Preset::named("totalsegmentator").unwrap(),
        options: IngestConfig::default(),
        shard: Shard { index: 0, count: 1 },
    };
    let plan = Plan {
        spacing_mm: [3.0; 3],
        ..Plan::default()
    };
    let store = dir.path().join("store");
    let status = || ingest(&request, &store, &plan, &|_| {}).unwrap().cases[0].status;
    assert_eq!(status(), Status::Ok);
    assert_eq!(status(), Status::Skipped);

    // Whose scan it is stays known under a name that says nothing; the PatientID stands nowhere in the store.
    let opened = Store::open(&store).unwrap();
    assert_eq!(
        opened.records()[0].patient,
        Digest::of(PATIENT.as_bytes()).to_string()[..16]
    );
    let files = [
        store.join("index.bin"),
        store.join("cases/series.ftc"),
        store.join("ingest/series.json"),
    ];
    for path in files {
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(4).any(|window| window == b"Jane"), "{}", path.display());
    }
    // A datalist's word counts for more.
    let named = IngestRequest {
        entries: vec![Entry {
            patient: Some("p-17".into()),
            ..request.entries[0].clone()
        }],
        ..request.clone()
    };
    assert_eq!(
        ingest(&named, &store, &plan, &|_| {}).unwrap().cases[0].status,
        Status::Ok
    );
    assert_eq!(Store::open(&store).unwrap().records()[0].patient, "p-17");
}

/// Sets or removes an attribute of a copied slice; returns what reading the series then says.
fn refusal(series: &str, file: &str, tag: Tag, value: Option<(VR, PrimitiveValue)>) -> String {
    let dir = copy_of(series);
    let path = dir.path().join(file);
    let mut object = open_file(&path).unwrap();
    match value {
        Some((vr, value)) => drop(object.put(DataElement::new(tag, vr, value))),
        None => assert!(object.remove_element(tag)),
    }
    object.write_to_file(&path).unwrap();
    let error = read_series(dir.path()).unwrap_err().to_string();
    assert!(error.contains(file), "{error}");
    error
}

#[test]
fn bad_attributes_are_refused_by_file_and_keyword() {
    let text = |vr, value: &str| Some((vr, PrimitiveValue::from(value)));
    let number = |value: u16| Some((VR::US, PrimitiveValue::from(value)));
    let rows = [
        (tags::MODALITY, text(VR::CS, "MR"), "Modality: expected CT, got \"MR\""),
        (tags::MODALITY, None, "Modality: missing"),
        (
            tags::PHOTOMETRIC_INTERPRETATION,
            text(VR::CS, "RGB"),
            "PhotometricInterpretation",
        ),
        (tags::NUMBER_OF_FRAMES, text(VR::IS, "7"), "NumberOfFrames"),
        (tags::ROWS, number(0), "Rows: expected 1 to 2048, got 0"),
        (tags::COLUMNS, number(60_000), "Columns: expected 1 to 2048"),
        (tags::ROWS, number(6), "PixelData: expected 72 bytes, got 60"),
        (
            tags::PIXEL_SPACING,
            text(VR::DS, "0.7"),
            "PixelSpacing: expected 2 numbers, got 1",
        ),
        (tags::PIXEL_SPACING, text(VR::DS, "0.7\\nan"), "PixelSpacing"),
        (
            tags::PIXEL_SPACING,
            text(VR::DS, "0.7\\0.8"),
            "PixelSpacing: [0.7, 0.8], but",
        ),
        (
            tags::IMAGE_ORIENTATION_PATIENT,
            text(VR::DS, "1\\0\\0\\1\\0\\0"),
            "at right angles",
        ),
        (
            tags::IMAGE_ORIENTATION_PATIENT,
            text(VR::DS, "1\\0\\0\\0\\1\\0"),
            "ImageOrientationPatient: [[",
        ),
        (tags::IMAGE_POSITION_PATIENT, None, "ImagePositionPatient: missing"),
        (
            tags::SERIES_INSTANCE_UID,
            text(VR::UI, "1.2.3"),
            "SeriesInstanceUID: \"1.2.3\", but",
        ),
        (tags::RESCALE_SLOPE, text(VR::DS, "0"), "RescaleSlope"),
        (tags::RESCALE_INTERCEPT, None, "RescaleIntercept: missing"),
        (
            tags::BITS_ALLOCATED,
            number(8),
            "BitsAllocated: expected 16 to 16, got 8",
        ),
        (tags::HIGH_BIT, number(15), "HighBit: expected 11 to 11, got 15"),
        (tags::PIXEL_DATA, None, "PixelData: missing"),
    ];
    for (tag, value, expected) in rows {
        let error = refusal("oblique", "b.dcm", tag, value);
        assert!(error.contains(expected), "{error} instead of {expected}");
    }
}

#[test]
fn gaps_doubles_and_folders_without_a_series_are_refused() {
    let dir = copy_of("oblique");
    std::fs::remove_file(dir.path().join("a.dcm")).unwrap();
    let error = read_series(dir.path()).unwrap_err().to_string();
    assert!(error.contains("5.000 mm apart, 3.750 mm on average"), "{error}");
    let dir = copy_of("oblique");
    std::fs::copy(dir.path().join("a.dcm"), dir.path().join("e.dcm")).unwrap();
    let error = read_series(dir.path()).unwrap_err().to_string();
    assert!(error.contains("e.dcm") && error.contains("a slice twice"), "{error}");
    for name in ["b.dcm", "c.dcm", "d.dcm", "e.dcm"] {
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    assert!(read_series(dir.path()).unwrap_err().to_string().contains("one slice"));
    std::fs::remove_file(dir.path().join("a.dcm")).unwrap();
    assert!(
        read_series(dir.path())
            .unwrap_err()
            .to_string()
            .contains("no DICOM files")
    );
    assert!(
        read_series(&dir.path().join("absent"))
            .unwrap_err()
            .to_string()
            .contains("absent")
    );
}

#[test]
fn compressed_pixels_are_refused_with_a_way_out() {
    let dir = copy_of("tilted");
    let path = dir.path().join("1");
    let mut object = open_file(&path).unwrap();
    object.meta_mut().transfer_syntax = uids::JPEG2000_LOSSLESS.into();
    object.write_to_file(&path).unwrap_or_else(|_| {
        // The library does not write it either; the identifier alone is changed.
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(17).position(|w| w == b"1.2.840.10008.1.2").unwrap();
        bytes[at..at + 17].copy_from_slice(b"1.2.840.10008.1.9");
        std::fs::write(&path, bytes).unwrap();
    });
    let error = read_series(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("transfer syntax") && error.contains("gdcmconv --raw"),
        "{error}"
    );
}

#[test]
fn no_cut_and_no_flipped_byte_panics() {
    for series in ["oblique", "tilted"] {
        let file = if series == "oblique" { "b.dcm" } else { "1" };
        let good = std::fs::read(golden(series).join(file)).unwrap();
        let dir = copy_of(series);
        let path = dir.path().join(file);
        for end in 0..good.len() {
            std::fs::write(&path, &good[..end]).unwrap();
            assert!(read_series(dir.path()).is_err(), "{series} cut at {end}");
        }
        for at in 0..good.len() {
            for value in [0, 0x55, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= value;
                std::fs::write(&path, &bytes).unwrap();
                // Some bytes decide nothing, and some only a voxel.
                drop(read_series(dir.path()));
            }
        }
    }
}

#[test]
fn what_a_header_says_of_its_own_length_decides_nothing() {
    let dir = copy_of("tilted");
    let before = read_series(dir.path()).unwrap().voxels;
    let path = dir.path().join("1");
    let mut bytes = std::fs::read(&path).unwrap();
    // (0002,0000) UL, the group's length: four bytes after its head. Too small, the data would begin in the header.
    assert_eq!(bytes[132..140], [2, 0, 0, 0, b'U', b'L', 4, 0]);
    bytes[140] -= 20;
    std::fs::write(&path, &bytes).unwrap();
    // The library's own reading of the header may refuse it; if not, the data begin where they do.
    if let Ok(scan) = read_series(dir.path()) {
        assert_eq!(scan.voxels, before);
    }
}

#[test]
fn steps_that_no_scanner_makes_are_refused() {
    let dir = copy_of("tilted");
    for number in 0..3 {
        let path = dir.path().join(number.to_string());
        let mut object = open_file(&path).unwrap();
        let position = PrimitiveValue::from(format!("{}\\-60\\200", 40 - 300 * number));
        object.put(DataElement::new(tags::IMAGE_POSITION_PATIENT, VR::DS, position));
        object.write_to_file(&path).unwrap();
    }
    let error = read_series(dir.path()).unwrap_err().to_string();
    assert!(error.contains("expected voxels of 0.01..=100.0 mm"), "{error}");
}
