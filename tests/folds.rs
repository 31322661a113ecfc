//! `freetumor train --folds`: one bundle per fold, none of which saw its own.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output};

use freetumor::checkpoint::{Role, load_manifest};
use freetumor::learn::Split;
use freetumor::store::{Cases, Store};

const CONFIG: &str = r#"
[plan]
spacing_mm = [8.0, 8.0, 8.0]
patch = [16, 16, 16]

[critic]
widths = [4, 8]
steps = 2
voxels_per_step = 4096
max_cube = 16

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
"#;

fn freetumor(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freetumor"));
    command
        .current_dir(dir)
        .args(args)
        .output()
        .expect("the binary was built with this test")
}

#[track_caller]
fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("JSON is text")
}

/// Makes a store of so many labelled phantoms in a folder.
fn make_store(dir: &Path, labelled: &str) {
    let phantom = [
        "phantom",
        "--config",
        "c.toml",
        "--store",
        "s",
        "--unlabelled",
        "0",
        "--labelled",
        labelled,
    ];
    ok(&freetumor(dir, &phantom));
}

#[test]
fn every_fold_has_a_bundle_that_never_saw_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("c.toml"), CONFIG).unwrap();
    make_store(dir, "6");
    let train = [
        "train", "critic", "--config", "c.toml", "--store", "s", "--out", "m", "--folds", "3",
    ];
    let reports: serde_json::Value = serde_json::from_str(&ok(&freetumor(dir, &train))).unwrap();
    assert_eq!(reports.as_array().unwrap().len(), 3);

    let store = Store::open(dir.join("s")).unwrap();
    let mut held_out_somewhere = BTreeSet::new();
    for fold in 0..3 {
        let manifest = load_manifest(&dir.join(format!("m/fold-{fold}")), Role::Critic).unwrap();
        let seen = manifest.training.unwrap().source_hashes;
        let split = Split {
            folds: 3,
            fold,
            ..Split::default()
        };
        let (_, held_out) = split.divide(&store).unwrap();
        assert!(!held_out.is_empty());
        // Labelled hosts have a judge that never saw them, either.
        for inner in 0..3 {
            let inner = load_manifest(&dir.join(format!("m/fold-{fold}/inner-{inner}")), Role::Critic).unwrap();
            let inner = inner.training.unwrap().source_hashes;
            assert!(inner.len() < seen.len() && inner.iter().all(|hash| seen.contains(hash)));
        }
        for case in held_out {
            assert!(
                !seen.contains(&store.records()[case].source_hash),
                "fold {fold} saw case {case}"
            );
            held_out_somewhere.insert(case);
        }
    }
    assert_eq!(held_out_somewhere.len(), 6, "every case is held out by one fold");

    // What is done is passed over, and a file that names other folds is refused.
    let again = freetumor(dir, &[&train[..], &["--resume"]].concat());
    assert_eq!(serde_json::from_str::<serde_json::Value>(&ok(&again)).unwrap(), reports);
    assert!(String::from_utf8_lossy(&again.stderr).contains("fold 2: already trained"));
    // A generator that was made with another critic than lies there is trained again, here to the same; a critic is not.
    let synthesizer = [&["train", "synthesizer"], &train[2..]].concat();
    ok(&freetumor(dir, &synthesizer));
    let passed_over = |of: &[&str], fold: usize| {
        let again = freetumor(dir, &[of, &["--resume"]].concat());
        ok(&again);
        String::from_utf8_lossy(&again.stderr).contains(&format!("fold {fold}: already trained"))
    };
    assert!(passed_over(&train, 1) && passed_over(&synthesizer, 1));
    let critic = dir.join("m/fold-1/critic.json");
    std::fs::write(&critic, std::fs::read(&critic).unwrap()).unwrap();
    assert!(passed_over(&train, 1) && !passed_over(&synthesizer, 1));
    assert!(passed_over(&synthesizer, 1), "it is newer now");
    // A fold that lacks one of its inner critics is not done.
    std::fs::remove_dir_all(dir.join("m/fold-2/inner-1")).unwrap();
    assert!(!passed_over(&train, 2) && passed_over(&train, 2));
    assert!(dir.join("m/fold-2/inner-1/critic.json").exists());
    // Without critics of inner folds it is another configuration's, as is what follows.
    let without = freetumor(dir, &[&train[..], &["--resume", "--no-inner-folds"]].concat());
    assert!(!without.status.success());
    std::fs::write(
        dir.join("c.toml"),
        CONFIG.to_string() + "\n[critic.optimizer]\nlearning_rate = 0.002\n",
    )
    .unwrap();
    let other = freetumor(dir, &[&train[..], &["--resume"]].concat());
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(
        !other.status.success() && said.contains("belongs to another configuration or store"),
        "{said}"
    );
    let with_file = CONFIG.to_string() + "\n[critic.split]\nfile = \"splits_final.json\"\n";
    std::fs::write(dir.join("c.toml"), with_file).unwrap();
    let refused = freetumor(dir, &train);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("critic.split.file already names the folds"));
}

