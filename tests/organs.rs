//! `freetumor label-organs` from scans without labels to hosts that a stream serves, by the bundled critic.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use freetumor::checkpoint::Bundle;
use freetumor::evaluate::overlap;
use freetumor::ingest::nifti::{write_image, write_labels};
use freetumor::phantom::{PhantomSpec, cohort, generate};
use freetumor::sampler::Pool;
use freetumor::store::{CaseKind, Cases, Crop, Store, StoreWriter};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{PatchService, StreamConfig, Streams};
use freetumor::volume::{IGNORE, Plan, Region};
use serde_json::{Value, json};
use support::{freetumor, run};

const MODEL: &str = "assets/demo";

/// Scans on disk: three without labels, one labelled.
struct Hospital {
    folder: tempfile::TempDir,
}

impl Hospital {
    fn new() -> Self {
        let hospital = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        // Another seed than that of the bundled models' training set.
        for (number, spec) in cohort(78, 1, 3).into_iter().enumerate() {
            let volume = generate(&PhantomSpec {
                spacing_mm: [3.0; 3],
                ..spec
            });
            write_image(
                &hospital.at(&format!("ct_{number}.nii.gz")),
                volume.image.view(),
                &volume.grid,
            )
            .unwrap();
            write_labels(
                &hospital.at(&format!("seg_{number}.nii.gz")),
                volume.labels.view(),
                &volume.grid,
            )
            .unwrap();
        }
        let labelled = json!({"image": "ct_0.nii.gz", "label": "seg_0.nii.gz"});
        let without: Vec<Value> = (1..4).map(|n| json!(format!("ct_{n}.nii.gz"))).collect();
        let truth: Vec<Value> = (0..4)
            .map(|n| json!({"image": format!("ct_{n}.nii.gz"), "label": format!("seg_{n}.nii.gz")}))
            .collect();
        hospital.write("list.json", &json!({"training": [labelled], "unlabeled": without}));
        hospital.write("truth.json", &json!({"training": truth}));
        hospital
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, value: &Value) {
        std::fs::write(self.at(name), value.to_string()).unwrap();
    }

    fn ingest(&self, list: &str, store: &str) -> String {
        self.ingest_by("freetumor", list, store)
    }

    fn ingest_by(&self, preset: &str, list: &str, store: &str) -> String {
        let said = run(&[
            "ingest",
            "--config",
            "configs/demo.toml",
            "--preset",
            preset,
            "--datalist",
            self.at(list).to_str().unwrap(),
            "--store",
            self.at(store).to_str().unwrap(),
        ]);
        assert_eq!(said.code, Some(0), "{}", said.text);
        said.text
    }

    /// Labels organs; returns the exit code and the report.
    fn label(&self, extra: &[&str]) -> (Option<i32>, Value) {
        let output = freetumor()
            .args(["label-organs", "--device", "cpu", "--model", MODEL, "--json", "--store"])
            .arg(self.at("store"))
            .args(extra)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let report = serde_json::from_str(&text).unwrap_or_else(|error| {
            panic!("{error}: {text} {}", String::from_utf8_lossy(&output.stderr));
        });
        (output.status.code(), report)
    }

    fn open(&self, store: &str) -> Store {
        Store::open(self.at(store)).unwrap()
    }
}

fn whole(store: &Store, id: &str) -> Crop {
    let case = store.find(id).unwrap();
    store
        .read(case, Region::whole(store.records()[case].grid.shape))
        .unwrap()
}

