//! Scores of stores and scans.

use std::path::Path;

use freetumor::ingest::nifti::read_labels;
use freetumor::ingest::orient::orient;
use freetumor::store::{CaseKind, Cases, Store};
use serde_json::Value;

use super::support::{freetumor, run};
use super::{MODEL, text, two_cases, two_files};

#[test]
fn a_store_is_scored_and_predicted() {
    let folder = tempfile::tempdir().unwrap();
    let store = two_cases(folder.path());
    let page = folder.path().join("scores.html");
    let output = freetumor()
        .args([
            "evaluate",
            "--config",
            "configs/demo.toml",
            "--json",
            "--store",
            text(&store),
            "--report",
            text(&page),
        ])
        .args(MODEL)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(scores["scores"].as_array().unwrap().len(), 2);
    assert!(
        scores["hd95_variant"]
            .as_str()
            .unwrap()
            .contains("95th percentile by area")
    );
    assert_eq!(scores["settings"]["window"]["window"], serde_json::json!([64, 64, 64]));
    let liver = &scores["classes"]["liver"];
    assert_eq!(
        (&liver["cases"], &liver["tolerance_mm"]),
        (&Value::from(2), &Value::from(5.0))
    );
    for measure in ["dice_by_patient", "nsd"] {
        let mean = liver[measure]["mean"].as_f64().unwrap();
        assert!((0.7..=1.0).contains(&mean), "{measure} {mean}");
        assert_eq!(liver[measure]["patients"], 2);
    }
    let all = &scores["lesions"]["liver"]["all"];
    let count = |key: &str| all[key].as_u64().unwrap();
    assert!(
        count("matched") <= count("touched") && count("touched") <= count("truths"),
        "{all}"
    );
    let html = std::fs::read_to_string(page).unwrap();
    assert!(html.contains("data:image/png;base64,") && !html.contains("://"));

    let out = folder.path().join("predictions");
    let mut arguments = vec![
        "predict",
        "--config",
        "configs/demo.toml",
        "--store",
        text(&store),
        "--out",
        text(&out),
    ];
    arguments.extend(MODEL);
    let said = run(&arguments);
    assert_eq!(said.code, Some(0), "{}", said.text);
    for record in Cases::records(&Store::open(&store).unwrap()) {
        let labels = read_labels(&out.join(format!("{}.nii.gz", record.id))).unwrap();
        assert_eq!(labels.affine_xyz, record.source.affine_xyz);
        let (k, j, i) = labels.voxels.dim();
        assert_eq!([i, j, k], record.source.shape_xyz);
    }
}

