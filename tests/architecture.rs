//! Holds the directions in which modules may depend on each other: an edge that is not listed fails.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Modules that every other may use: the domain's types, digests, random numbers and what a panic said.
const COMMON: [&str; 4] = ["volume", "digest", "rng", "panic"];

/// For each module, what else it may use.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let edges = [
        ("volume", ""),
        ("digest", ""),
        ("rng", ""),
        ("panic", ""),
        ("store", ""),
        ("ingest", "store"),
        ("phantom", "store ingest"),
        ("sampler", "store"),
        ("lesion", "store"),
        ("kernel", ""),
        ("nn", "kernel"),
        ("checkpoint", "nn kernel"),
        ("telemetry", ""),
        ("synth", "nn sampler lesion store checkpoint telemetry"),
        ("stream", "synth sampler store checkpoint telemetry nn lesion kernel"),
        ("wire", "stream sampler"),
        ("evaluate", "nn store checkpoint"),
        ("organs", "store"),
        (
            "learn",
            "nn stream checkpoint evaluate synth lesion store sampler telemetry kernel",
        ),
        (
            "experiment",
            "phantom learn stream store sampler synth checkpoint evaluate ingest kernel",
        ),
        ("jobs", "learn stream store checkpoint nn kernel telemetry"),
        ("http", "stream sampler wire checkpoint telemetry jobs"),
    ];
    edges
        .into_iter()
        .map(|(module, uses)| (module, uses.split_whitespace().collect()))
        .collect()
}

fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            out.push(path);
        }
    }
}

/// Returns the crate's modules that a source file names, tests and comments left out.
fn uses(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = lines.collect::<Vec<_>>().join("\n");
    code.split("crate::")
        .skip(1)
        .flat_map(|rest| match rest.strip_prefix('{') {
            // A nested import: the first segment of every member at depth one.
            Some(group) => heads(group),
            None => vec![word(rest)],
        })
        .filter(|name| !name.is_empty())
        .collect()
}

fn word(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
        .collect()
}

fn heads(group: &str) -> Vec<String> {
    let (mut depth, mut at_head, mut out) = (0, true, Vec::new());
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => at_head = true,
            c if at_head && c.is_ascii_alphabetic() => {
                out.push(word(&group[i..]));
                at_head = false;
            }
            _ => {}
        }
    }
    out
}

#[test]
fn modules_depend_only_on_what_is_listed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (allowed, mut files) = (allowed(), Vec::new());
    sources(&root, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let text = std::fs::read_to_string(&file).unwrap();
        // The wiring and the crate's own map may name anything; configuration only composes.
        if ["lib", "main", "cli", "config"].contains(&module) {
            continue;
        }
        let Some(may) = allowed.get(module) else {
            wrong.push(format!(
                "{}: module {module} is not listed in this test",
                inside.display()
            ));
            continue;
        };
        for used in uses(&text) {
            let known = allowed.contains_key(used.as_str()) || ["cli", "config"].contains(&used.as_str());
            if known && used != module && !COMMON.contains(&used.as_str()) && !may.contains(used.as_str()) {
                wrong.push(format!("{}: {module} -> {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that are not allowed:\n{}", wrong.join("\n"));
}

#[test]
fn async_and_networks_stay_where_they_belong() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let homes = [
        ("tokio", vec!["http", "cli", "main"]),
        ("axum", vec!["http", "cli"]),
        (
            "burn",
            vec![
                "kernel",
                "nn",
                "synth",
                "learn",
                "checkpoint",
                "evaluate",
                "experiment",
                "jobs",
                "cli",
            ],
        ),
    ];
    let mut files = Vec::new();
    sources(&root, &mut files);
    for file in files {
        let inside = file.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for (library, at_home) in &homes {
            let named = code
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(&format!("{library}::")));
            assert!(
                !named || at_home.contains(&module),
                "{}: {module} uses {library}",
                inside.display()
            );
        }
    }
}

#[test]
fn nested_imports_are_read() {
    let text = "use crate::{\n    digest::Digest,\n    volume::{Plan, Region},\n};\nfn f() { crate::http::g() }";
    let found = uses(text);
    assert_eq!(found, ["digest", "http", "volume"].map(String::from).into());
}
