//! Bad input is refused by name and stops nobody else.

use freetumor::ingest::nifti::{write_image, write_labels};
use freetumor::ingest::{IngestConfig, IngestRequest, Preset, Shard, Status, datalist, ingest};
use freetumor::store::{CaseKind, Cases, Store};
use freetumor::volume::{Grid, Plan};
use ndarray::{Array3, s};

use super::{Files, patient};

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

/// Two hospitals number their files alike.
#[test]
fn a_case_is_no_other_scan_under_its_id_and_a_refused_one_says_what_stays() {
    let files = Files::new();
    files.good("a");
    let list =
        |image: &str| serde_json::json!({"training": [{"image": image, "label": "a_seg.nii.gz", "id": "case_001"}]});
    assert_eq!(files.ingest("lits", &list("a.nii.gz")).cases[0].status, Status::Ok);
    let snapshot = || Store::open(files.path("store")).unwrap().snapshot();
    let before = snapshot();
    let (image, _, grid) = patient();
    write_image(&files.path("other.nii.gz"), image.mapv(|hu| hu + 1).view(), &grid).unwrap();
    let refused = &files.ingest("lits", &list("other.nii.gz")).cases[0];
    let reason = refused.reason.as_ref().unwrap();
    assert!(
        reason.contains("\"case_001\" is another scan")
            && reason.contains("a.nii.gz")
            && reason.contains("older version"),
        "{reason}"
    );
    assert_eq!(snapshot(), before);
    // The same scan from elsewhere, and a new version of the same file, are what they were.
    std::fs::copy(files.path("a.nii.gz"), files.path("moved.nii.gz")).unwrap();
    assert_ne!(
        files.ingest("lits", &list("moved.nii.gz")).cases[0].status,
        Status::Refused
    );
    std::fs::copy(files.path("other.nii.gz"), files.path("moved.nii.gz")).unwrap();
    assert_eq!(files.ingest("lits", &list("moved.nii.gz")).cases[0].status, Status::Ok);
    assert_ne!(snapshot(), before);
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