fn statuses(report: &Value) -> BTreeMap<String, String> {
    let cases = report["cases"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    cases.map(|case| (text(&case["id"]), text(&case["status"]))).collect()
}

fn every(ids: &[&str], status: &str) -> BTreeMap<String, String> {
    ids.iter().map(|id| (id.to_string(), status.to_string())).collect()
}

const UNLABELLED: [&str; 3] = ["ct_1", "ct_2", "ct_3"];

#[test]
fn scans_without_labels_become_hosts() {
    let hospital = Hospital::new();
    hospital.ingest("list.json", "store");
    hospital.ingest("truth.json", "truth");
    let before: Vec<Crop> = UNLABELLED.map(|id| whole(&hospital.open("store"), id)).into();
    let (code, report) = hospital.label(&[]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(0), every(&UNLABELLED, "labelled")),
        "{report:#}"
    );
    let labels_by = report["labels_by"].as_str().unwrap();
    assert!(
        labels_by.starts_with("pseudo:") && labels_by.len() == 7 + 64,
        "{labels_by}"
    );

    let (store, truth) = (hospital.open("store"), hospital.open("truth"));
    let mut dice: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (id, before) in UNLABELLED.iter().zip(&before) {
        let record = &store.records()[store.find(id).unwrap()];
        let (after, truth_crop) = (whole(&store, id), whole(&truth, id));
        assert_eq!((&after.image, &truth_crop.image), (&before.image, &before.image));
        assert_eq!(
            (record.kind, record.labels_by.as_str()),
            (CaseKind::Unlabelled, labels_by)
        );
        assert!(!record.annotation.assumed_tumour_free && record.tumours.is_empty());
        assert_eq!(record.organs.len(), record.annotation.classes.len());
        let known = truth.records()[0].annotation.admissible(&truth.plan().labels).unwrap();
        for class in &record.annotation.classes {
            let organ = truth.plan().labels.organ(class).unwrap();
            let score = overlap(&after.labels, &truth_crop.labels, &known, organ.id)
                .dice()
                .unwrap();
            dice.entry(["liver", "pancreas", "kidney"][usize::from(organ.id) / 2])
                .or_default()
                .push(score);
        }
    }
    eprintln!("{report:#}\nDice of accepted organs: {dice:.3?}");
    let mean = |organ: &str| dice[organ].iter().sum::<f64>() / dice[organ].len() as f64;
    assert!(
        dice["liver"].len() >= 2 && mean("liver") > 0.85 && mean("kidney") > 0.75,
        "{dice:?}"
    );

    // Again: nothing to do, for this command and for ingest.
    let snapshot = store.snapshot();
    let (code, again) = hospital.label(&[]);
    assert_eq!(
        (code, statuses(&again)),
        (Some(0), every(&UNLABELLED, "skipped")),
        "{again:#}"
    );
    let said = hospital.ingest("list.json", "store");
    assert!(said.contains("0 stored, 4 already there"), "{said}");
    assert_eq!(hospital.open("store").snapshot(), snapshot);

    // One liver reaches into the lung above and is refused: too wide a spread of HU.
    served(Arc::new(store), labels_by, dice["liver"].len() as u64);
}

/// Streams hosts out of a labelled store.
fn served(store: Arc<Store>, labels_by: &str, livers: u64) {
    let bundle = Bundle::load(Path::new(MODEL), &Device::flex()).unwrap();
    let streams = Streams::start(store, Some(Arc::new(bundle)), StreamConfig::default()).unwrap();
    let recipe: Recipe = serde_json::from_value(json!({
        "pools": {"unlabelled_host": 1.0}, "organs": {"liver": 1.0}, "sizes": {"small": 1.0},
        "synthesizer": "analytic", "gate": {"enabled": false},
    }))
    .unwrap();
    let resolved = streams.resolve(recipe).unwrap();
    assert_eq!(resolved.feasible[&Pool::UnlabelledHost]["liver"], livers);
    let delivery = Delivery {
        count: Some(2),
        ..Delivery::default()
    };
    let mut stream = streams.open(&resolved, &delivery).unwrap();
    for _ in 0..2 {
        for patch in stream.next_batch().unwrap().unwrap().patches {
            assert_eq!(
                (patch.meta.labels_by.as_str(), patch.meta.lesions.len()),
                (labels_by, 1)
            );
            assert!(
                patch.label.iter().any(|label| *label == 1),
                "healthy liver around the lesion"
            );
        }
    }
}

