//! The documents: links lead somewhere, and the recipe's page knows every field.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use freetumor::stream::recipe::Recipe;

/// Lists the documents that people read.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [
        root.to_path_buf(),
        root.join("docs"),
        root.join("docs/experiments"),
        root.join("python"),
    ];
    let files = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let paths = files.map(|file| file.unwrap().path());
    let mut documents: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|end| end == "md"))
        .collect();
    documents.sort();
    documents
}

/// Returns a document's text without its blocks of code.
fn prose(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.split("\n```").step_by(2).collect::<Vec<_>>().join("\n")
}

/// Returns the name that a heading is linked by: lower case, spaces to hyphens, no other marks.
fn anchor(heading: &str) -> String {
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() })
        .collect()
}

fn anchors(path: &Path) -> BTreeSet<String> {
    let text = prose(path);
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let headings = headings.map(|line| line.trim_start_matches('#').trim());
    headings.map(anchor).collect()
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let mut dead = Vec::new();
    let mut count = 0;
    for path in documents() {
        let text = prose(&path);
        for part in text.split("](").skip(1) {
            let link = part.split(')').next().unwrap();
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let is_there = target.exists() && (section.is_empty() || anchors(&target).contains(section));
            if !is_there {
                dead.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(count > 100, "{count} links");
    assert!(dead.is_empty(), "{dead:#?}");
}

/// Collects the names of all fields of a recipe's table, and of the tables in it: what the parser expects in place of an unknown one.
fn fields(path: &[&str], names: &mut BTreeSet<String>) {
    let inner = serde_json::json!({"?": 1});
    let asked = path
        .iter()
        .rev()
        .fold(inner, |value, name| serde_json::json!({*name: value}));
    // Shares take any name.
    let error = serde_json::from_value::<Recipe>(asked)
        .err()
        .map_or(String::new(), |error| error.to_string());
    let Some((_, expected)) = error.split_once("unknown field `?`, expected ") else {
        return;
    };
    for name in expected.split('`').skip(1).step_by(2) {
        names.insert(name.into());
        fields(&[path, &[name]].concat(), names);
    }
}

#[test]
fn the_recipes_page_has_every_field() {
    let mut names = BTreeSet::new();
    fields(&[], &mut names);
    for name in ["bundle", "hold_out_hashes", "blur", "noise_hu", "realism"] {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    assert!(names.len() > 25, "{names:?}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipe.md");
    let text = std::fs::read_to_string(path).unwrap();
    let has = |name: &String| text.contains(&format!("`{name}`")) || text.contains(&format!(".{name}`"));
    let absent: Vec<&String> = names
        .iter()
        .filter(|name| !has(name) && !["lesion", "augment", "gate", "select"].contains(&name.as_str()))
        .collect();
    assert!(absent.is_empty(), "{absent:?}");
}
