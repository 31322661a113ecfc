//! `freetumor experiment`: every arm, in miniature; what is done is not done again, and predictions can be scored anew.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

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

/// Two of four labelled patients were held out, whose few tumours allow no level.
#[track_caller]
fn assert_runs_with_a_critic_tell_its_calibration(document: &Value) {
    for run in document["runs"].as_array().unwrap() {
        let (name, calibration) = (&run["key"]["arm"], &run["calibration"]);
        let has_critic = Arm::ALL.iter().any(|arm| *name == arm.name() && arm.needs_models());
        if has_critic {
            assert!(
                (2..9).contains(&calibration["lesions"].as_u64().unwrap()),
                "{name}: {calibration}"
            );
            assert_eq!(calibration["suspect_from"], 0.0, "{name}");
        } else {
            assert!(calibration.is_null(), "{name}");
        }
    }
}

/// Two of the runs are of arms that were told something else since: they are not written over, and the others count.
#[track_caller]
fn assert_only_what_still_counts_is_taken_over(dir: &Path, hidden: &str, document: &Value) {
    let text = CONFIG
        .replace("[experiment]\n", hidden)
        .replace("width = 2", "width = 3");
    std::fs::write(dir.join("c.toml"), text).unwrap();
    std::fs::remove_dir_all(dir.join("out")).unwrap();
    let refused = experiment(dir, &["--arms", "real_only"]);
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && why.contains("2 of its runs would be made otherwise") && why.contains("--from"),
        "{why}"
    );
    assert_eq!(results(dir), *document, "nothing of it is lost");
    let [file, moved] = ["results/r.json", "results/moved.json"].map(|name| dir.join(name));
    std::fs::rename(&file, &moved).unwrap();
    let listed = said(&experiment(dir, &["--from", "results/moved.json", "--list"]));
    assert!(listed.contains("9 of 11 runs are done"), "{listed}");
    let missing = experiment(dir, &["--from", "results/none.json", "--list"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("results/none.json: there is no such file"));
    // Together with what --results has of the same run: a record of its own counts there.
    let mut other = document.clone();
    other["runs"]
        .as_array_mut()
        .unwrap()
        .retain(|run| run["key"]["arm"] == "real_only");
    other["runs"][0]["seconds"] = 0.5.into();
    std::fs::write(&file, other.to_string()).unwrap();
    said(&experiment(
        dir,
        &["--from", "results/moved.json", "--arms", "real_only"],
    ));
    let joined = results(dir);
    assert_eq!(joined["runs"].as_array().unwrap().len(), 9);
    let real = joined["runs"]
        .as_array()
        .unwrap()
        .iter()
        .find(|run| run["key"]["arm"] == "real_only");
    assert_eq!(real.unwrap()["seconds"], 0.5);
    let kept: Value = serde_json::from_slice(&std::fs::read(&moved).unwrap()).unwrap();
    assert_eq!(kept, *document, "--from is left as it is");
    std::fs::rename(&moved, &file).unwrap();
}

#[test]
fn arms_are_run_once_and_their_predictions_give_the_scores() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let names = Arm::ALL.map(Arm::name);
    let hidden = format!("[experiment]\nhidden = true\narms = {names:?}\n");
    std::fs::write(dir.join("c.toml"), CONFIG.replace("[experiment]\n", &hidden)).unwrap();
    let listed = said(&experiment(dir, &["--list"]));
    assert!(listed.contains("0 of 11 runs are done"), "{listed}");

    // One arm first: the others are still to do, and the one is not repeated.
    said(&experiment(dir, &["--arms", "real_only"]));
    let first = results(dir);
    let all = said(&experiment(dir, &[]));
    assert!(all.contains("1 of 11 runs are done"), "{all}");
    let document = results(dir);
    assert_eq!(document["arms"]["real_only"], first["arms"]["real_only"]);
    assert_runs_with_a_critic_tell_its_calibration(&document);
    for arm in Arm::ALL {
        let scores = document["arms"][arm.name()]["tumour_dsc"].as_array().unwrap();
        assert_eq!(
            (scores.len(), scores[0].as_array().unwrap().len()),
            (1, 3),
            "{}",
            arm.name()
        );
    }
    assert_eq!(document["comparisons"].as_object().unwrap().len(), 14);
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
    assert!(said(&experiment(dir, &[])).contains("11 of 11 runs are done"));

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
    assert!(said(&experiment(dir, &["--list"])).contains("11 of 11 runs are done"));
    assert_only_what_still_counts_is_taken_over(dir, &hidden, &document);
    std::fs::write(dir.join("c.toml"), CONFIG.replace("ln_sd = 0.1", "ln_sd = 0.2")).unwrap();
    let refused = experiment(dir, &["--list"]);
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && why.contains("choose another --out"),
        "{why}"
    );
    std::fs::remove_dir_all(dir.join("out")).unwrap();
    let refused = experiment(dir, &[]);
    let why = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && why.contains("results/r.json: its runs are of another configuration"),
        "{why}"
    );
    assert_eq!(results(dir), document, "nothing of it is lost");
    std::fs::rename(dir.join("results/r.json"), dir.join("results/old.json")).unwrap();
    assert!(said(&experiment(dir, &["--list"])).contains("0 of 9 runs are done"));
}

