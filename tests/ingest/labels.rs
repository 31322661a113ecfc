//! Labels: other grids, folders of masks.

use freetumor::ingest::nifti::{Scan, write_labels};
use freetumor::ingest::orient::orient;
use freetumor::ingest::regrid::regrid_labels;
use freetumor::ingest::{IngestConfig, LabelGrid, Status};
use freetumor::store::{Cases, Store};
use freetumor::volume::Grid;
use ndarray::{Array3, s};
use serde_json::Value;

use super::{Files, golden, patient};

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
