//! The built-in presets: data, in `presets.toml`, with the data set's page and licence beside what its ids mean.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde::Deserialize;

use super::IngestError;
use super::preset::Preset;

static BUILT_IN: LazyLock<Vec<BuiltIn>> = LazyLock::new(|| {
    let file: File = toml::from_str(include_str!("presets.toml")).expect("a test reads the embedded presets");
    file.preset
});

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    preset: Vec<BuiltIn>,
}

/// A data set whose labels are understood.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuiltIn {
    /// The preset's name.
    pub name: String,
    /// The data set, and which part or version of it.
    pub data_set: String,
    /// Where the data set lives.
    pub page: String,
    /// The licence that its page names.
    pub licence: String,
    /// Where the ids were read.
    pub checked: String,
    annotated: Vec<String>,
    #[serde(default)]
    assumed_tumour_free: bool,
    /// TOML keys are strings.
    ids: BTreeMap<String, String>,
    /// The class of all ids that are not listed.
    others: Option<String>,
    #[serde(default)]
    masks: BTreeMap<String, u8>,
}

impl BuiltIn {
    /// Returns all built-in presets, in the order in which they are listed to users.
    pub fn all() -> &'static [Self] {
        &BUILT_IN
    }

    /// Returns the listed ids with their classes.
    fn ids(&self) -> impl Iterator<Item = (u8, &str)> {
        self.ids
            .iter()
            .map(|(id, class)| (id.parse().expect("a test reads the ids"), class.as_str()))
    }

    /// Returns the classes that the preset names.
    pub(super) fn classes(&self) -> impl Iterator<Item = &str> {
        self.ids.values().chain(&self.annotated).map(String::as_str)
    }

    fn preset(&self) -> Preset {
        let mut map = BTreeMap::new();
        if let Some(others) = &self.others {
            map.extend((0..=255).map(|id| (id, others.clone())));
        }
        map.extend(self.ids().map(|(id, class)| (id, class.to_string())));
        Preset {
            name: self.name.clone(),
            map,
            masks: self.masks.clone(),
            annotated: self.annotated.clone(),
            assumed_tumour_free: self.assumed_tumour_free,
            kind: None,
        }
    }

    /// Tells whether label ids of one data set look like this one's: all are known, and every annotated class is there.
    /// A preset that says nothing of what is there fits nothing.
    fn fits(&self, found: &BTreeSet<u8>) -> bool {
        let ids: BTreeMap<u8, &str> = self.ids().collect();
        let is_known = |id: &u8| *id == 0 || self.others.is_some() || ids.contains_key(id);
        let occurs = |class: &String| ids.iter().any(|(id, name)| name == class && found.contains(id));
        !self.annotated.is_empty() && found.iter().all(is_known) && self.annotated.iter().all(occurs)
    }

    /// Returns the row of the table of presets.
    fn row(&self) -> String {
        let mut ids: Vec<(u8, &str)> = self.ids().collect();
        ids.sort_unstable();
        let mut ids: Vec<String> = ids.iter().map(|(id, class)| format!("{id} {class}")).collect();
        ids.extend(self.others.as_ref().map(|class| format!("all others {class}")));
        let free = if self.assumed_tumour_free { "yes" } else { "no" };
        format!(
            "| `{}` | {} | {} | {} | {free} | {} | {} |\n",
            self.name,
            self.data_set,
            ids.join(", "),
            self.annotated.join(", "),
            self.licence,
            self.page
        )
    }
}

/// Returns a built-in preset.
///
/// # Errors
/// [`IngestError::Preset`] lists the names that exist.
pub(super) fn named(name: &str) -> Result<Preset, IngestError> {
    let found = BUILT_IN.iter().find(|built_in| built_in.name == name);
    found.map(BuiltIn::preset).ok_or_else(|| {
        let names: Vec<&str> = BUILT_IN.iter().map(|built_in| built_in.name.as_str()).collect();
        IngestError::Preset {
            name: name.into(),
            what: format!("unknown; expected one of {} or a TOML file", names.join(", ")),
        }
    })
}

/// Returns the names of the built-in presets that label ids look like.
pub(super) fn candidates(found: &BTreeSet<u8>) -> Vec<&'static str> {
    let fitting = BUILT_IN.iter().filter(|built_in| built_in.fits(found));
    fitting.map(|built_in| built_in.name.as_str()).collect()
}

/// Returns the table of built-in presets in Markdown, as `freetumor ingest --list-presets` prints it.
pub fn preset_table() -> String {
    let head = "| preset | data set | ids | annotated | assumed tumour-free | licence of the data | page |\n\
                |---|---|---|---|---|---|---|\n";
    head.to_string() + &BUILT_IN.iter().map(BuiltIn::row).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Plan;

    #[test]
    fn every_embedded_preset_can_be_used_with_a_plan_of_its_classes() {
        assert!(BuiltIn::all().len() >= 17);
        for built_in in BuiltIn::all() {
            let named_classes = built_in
                .classes()
                .filter(|class| !["background", "ignore"].contains(class));
            // A plan has no tumour without its organ.
            let classes: BTreeSet<&str> = named_classes
                .flat_map(|class| [class, class.strip_suffix("_tumour").unwrap_or(class)])
                .collect();
            let ids: BTreeMap<&str, u8> = std::iter::once("background").chain(classes).zip(0..).collect();
            let plan = Plan {
                labels: serde_json::from_value(serde_json::json!(ids)).unwrap(),
                ..Plan::default()
            };
            let resolved = named(&built_in.name).unwrap().resolve(&plan).unwrap();
            assert_eq!(resolved.annotation.classes, built_in.annotated, "{}", built_in.name);
        }
        let names: BTreeSet<&str> = BuiltIn::all().iter().map(|built_in| built_in.name.as_str()).collect();
        assert_eq!(names.len(), BuiltIn::all().len(), "a name stands for one data set");
    }

    #[test]
    fn ids_point_to_the_presets_they_look_like() {
        assert_eq!(
            candidates(&[0, 1, 2].into()),
            [
                "lits",
                "msd-liver",
                "msd-pancreas",
                "kits",
                "kits19",
                "kits21",
                "kits23"
            ]
        );
        assert_eq!(
            candidates(&(0..=13).collect()),
            ["flare22", "btcv", "totalsegmentator", "totalsegmentator-v1"]
        );
        assert!(candidates(&[0, 200].into()).is_empty());
    }

    #[test]
    fn the_table_has_every_preset_and_its_licence() {
        let table = preset_table();
        assert_eq!(table.lines().count(), BuiltIn::all().len() + 2);
        assert!(table.contains("| `kits` | KiTS, any year | 1 kidney, 2 kidney_tumour, 3 kidney |"));
    }
}