#[test]
fn labels_that_are_there_stay_and_a_bad_case_stops_no_other() {
    let hospital = Hospital::new();
    hospital.ingest("list.json", "store");
    // A damaged image: the last bytes before the candidates belong to some chunk.
    let path = hospital.at("store/cases/ct_2.ftc");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x5a);
    std::fs::write(&path, bytes).unwrap();
    let (code, report) = hospital.label(&[]);
    let mut expected = every(&["ct_1", "ct_3"], "labelled");
    expected.insert("ct_2".into(), "refused".into());
    assert_eq!((code, statuses(&report)), (Some(1), expected), "{report:#}");
    assert!(
        report["cases"][1]["reason"].as_str().unwrap().contains("ct_2.ftc"),
        "{report:#}"
    );

    let labelled = whole(&hospital.open("store"), "ct_0");
    let (code, report) = hospital.label(&["--case", "ct_0", "--case", "nobody", "--replace"]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(1), every(&["ct_0", "nobody"], "refused")),
        "{report:#}"
    );
    assert_eq!(whole(&hospital.open("store"), "ct_0"), labelled);

    // Organs that annotators labelled.
    hospital.write(
        "organs.json",
        &json!({"unlabeled": [{"image": "ct_2.nii.gz", "label": "seg_2.nii.gz"}]}),
    );
    hospital.ingest("organs.json", "store");
    let annotated = whole(&hospital.open("store"), "ct_2");
    let (code, report) = hospital.label(&[]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(0), every(&UNLABELLED, "skipped")),
        "{report:#}"
    );
    let (code, report) = hospital.label(&["--case", "ct_2"]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(1), every(&["ct_2"], "refused")),
        "{report:#}"
    );
    assert_eq!(whole(&hospital.open("store"), "ct_2"), annotated);
    let (code, report) = hospital.label(&["--case", "ct_2", "--replace"]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(0), every(&["ct_2"], "labelled")),
        "{report:#}"
    );
    assert_ne!(whole(&hospital.open("store"), "ct_2").labels, annotated.labels);
}

/// A label file that leaves the liver open and names no organ: a tumour of which the preset has no class may lie there.
#[test]
fn what_annotators_left_open_stays_open() {
    let hospital = Hospital::new();
    let spec = cohort(78, 1, 3).swap_remove(1);
    let volume = generate(&PhantomSpec {
        spacing_mm: [3.0; 3],
        ..spec
    });
    let open = volume.labels.mapv(|label| if label == 1 { 9 } else { 0 });
    write_labels(&hospital.at("open_1.nii.gz"), open.view(), &volume.grid).unwrap();
    let preset = hospital.at("open.toml");
    std::fs::write(&preset, "annotated = []\n[map]\n5 = \"kidney\"\n9 = \"ignore\"\n").unwrap();
    let case = json!({"image": "ct_1.nii.gz", "label": "open_1.nii.gz"});
    hospital.write("open.json", &json!({"unlabeled": [case]}));
    hospital.ingest_by(preset.to_str().unwrap(), "open.json", "store");
    let before = whole(&hospital.open("store"), "ct_1");
    let is_open = |crop: &Crop| crop.labels.mapv(|label| label == IGNORE);
    assert!(is_open(&before).iter().any(|open| *open));
    let (code, report) = hospital.label(&[]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(0), every(&["ct_1"], "skipped")),
        "{report:#}"
    );
    assert_eq!(whole(&hospital.open("store"), "ct_1"), before);
    let (code, report) = hospital.label(&["--case", "ct_1", "--replace"]);
    assert_eq!(
        (code, statuses(&report)),
        (Some(0), every(&["ct_1"], "labelled")),
        "{report:#}"
    );
    let after = whole(&hospital.open("store"), "ct_1");
    // What the model itself is not sure of is open, too.
    let is_kept = is_open(&before)
        .iter()
        .zip(&is_open(&after))
        .all(|(before, after)| *after || !*before);
    assert!(is_kept);
    assert_ne!(after.labels, before.labels);
}

#[test]
fn a_model_of_another_grid_is_refused_by_field() {
    let store = tempfile::tempdir().unwrap();
    // The default plan has voxels of 1.5 mm.
    StoreWriter::create(store.path(), &Plan::default())
        .unwrap()
        .finish()
        .unwrap();
    let said = run(&[
        "label-organs",
        "--model",
        MODEL,
        "--store",
        store.path().to_str().unwrap(),
    ]);
    assert_eq!(said.code, Some(1), "{}", said.text);
    assert!(
        said.text
            .contains("plan field spacing_mm: critic has [3.0, 3.0, 3.0], the store has [1.5, 1.5, 1.5]"),
        "{}",
        said.text
    );
}