/// Returns the number of a logged step.
fn step_of(line: &str) -> u64 {
    let line: serde_json::Value = serde_json::from_str(line).expect("lines are JSON");
    line["step"].as_u64().expect("every line has its step")
}

/// Waits until a run has logged so many steps; returns the last one's number.
fn wait_for_steps(log: &Path, steps: usize) -> u64 {
    for _ in 0..3000 {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let whole: Vec<&str> = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
        if whole.len() >= steps {
            return step_of(whole[whole.len() - 1]);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("no {steps} steps within a minute");
}

/// Returns an address that nobody listens at.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").to_string()
}

/// Asks a run that has made a step for metrics, until they tell of it.
fn scrape(address: &str) -> String {
    let ask = || -> std::io::Result<String> {
        let mut socket = std::net::TcpStream::connect(address)?;
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let mut answer = String::new();
    for _ in 0..1000 {
        answer = ask().unwrap_or_default();
        if ["freetumor_training_loss", "gradient_norm"]
            .iter()
            .all(|name| answer.contains(name))
        {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    answer
}

/// Starts a run, does something when it has logged so many steps, sends SIGTERM, and returns what it said and reported; it must end as
/// done.
fn told_to_stop(
    dir: &Path,
    (args, environment): (&[&str], &[(&str, &str)]),
    (log, steps): (&Path, usize),
    before: impl FnOnce(),
) -> (String, String) {
    let child = Command::new(env!("CARGO_BIN_EXE_freetumor"))
        .current_dir(dir)
        .args(args)
        .envs(environment.iter().copied())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary was built with this test");
    wait_for_steps(log, steps);
    before();
    Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .expect("a system that knows kill");
    let ended = child.wait_with_output().expect("its outputs are pipes");
    let [said, reported] = [&ended.stderr, &ended.stdout].map(|text| String::from_utf8_lossy(text).into_owned());
    assert_eq!(ended.status.code(), Some(0), "{said}");
    (said, reported)
}

#[test]
fn a_training_that_is_told_to_stop_saves_says_so_and_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("c.toml"), CONFIG.replace("steps = 2", "steps = 1000000")).unwrap();
    make_store(dir, "2");
    let log = dir.join("m/critic.metrics.jsonl");
    let mut stopped_after = 0;
    // What was written beside the weights says all that the first run was told, the environment's words too: with less, the second one would
    // find another configuration's state.
    let rate = [("FREETUMOR__CRITIC__OPTIMIZER__LEARNING_RATE", "0.002")];
    for (config, environment) in [("c.toml", &rate[..]), ("m/critic.config.toml", &[])] {
        let train = [
            "train", "critic", "--config", config, "--store", "s", "--out", "m", "--resume",
        ];
        // Far from a checkpoint (every hundredth step): what was done is saved all the same.
        let address = free_address();
        let train = [&train[..], &["--metrics", &address]].concat();
        let mut scraped = String::new();
        let (said, _) = told_to_stop(dir, (&train, environment), (&log, stopped_after as usize + 3), || {
            scraped = scrape(&address);
        });
        let has = |start: &str| scraped.lines().any(|line| line.starts_with(start));
        assert!(
            has("freetumor_training_loss{stage=\"critic\"} ")
                && has("freetumor_training_measure{stage=\"critic\",name=\"gradient_norm\"} "),
            "{scraped}"
        );
        let step = wait_for_steps(&log, 1);
        assert!(
            said.contains(&format!("saved and stopped after step {step}; go on with --resume")),
            "{said}"
        );
        assert!(
            said.contains("metrics on http://127.0.0.1:") && step > stopped_after,
            "{said}"
        );
        stopped_after = step;
    }
    // Every step once: the second run went on where the first had stopped.
    let text = std::fs::read_to_string(&log).unwrap();
    let steps = text.lines().map(step_of);
    assert!(steps.eq(1..=stopped_after));
    let written = std::fs::read_to_string(dir.join("m/critic.config.toml")).unwrap();
    assert!(written.contains("learning_rate = 0.002"), "{written}");
}

/// Whether the signal comes while the first fold's cases are scored or when the second one trains: the run ends.
#[test]
fn a_run_over_folds_that_is_told_to_stop_after_the_first_does_not_train_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("c.toml"), CONFIG.replace("steps = 2", "steps = 20")).unwrap();
    make_store(dir, "4");
    let train = [
        "train",
        "critic",
        "--config",
        "c.toml",
        "--store",
        "s",
        "--out",
        "m",
        "--folds",
        "2",
        "--no-inner-folds",
    ];
    let log = dir.join("m/fold-0/critic.metrics.jsonl");
    let (said, reported) = told_to_stop(dir, (&train, &[]), (&log, 20), || ());
    assert!(said.contains("go on with --resume") && reported.is_empty(), "{said}");
    let reports = ok(&freetumor(dir, &[&train[..], &["--resume"]].concat()));
    let reports: serde_json::Value = serde_json::from_str(&reports).unwrap();
    assert_eq!(reports.as_array().unwrap().len(), 2);
}
