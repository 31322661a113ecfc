//! The reference under `docs/reference` is what the program says of itself: flags, defaults, metrics, HTTP.
//!
//! After a change: `FREETUMOR_BLESS=1 cargo test --release --test reference`, and look at the difference.

mod support;

use std::path::Path;

use support::run;

fn compare(name: &str, current: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference").join(name);
    if std::env::var_os("FREETUMOR_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().expect("a file in a folder")).expect("the folder is ours to make");
        std::fs::write(&path, current).expect("the file is ours to write");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == current,
        "docs/reference/{name} is out of date: FREETUMOR_BLESS=1 cargo test --release --test reference"
    );
}

#[test]
fn flags() {
    let commands = [
        "demo",
        "phantom",
        "ingest",
        "duplicates",
        "train",
        "train critic",
        "train synthesizer",
        "train segmentor",
        "serve",
        "label-organs",
        "evaluate",
        "bench",
        "bench nn",
        "bench store",
        "bench sampler",
        "info",
        "check-config",
        "healthcheck",
    ];
    let mut text = String::from("# Command line\n\nGenerated from the program by `tests/reference.rs`.\n");
    for command in std::iter::once("").chain(commands) {
        let mut arguments: Vec<&str> = command.split_whitespace().collect();
        arguments.push("--help");
        let said = run(&arguments);
        assert_eq!(said.code, Some(0), "{command}: {}", said.text);
        let leaf =
            !command.is_empty() && command != "train" && command != "train critic" && !command.starts_with("train ");
        assert!(
            !leaf || said.text.contains("Example"),
            "{command} --help has no example"
        );
        text += &format!("\n## freetumor {command}\n\n```text\n{}\n```\n", said.text.trim_end());
    }
    compare("command-line.md", &text);
}

#[test]
fn configuration_keys_and_defaults() {
    let said = run(&["check-config"]);
    assert_eq!(said.code, Some(0), "{}", said.text);
    let head = "# Every key with its default. Generated from the program by `tests/reference.rs`.\n\n";
    compare("defaults.toml", &format!("{head}{}", said.text));
}

#[test]
fn metric_names() {
    let mut text = String::from(
        "# Metrics\n\nGenerated from the program by `tests/reference.rs`.\n\n| name | kind | labels | meaning |\n|---|---|---|---|\n",
    );
    for (name, kind, labels, meaning) in freetumor::telemetry::metrics::METRICS {
        assert!(name.starts_with("freetumor_"), "{name}");
        text += &format!(
            "| `{name}` | {} | {} | {meaning} |\n",
            format!("{kind:?}").to_lowercase(),
            labels.join(", ")
        );
    }
    compare("metrics.md", &text);
}

#[test]
fn http_api() {
    let document = freetumor::http::openapi_document();
    compare(
        "openapi.json",
        &(serde_json::to_string_pretty(&document).unwrap() + "\n"),
    );
}
