//! `freetumor experiment`: every arm, in miniature; what is done is not done again, and predictions can be scored anew.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;
use std::process::{Command, Output};

use freetumor::experiment::Arm;
use freetumor::store::{Cases, Store};
use freetumor::volume::Region;
use nifti::{IntoNdArray, NiftiObject, ReaderOptions};
use serde_json::Value;

const CONFIG: &str = r#"
[plan]
spacing_mm = [8.0, 8.0, 8.0]
patch = [16, 16, 16]
[plan.labels]
background = 0
liver = 1
liver_tumour = 2

[phantom.tumours.liver]
counts = [0, 0, 1]
ln_mean = 3.6
ln_sd = 0.1
range_mm = [25, 45]

[experiment]
labelled = 4
unlabelled = 2
test = 3
seeds = 1
labelled_counts = []
unlabelled_counts = []

[critic]
widths = [4, 8]
steps = 3
voxels_per_step = 4096
max_cube = 16
[critic.split]
folds = 2
[critic.held_out]
cases = 1
[critic.held_out.window]
window = [16, 16, 16]

[synthesizer]
widths = [4, 8]
discriminator_widths = [4, 8]
steps = 2
voxels_per_step = 8192
max_cube = 16
held_out_lesions = 2
[synthesizer.cube_mix]
medium = 1.0
[synthesizer.split]
folds = 2

[experiment.published]
method = "published"
published = { width = 2 }
steps = 2
voxels_per_step = 8192
max_cube = 16
held_out_lesions = 2
cube_mix = { medium = 1.0 }
split = { folds = 2 }

[segmentor]
widths = [4, 8]
steps = 3
[segmentor.recipe.sizes]
medium = 1.0
[segmentor.recipe.gate]
retries = 0
[segmentor.held_out.window]
window = [16, 32, 32]
"#;

fn experiment(dir: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freetumor"));
    let args = [
        "experiment",
        "--config",
        "c.toml",
        "--out",
        "out",
        "--results",
        "results/r.json",
    ];
    command.current_dir(dir).args(args).args(more).output().unwrap()
}

#[track_caller]
fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    text
}

fn results(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("results/r.json")).unwrap()).unwrap()
}

/// The Dice coefficient of class 2, by its definition.
fn dice(prediction: &ndarray::Array3<u8>, truth: &ndarray::Array3<u8>) -> f64 {
    let count = |is: &dyn Fn(u8, u8) -> bool| prediction.iter().zip(truth).filter(|(p, t)| is(**p, **t)).count() as f64;
    2.0 * count(&|p, t| p == 2 && t == 2) / (count(&|p, _| p == 2) + count(&|_, t| t == 2))
}

#[test]
fn arms_are_run_once_and_their_predictions_give_the_scores() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("c.toml"), CONFIG).unwrap();
    let listed = said(&experiment(dir, &["--list"]));
    assert!(listed.contains("0 of 9 runs are done"), "{listed}");

    // One arm first: the others are still to do, and the one is not repeated.
    said(&experiment(dir, &["--arms", "real_only"]));
    let first = results(dir);
    let all = said(&experiment(dir, &[]));
    assert!(all.contains("1 of 9 runs are done"), "{all}");
    let document = results(dir);
    assert_eq!(document["arms"]["real_only"], first["arms"]["real_only"]);
    for arm in Arm::ALL {
        let scores = document["arms"][arm.name()]["tumour_dsc"].as_array().unwrap();
        assert_eq!(
            (scores.len(), scores[0].as_array().unwrap().len()),
            (1, 3),
            "{}",
            arm.name()
        );
    }
    assert_eq!(document["comparisons"].as_object().unwrap().len(), 10);
    assert!(
        std::fs::read_to_string(dir.join("results/r.md"))
            .unwrap()
            .contains("| gated - generator |")
    );
    assert!(
        std::fs::read_to_string(dir.join("results/r.svg"))
            .unwrap()
            .starts_with("<svg xmlns=")
    );
    assert!(said(&experiment(dir, &[])).contains("9 of 9 runs are done"));

    // By this file a record knows that its run went on from a checkpoint.
    let run = dir.join("out/runs/real_only-l4-u0-s0");
    assert!(run.join("segmentor.state.safetensors").exists());
    assert!(
        document["runs"]
            .as_array()
            .unwrap()
            .iter()
            .all(|run| run.get("went_on").is_none())
    );

    // Anyone can score the kept predictions.
    let test = Store::open(dir.join("out/test")).unwrap();
    for (number, record) in test.records().iter().enumerate() {
        let file = dir.join(format!("out/runs/real_only-l4-u0-s0/predictions/{}.nii.gz", record.id));
        let volume = ReaderOptions::new().read_file(file).unwrap().into_volume();
        let xyz = volume
            .into_ndarray::<u8>()
            .unwrap()
            .into_dimensionality::<ndarray::Ix3>()
            .unwrap();
        let prediction = xyz.permuted_axes([2, 1, 0]).as_standard_layout().into_owned();
        let truth = test.read(number, Region::whole(record.grid.shape)).unwrap().labels;
        let kept = document["arms"]["real_only"]["tumour_dsc"][0][number].as_f64().unwrap();
        assert!((dice(&prediction, &truth) - kept).abs() < 1e-12, "{}", record.id);
    }

    // The file alone, on another machine, is enough to pass over what is done; another configuration starts anew.
    std::fs::remove_dir_all(dir.join("out")).unwrap();
    assert!(said(&experiment(dir, &["--list"])).contains("9 of 9 runs are done"));
    std::fs::write(dir.join("c.toml"), CONFIG.replace("ln_sd = 0.1", "ln_sd = 0.2")).unwrap();
    let refused = experiment(dir, &["--list"]);
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && why.contains("choose another --out"),
        "{why}"
    );
    std::fs::remove_dir_all(dir.join("out")).unwrap();
    let anew = said(&experiment(dir, &["--list"]));
    assert!(
        anew.contains("of another configuration") && anew.contains("0 of 9 runs are done"),
        "{anew}"
    );
}