/// Runs the experiment until a run has made steps, and asks it to stop as an operator does.
fn interrupted(dir: &Path, run: &str, more: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freetumor"));
    command
        .current_dir(dir)
        .args(["experiment", "--config", "c.toml", "--out", "out"]);
    let child = command
        .args(more)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = dir.join(format!("out/runs/{run}/segmentor.metrics.jsonl"));
    let deadline = Instant::now() + Duration::from_secs(120);
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
        assert!(Instant::now() < deadline, "no step within two minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    said(&child.wait_with_output().unwrap())
}

#[test]
fn curves_have_runs_of_their_own_and_an_interrupted_run_comes_to_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let config = CONFIG
        .replace("\nlabelled_counts = []", "\nlabelled_counts = [4, 5]")
        .replace(
            "unlabelled_counts = []",
            "unlabelled_counts = [0, 2]\ncurve_seeds = 1\narms = [\"real_only\", \"gated\"]",
        )
        .replace(
            "widths = [4, 8]\nsteps = 3\n[segmentor",
            "widths = [4, 8]\nsteps = 500\n[segmentor",
        );
    std::fs::write(dir.join("c.toml"), &config).unwrap();
    // Of either curve the point with 4 labelled and 2 unlabelled patients is an arm's.
    let runs = [
        "real_only-l4-u0-s0",
        "gated-l4-u2-s0",
        "real_only-l5-u0-s0",
        "gated-l5-u2-s0",
        "gated-l4-u0-s0",
    ];
    let listed = said(&experiment(dir, &["--list"]));
    assert!(runs.iter().all(|run| listed.contains(run)), "{listed}");
    assert!(listed.contains("0 of 5 runs are done"), "{listed}");

    let stopped = interrupted(dir, runs[0], &["--arms", "real_only"]);
    assert!(stopped.contains("the same command goes on"), "{stopped}");
    said(&experiment(dir, &[]));
    let document = results(dir);
    let went_on = |run: &&Value| run.get("went_on") == Some(&Value::Bool(true));
    assert_eq!(document["runs"].as_array().unwrap().iter().filter(went_on).count(), 1);
    let scores = [
        &document["labelled"]["4"]["real_only"],
        &document["labelled"]["5"]["gated"],
        &document["scaling"]["0"],
        &document["scaling"]["2"],
    ];
    for point in scores {
        assert_eq!(point["tumour_dsc"][0].as_array().map(Vec::len), Some(3), "{document}");
    }
    for picture in ["r-labelled.svg", "r-unlabelled.svg"] {
        let svg = std::fs::read_to_string(dir.join("results").join(picture)).unwrap();
        assert!(svg.starts_with("<svg xmlns="), "{picture}");
    }

    // Uninterrupted, in another folder, the run has the same scores, and the same weights.
    let weights = |dir: &Path| std::fs::read(dir.join("out/runs").join(runs[0]).join("segmentor.safetensors")).unwrap();
    let whole = tempfile::tempdir().unwrap();
    std::fs::write(whole.path().join("c.toml"), &config).unwrap();
    said(&experiment(whole.path(), &["--arms", "real_only", "--labelled", "4"]));
    assert_eq!(
        results(whole.path())["arms"]["real_only"],
        document["arms"]["real_only"]
    );
    assert!(weights(dir) == weights(whole.path()), "the weights differ");
}