/// The third case is unlabelled, and tumour-free by assumption.
#[test]
fn controls_are_scored_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = two_cases(folder.path());
    let evaluate = |more: &[&str]| -> Value {
        let output = freetumor()
            .args([
                "evaluate",
                "--config",
                "configs/demo.toml",
                "--json",
                "--store",
                text(&store),
            ])
            .args(MODEL)
            .args(more)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(said.contains("--controls scores"), more.is_empty(), "{said}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let free = |scores: &Value| scores["lesions"]["liver"]["tumour_free"]["cases"].as_u64().unwrap();
    let counts = |scores: &Value| {
        (
            scores["scores"].as_array().unwrap().len(),
            scores["left_out"]["unannotated"].as_u64().unwrap(),
        )
    };
    let (without, with) = (evaluate(&[]), evaluate(&["--controls"]));
    assert_eq!((counts(&without), counts(&with)), ((2, 1), (3, 0)));
    assert_eq!(free(&with), free(&without) + 1);
    let truths = |scores: &Value| scores["lesions"]["liver"]["all"]["truths"].clone();
    assert_eq!(truths(&with), truths(&without));
}

/// Flips bits in the middle of a case's file.
fn damage(store: &Path, id: &str) {
    let files = std::fs::read_dir(store.join("cases"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut of_case = files.filter(|path| path.file_name().unwrap().to_string_lossy().contains(id));
    let path = of_case.next().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_damaged_case_is_named_and_stops_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let store = two_cases(folder.path());
    let cases = Store::open(&store).unwrap();
    let labelled = cases
        .records()
        .iter()
        .filter(|record| record.kind == CaseKind::Labelled);
    let mut labelled: Vec<_> = labelled.collect();
    // Where not all are scored, those with the lowest hashes are.
    labelled.sort_by_key(|record| record.source_hash);
    let ids: Vec<&str> = labelled.iter().map(|record| record.id.as_str()).collect();
    damage(&store, ids[1]);
    let evaluate = |limit: &[&str]| {
        freetumor()
            .args(["evaluate", "--config", "configs/demo.toml", "--json"])
            .args(["--store", text(&store)])
            .args(MODEL)
            .args(limit)
            .output()
            .unwrap()
    };
    let damaged = evaluate(&[]);
    let said = String::from_utf8_lossy(&damaged.stderr);
    assert!(
        damaged.status.code() == Some(1) && said.contains(&format!("{}: refused: ", ids[1])),
        "{said}"
    );
    let left: Value = serde_json::from_slice(&damaged.stdout).unwrap();
    let [scored] = left["scores"].as_array().unwrap().as_slice() else {
        panic!("one case is whole: {left}");
    };
    assert_eq!(scored["case"], ids[0]);
    assert_eq!(left["left_out"]["refused"], 1);
    // Nobody comes to the second.
    let one = evaluate(&["--cases", "1"]);
    assert!(one.status.success(), "{}", String::from_utf8_lossy(&one.stderr));
    let one: Value = serde_json::from_slice(&one.stdout).unwrap();
    assert_eq!(
        (&one["left_out"]["refused"], &one["left_out"]["beyond_limit"]),
        (&0.into(), &1.into())
    );
    assert_eq!(one["scores"], left["scores"]);
    assert_eq!(one["evaluated_on"], cases.snapshot().to_string());
    assert!(
        one["model"].as_str().unwrap().starts_with("critic "),
        "{}",
        one["model"]
    );
}

#[test]
fn stores_of_another_voxel_size_and_settings_that_say_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let demo = std::fs::read_to_string("configs/demo.toml").unwrap();
    let coarser = demo.replacen("[3.0, 3.0, 3.0]", "[4.0, 4.0, 4.0]", 1);
    std::fs::write(path("coarser.toml"), &coarser).unwrap();
    let (config, store, out) = (path("coarser.toml"), path("store"), path("out"));
    let made = run(&[
        &[
            "phantom",
            "--config",
            text(&config),
            "--store",
            text(&store),
            "--labelled",
            "1",
        ][..],
        &["--unlabelled", "0"],
    ]
    .concat());
    assert_eq!(made.code, Some(0), "{}", made.text);
    for command in [&["evaluate"][..], &["predict", "--out", text(&out)]] {
        let said = run(&[command, &["--config", text(&config), "--store", text(&store)], &MODEL].concat());
        assert!(
            said.code == Some(1) && said.text.contains("spacing_mm") && said.text.contains("[4.0, 4.0, 4.0]"),
            "{}",
            said.text
        );
    }
    let missing = path("missing/scores.html");
    let said = run(&[
        &["evaluate", "--store", text(&store), "--report", text(&missing)][..],
        &MODEL,
    ]
    .concat());
    assert!(
        said.text
            .contains("--report: expected a file in a folder that is there"),
        "{}",
        said.text
    );
    let misspelt = format!("{demo}\n[segmentor.held_out.tolerance.class_mm]\nliver_tumor = 1.5\n");
    std::fs::write(path("misspelt.toml"), misspelt).unwrap();
    let config = path("misspelt.toml");
    let said = run(&[
        &["evaluate", "--config", text(&config), "--store", text(&store)][..],
        &MODEL,
    ]
    .concat());
    assert!(
        said.text
            .contains("class_mm.liver_tumor: expected a class of the model"),
        "{}",
        said.text
    );
}

#[test]
fn scans_are_scored_on_the_grids_of_their_files() {
    let folder = tempfile::tempdir().unwrap();
    let truth = two_files(folder.path());
    let path = |name: &str| folder.path().join(name);
    // The third is no NIfTI file, the fourth has no labels.
    std::fs::write(path("broken.nii"), "hello").unwrap();
    let list = serde_json::json!({"training": [
        {"image": "plain.nii.gz", "label": "plain-truth.nii.gz"},
        {"image": "turned.nii", "label": "turned-truth.nii"},
        {"image": "broken.nii", "label": "plain-truth.nii.gz"},
    ], "test": ["plain.nii.gz"]});
    std::fs::write(path("dataset.json"), list.to_string()).unwrap();
    let names = [
        "liver",
        "liver_tumour",
        "pancreas",
        "pancreas_tumour",
        "kidney",
        "kidney_tumour",
    ];
    let map: Vec<String> = (names.iter().zip(1..))
        .map(|(name, id)| format!("{id} = {name:?}"))
        .collect();
    std::fs::write(
        path("preset.toml"),
        format!("annotated = {names:?}\n[map]\n{}\n", map.join("\n")),
    )
    .unwrap();
    let evaluate = |preset: &str| {
        freetumor()
            .args(["evaluate", "--config", "configs/demo.toml", "--json"])
            .args(["--datalist", text(&path("dataset.json")), "--preset", preset])
            .args(MODEL)
            .output()
            .unwrap()
    };
    let output = evaluate(text(&path("preset.toml")));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "one scan was refused: {said}");
    assert!(said.contains("broken.nii"), "{said}");
    let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
    let [plain, turned] = scores["scores"].as_array().unwrap().as_slice() else {
        panic!("two scans have labels: {scores}");
    };
    assert_eq!(plain["classes"], turned["classes"], "whatever the files' axes");
    let left_out = serde_json::json!({"trained_on": 0, "unannotated": 0, "beyond_limit": 0, "refused": 1});
    assert_eq!(scores["left_out"], left_out);

    // The same from outside: the file that `predict` writes, against the file of labels, voxel by voxel.
    let out = path("predicted.nii.gz");
    let said = run(&[
        &[
            "predict",
            "--config",
            "configs/demo.toml",
            "--image",
            text(&path("plain.nii.gz")),
            "--out",
            text(&out),
        ],
        &MODEL[..],
    ]
    .concat());
    assert_eq!(said.code, Some(0), "{}", said.text);
    let predicted = orient(read_labels(&out).unwrap()).voxels;
    for (name, id) in names.iter().zip(1_u8..) {
        let count =
            |of: &dyn Fn(u8, u8) -> bool| predicted.iter().zip(&truth).filter(|(p, t)| of(**p, **t)).count() as u64;
        let overlap = &plain["classes"][name]["overlap"];
        assert_eq!(overlap["predicted"], count(&|p, _| p == id), "{name}");
        assert_eq!(overlap["truth"], count(&|_, t| t == id), "{name}");
    }
    let unfit = evaluate("no-such-preset");
    assert!(String::from_utf8_lossy(&unfit.stderr).contains("no-such-preset"));
}
