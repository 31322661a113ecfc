//! Which files to ingest: a datalist in the form of the Medical Segmentation Decathlon, or one image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::IngestError;

/// The most bytes of a datalist: over 10^5 cases.
const MAX_BYTES: u64 = 64 << 20;

/// The list of a datalist that an entry stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Section {
    /// `training`.
    Training,
    /// `validation`.
    Validation,
    /// `unlabeled`: no tumours were annotated, whatever the preset says; organ labels are welcome.
    Unlabeled,
    /// `test`: images to be predicted, which nothing else is made of.
    Test,
}

/// One case to ingest.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The case's id in the store.
    pub id: String,
    /// The image file.
    pub image: PathBuf,
    /// The label file, if there is one.
    pub labels: Option<PathBuf>,
    /// Where the datalist has it.
    pub section: Section,
    /// Whose scan it is, where the datalist says so.
    pub patient: Option<String>,
}

#[derive(Deserialize)]
struct Datalist {
    #[serde(default)]
    training: Vec<Item>,
    #[serde(default)]
    validation: Vec<Item>,
    #[serde(default)]
    unlabeled: Vec<Item>,
    #[serde(default)]
    test: Vec<Item>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "an entry: expected the path of an image, or an object with `image` and perhaps `label`, `id` and `patient`"
)]
enum Item {
    Image(String),
    Pair {
        image: String,
        #[serde(default)]
        label: Option<String>,
        #[serde(default)]
        id: Option<String>,
        #[serde(default)]
        patient: Option<String>,
    },
}

/// Reads a datalist; paths are relative to its folder. Other keys of the file, such as `modality`, are left alone.
///
/// # Errors
/// [`IngestError::Datalist`] names the file, the key or the entry.
pub fn read(path: &Path) -> Result<Vec<Entry>, IngestError> {
    read_lists(path, false)
}

/// Does what [`read`] does, and reads the list `test` too.
///
/// # Errors
/// As [`read`].
pub fn read_with_test(path: &Path) -> Result<Vec<Entry>, IngestError> {
    read_lists(path, true)
}

fn read_lists(path: &Path, with_test: bool) -> Result<Vec<Entry>, IngestError> {
    let refused = |what: String| IngestError::Datalist {
        path: path.into(),
        what,
    };
    let bytes = fs_err::metadata(path)
        .map_err(|error| refused(error.to_string()))?
        .len();
    if bytes > MAX_BYTES {
        return Err(refused(format!("{bytes} bytes, at most {MAX_BYTES}")));
    }
    let text = fs_err::read_to_string(path).map_err(|error| refused(error.to_string()))?;
    let list: Datalist = serde_json::from_str(&text).map_err(|error| refused(error.to_string()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let sections = [
        (Section::Training, list.training),
        (Section::Validation, list.validation),
        (Section::Unlabeled, list.unlabeled),
        (Section::Test, if with_test { list.test } else { Vec::new() }),
    ];
    let mut entries = Vec::new();
    for (section, items) in sections {
        for item in items {
            let (image, labels, id, patient) = match item {
                Item::Image(image) => (image, None, None, None),
                Item::Pair {
                    image,
                    label,
                    id,
                    patient,
                } => (image, label, id, patient),
            };
            entries.push((
                id,
                Entry {
                    id: String::new(),
                    image: folder.join(image),
                    labels: labels.map(|label| folder.join(label)),
                    section,
                    patient,
                },
            ));
        }
    }
    if entries.is_empty() {
        return Err(refused("no entries under training, validation or unlabeled".into()));
    }
    name_entries(entries).map_err(refused)
}

/// Returns the one entry of an image with or without labels.
pub fn single(image: &Path, labels: Option<&Path>) -> Entry {
    Entry {
        id: plain_id(&stem(image)),
        image: image.into(),
        labels: labels.map(Into::into),
        section: Section::Training,
        patient: None,
    }
}

/// Gives every entry an id: its own, else its image's name, with the folder's before it where names repeat.
fn name_entries(entries: Vec<(Option<String>, Entry)>) -> Result<Vec<Entry>, String> {
    let mut stems: BTreeMap<String, usize> = BTreeMap::new();
    for (id, entry) in &entries {
        if id.is_none() {
            *stems.entry(plain_id(&stem(&entry.image))).or_default() += 1;
        }
    }
    let mut owners: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut named = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let short = plain_id(&stem(&entry.image));
        let id = match id {
            Some(id) => id,
            None if stems[&short] == 1 => short,
            None => {
                let folder = entry.image.parent().and_then(Path::file_name).unwrap_or_default();
                plain_id(&format!("{}_{short}", folder.to_string_lossy()))
            }
        };
        if let Some(other) = owners.insert(id.clone(), entry.image.clone()) {
            return Err(format!(
                "{} and {} would both be case {id:?}: give one of them an \"id\"",
                other.display(),
                entry.image.display()
            ));
        }
        named.push(Entry { id, ..entry });
    }
    Ok(named)
}

fn stem(image: &Path) -> String {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.strip_suffix(".nii").unwrap_or(name).to_string()
}

/// Replaces what an id may not hold.
fn plain_id(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '-'
            }
        })
        .collect();
    plain.trim_start_matches('.').chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Entry>, IngestError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dataset.json");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn decathlon_lists_are_read() {
        let entries = parse(
            r#"{"name": "x", "training": [{"image": "./a/liver_1.nii.gz", "label": "l/liver_1.nii.gz"}],
                "validation": ["a/liver 2.nii"], "unlabeled": [{"image": "s1/ct.nii.gz"}, "s2/ct.nii.gz"]}"#,
        )
        .unwrap();
        let ids: Vec<_> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["liver_1", "liver-2", "s1_ct", "s2_ct"]);
        assert!(entries[0].labels.as_ref().unwrap().ends_with("l/liver_1.nii.gz"));
        assert_eq!(entries[3].section, Section::Unlabeled);
        let named = parse(r#"{"training": [{"image": "a.nii", "patient": "p1"}, "b.nii"]}"#).unwrap();
        assert_eq!(
            (named[0].patient.as_deref(), named[1].patient.as_deref()),
            (Some("p1"), None)
        );
    }

    #[test]
    fn lists_that_cannot_be_used_are_refused_by_name() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(error("{}").contains("dataset.json: datalist: no entries"));
        assert!(error("{\"training\": 3}").contains("training") || error("{\"training\": 3}").contains("sequence"));
        assert!(error(r#"{"training": ["a/x.nii", "a/x.nii"]}"#).contains("both be case"));
        assert!(
            read(Path::new("/nowhere/list.json"))
                .unwrap_err()
                .to_string()
                .contains("/nowhere/list.json")
        );
    }
}
