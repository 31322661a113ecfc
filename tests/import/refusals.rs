//! What cannot be imported is refused by name.

use std::path::Path;

use freetumor::checkpoint::{ImportRequest, NnunetPlans, Role, import_pytorch, read_pytorch};
use freetumor::ingest::nnunet_plans;
use freetumor::nn::Merging;
use freetumor::volume::Plan;
use serde_json::{Value, json};

use super::{folder, nnunet, request, support, three_classes};

#[test]
fn a_pickle_that_calls_something_is_refused_by_name_and_not_run() {
    let victim = Path::new(env!("CARGO_MANIFEST_DIR")).join("executed");
    let path = folder().join("hostile.pt");
    let error = read_pytorch(&path).err().unwrap().to_string();
    assert!(
        error.contains("hostile.pt") && error.contains("posix.system"),
        "{error}"
    );
    assert!(!victim.exists());
    let out = tempfile::tempdir().unwrap();
    let [from, out] = [path.to_str().unwrap(), out.path().to_str().unwrap()];
    let said = support::run(&["import", "--from", from, "--as", "critic", "--out", out]);
    assert!(
        said.code == Some(1) && said.text.contains("posix.system"),
        "{}",
        said.text
    );
    assert!(!victim.exists());
}

#[test]
fn damaged_files_are_errors_that_name_the_file() {
    let whole = std::fs::read(folder().join("plain.pth")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("damaged.pth");
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read_pytorch(&path).err().map(|error| error.to_string())
    };
    for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        let error = refused(&whole[..length]).unwrap_or_else(|| panic!("{length} bytes were read"));
        assert!(error.contains("damaged.pth"), "{error}");
    }
    // A flipped byte may lie where nothing is read; it must never panic, and never change a number unnoticed.
    let original = read_pytorch(&folder().join("plain.pth")).unwrap().weights;
    for at in (0..whole.len()).step_by(509) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(file) = read_pytorch(&path) {
            let changed = original
                .iter()
                .filter(|(name, weight)| file.weights.get(*name) != Some(*weight))
                .count();
            let renamed = file.weights.keys().any(|name| !original.contains_key(name));
            assert!(changed == 0 || renamed, "byte {at} changed {changed} tensors");
        }
    }
}

#[test]
fn strides_that_cannot_be_are_refused() {
    let plan = Plan {
        labels: three_classes(),
        ..Plan::default()
    };
    let refused = |file: &str, strides: &[usize]| {
        let request = ImportRequest {
            strides: Some(strides),
            ..request(Role::Segmentor, &plan, None)
        };
        import_pytorch(&folder().join(file), &request)
            .err()
            .unwrap()
            .to_string()
    };
    assert!(refused("monai_plain.pt", &[2]).contains("strides: expected 2 numbers, got [2]"));
    assert!(refused("monai_plain.pt", &[2, 3]).contains("strides: expected 1 or 2, got 3"));
    assert!(
        refused("monai_residual.pt", &[1, 2])
            .contains("strides: expected [2, 2], as its residual projections have it, got [1, 2]")
    );
    assert!(refused("plain.pth", &[2, 2]).contains("strides: expected none"));
}

#[test]
fn what_does_not_fit_is_refused_by_key() {
    let plan = Plan {
        labels: three_classes(),
        ..Plan::default()
    };
    let file = folder().join("plain.pth");
    let refused = |plans: &NnunetPlans, plan: &Plan, classes: Option<&[String]>| {
        let request = ImportRequest {
            classes,
            ..request(Role::Segmentor, plan, Some(plans))
        };
        import_pytorch(&file, &request).err().unwrap().to_string()
    };
    let mut plans = nnunet(&folder(), "plain");
    plans.network.stages[0].stride = [2; 3];
    let error = refused(&plans, &plan, None);
    assert!(error.contains("a first stride of 1"), "{error}");
    let mut plans = nnunet(&folder(), "plain");
    plans.network.stages[1].width = 5;
    let error = refused(&plans, &plan, None);
    assert!(
        error.contains("plain.pth") && error.contains("encoder.stages.1.0.convs.0"),
        "{error}"
    );
    let plans = nnunet(&folder(), "plain");
    let error = refused(&plans, &Plan::default(), Some(&["background".into(), "liver".into()]));
    assert!(error.contains("expected 3 names"), "{error}");
    let names = ["background", "liver", "cancer"].map(String::from);
    let error = refused(&plans, &plan, Some(&names));
    assert!(error.contains("cancer") && error.contains("--classes"), "{error}");
    let names = ["background", "liver", "liver"].map(String::from);
    let error = refused(&plans, &plan, Some(&names));
    assert!(error.contains("\"liver\" stands there twice"), "{error}");
    let merging = ImportRequest {
        merging: Merging::Corrected,
        ..request(Role::Segmentor, &plan, Some(&plans))
    };
    let error = import_pytorch(&file, &merging).err().unwrap().to_string();
    assert!(error.contains("merging: only for MONAI's SwinUNETR"), "{error}");
    let mut narrow = plan.clone();
    narrow.window_hu.high = 200.0;
    let error = refused(&plans, &narrow, None);
    assert!(
        error.contains("plan.window_hu") && error.contains("-97 to 214"),
        "{error}"
    );
    let bare = import_pytorch(&file, &request(Role::Segmentor, &plan, None))
        .err()
        .unwrap();
    assert!(bare.to_string().contains("plans.json"), "{bare}");
}

#[test]
fn activations_that_the_network_would_not_have_are_refused_by_key() {
    let path = folder().join("plain.plans.json");
    let (plans, configuration) = nnunet_plans::configuration(&path, "3d_fullres").unwrap();
    let dataset: Value = serde_json::from_slice(&std::fs::read(folder().join("dataset.json")).unwrap()).unwrap();
    let refused = |key: &str, value: Value| {
        let mut other = configuration.clone();
        other["architecture"]["arch_kwargs"][key] = value;
        NnunetPlans::parse(&other, &plans, &dataset).err()
    };
    let slope = refused("nonlin_kwargs", json!({"inplace": true, "negative_slope": 0.2})).unwrap();
    assert_eq!(
        slope,
        "architecture.arch_kwargs.nonlin_kwargs.negative_slope: expected 0.01, got 0.2"
    );
    assert!(refused("nonlin_first", json!(true)).unwrap().contains("nonlin_first"));
    assert_eq!(refused("nonlin_kwargs", json!({"inplace": true})), None);
}
