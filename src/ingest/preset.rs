//! Presets: what the ids in a data set's label files mean, and what its annotators looked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::IngestError;
use super::built_in::{self, BuiltIn};
use crate::store::CaseKind;
use crate::volume::{Annotation, BACKGROUND, IGNORE, Plan};

/// The class of a file id that a loss must leave out.
const IGNORE_CLASS: &str = "ignore";

/// What the ids in a data set's label files mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// The preset's name, or the file it comes from.
    #[serde(default)]
    pub name: String,
    /// Class names by file id; `background` and `ignore` are classes, id 0 is background unless it says otherwise.
    pub map: BTreeMap<u8, String>,
    /// File ids by the names of mask files, without their ends: what labels in a folder, one file a structure, stand for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub masks: BTreeMap<String, u8>,
    /// Classes whose absence in a label file means absence in the patient.
    pub annotated: Vec<String>,
    /// Whether organs without annotated tumours are taken to be healthy.
    #[serde(default)]
    pub assumed_tumour_free: bool,
    /// Whether cases with labels count as labelled; by default where a tumour class is annotated.
    #[serde(default)]
    pub kind: Option<CaseKind>,
}

/// The TOML form has string keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CustomPreset {
    map: BTreeMap<String, String>,
    #[serde(default)]
    masks: BTreeMap<String, u8>,
    annotated: Vec<String>,
    #[serde(default)]
    assumed_tumour_free: bool,
    kind: Option<CaseKind>,
}

/// A preset in a plan's ids.
#[derive(Clone, Debug)]
pub struct ResolvedPreset {
    /// The stored id of every file id; absent ids are refused.
    pub table: [Option<u8>; 256],
    /// What the annotators looked for.
    pub annotation: Annotation,
    /// Whether tumours were annotated.
    pub kind: CaseKind,
}

impl Preset {
    /// Returns a built-in preset.
    ///
    /// # Errors
    /// [`IngestError::Preset`] lists the names that exist.
    pub fn named(name: &str) -> Result<Self, IngestError> {
        built_in::named(name)
    }

    /// Reads a custom preset: `annotated`, `assumed_tumour_free`, `kind`, a table `[map]` of `id = "class"`, and for folders of
    /// masks a table `[masks]` of `file = id`.
    ///
    /// # Errors
    /// [`IngestError::Preset`] names the file and the key.
    pub fn from_toml(path: &Path) -> Result<Self, IngestError> {
        let name = path.display().to_string();
        let refused = |what: String| IngestError::Preset {
            name: name.clone(),
            what,
        };
        let text = fs_err::read_to_string(path).map_err(|error| refused(error.to_string()))?;
        let custom: CustomPreset = toml::from_str(&text).map_err(|error| refused(error.to_string()))?;
        let mut map = BTreeMap::new();
        for (key, class) in custom.map {
            let id = key
                .parse()
                .map_err(|_| refused(format!("map: expected ids 0 to 255, got {key:?}")))?;
            map.insert(id, class);
        }
        Ok(Self {
            name: name.clone(),
            map,
            masks: custom.masks,
            annotated: custom.annotated,
            assumed_tumour_free: custom.assumed_tumour_free,
            kind: custom.kind,
        })
    }

    /// Returns a built-in preset, or reads the TOML file of that path.
    ///
    /// # Errors
    /// As [`Preset::named`] and [`Preset::from_toml`].
    pub fn open(name: &str) -> Result<Self, IngestError> {
        if name.ends_with(".toml") {
            return Self::from_toml(Path::new(name));
        }
        Self::named(name)
    }

    /// Translates to the plan's ids. A tumour class that the plan lacks counts as its organ, an organ that it lacks as
    /// background; so a tumour whose organ the plan lacks too is background, as all the rest of that organ is.
    ///
    /// # Errors
    /// [`IngestError::Preset`] where the plan has none of the annotated classes, or a class has no meaning at all.
    pub fn resolve(&self, plan: &Plan) -> Result<ResolvedPreset, IngestError> {
        let refused = |what: String| IngestError::Preset {
            name: self.name.clone(),
            what,
        };
        let is_known = |class: &str| is_class_of_a_data_set(class) || plan.labels.id(class).is_ok();
        let mut table = [None; 256];
        table[0] = Some(BACKGROUND);
        for (&id, class) in &self.map {
            if class != IGNORE_CLASS && !is_known(class) {
                return Err(refused(format!("map: id {id}: unknown class {class:?}")));
            }
            let organ = class.strip_suffix("_tumour").unwrap_or(class);
            let stored = match class.as_str() {
                IGNORE_CLASS => IGNORE,
                _ => plan
                    .labels
                    .id(class)
                    .or_else(|_| plan.labels.id(organ))
                    .unwrap_or(BACKGROUND),
            };
            table[usize::from(id)] = Some(stored);
        }
        if let Some(class) = self.annotated.iter().find(|class| !is_known(class)) {
            return Err(refused(format!("annotated: unknown class {class:?}")));
        }
        let is_name = |file: &str| !file.is_empty() && !file.contains(['/', '\\']);
        if let Some((file, id)) =
            (self.masks.iter()).find(|(file, id)| !is_name(file) || table[usize::from(**id)].is_none())
        {
            return Err(refused(format!(
                "masks: {file:?} = {id}: expected the name of a file without its end, and an id of the map"
            )));
        }
        let mapped: BTreeSet<&String> = self.map.values().collect();
        if let Some(class) = self.annotated.iter().find(|class| !mapped.contains(class)) {
            return Err(refused(format!("annotated: no id of the map stands for {class:?}")));
        }
        let in_plan = |class: &&String| plan.labels.id(class).is_ok();
        let classes: Vec<String> = self.annotated.iter().filter(in_plan).cloned().collect();
        // Partial labels may annotate nothing, and still show what they label.
        let shows = |id: &u8| ![BACKGROUND, IGNORE].contains(id);
        let is_of_use = !classes.is_empty() || (self.annotated.is_empty() && table.iter().flatten().any(shows));
        if !is_of_use {
            return Err(refused(format!(
                "the plan has none of its classes {:?}",
                self.annotated
            )));
        }
        let has_tumours = classes.iter().any(|class| class.ends_with("_tumour"));
        Ok(ResolvedPreset {
            table,
            kind: self.kind.unwrap_or(if has_tumours {
                CaseKind::Labelled
            } else {
                CaseKind::Unlabelled
            }),
            annotation: Annotation {
                classes,
                assumed_tumour_free: self.assumed_tumour_free,
            },
        })
    }
}

/// Tells whether a built-in preset has a class, so that a plan may lack it: anything else is a misspelling.
fn is_class_of_a_data_set(class: &str) -> bool {
    let mut built_in = BuiltIn::all().iter();
    class == "background" || built_in.any(|built_in| built_in.classes().any(|known| known == class))
}

impl ResolvedPreset {
    /// Lists the file ids that have a meaning, for messages.
    pub fn known_ids(&self) -> String {
        let ids = (0..=255_u8).filter(|id| self.table[usize::from(*id)].is_some());
        ids.map(|id| id.to_string()).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_say_what_ids_mean_and_what_was_looked_for() {
        let plan = Plan::default();
        let resolve = |name: &str| Preset::named(name).unwrap().resolve(&plan).unwrap();
        let kits = resolve("kits");
        assert_eq!(kits.table[..5], [Some(0), Some(5), Some(6), Some(5), None]);
        assert_eq!(kits.kind, CaseKind::Labelled);
        let total = resolve("totalsegmentator");
        assert_eq!(
            (total.table[5], total.table[7], total.table[2], total.table[117]),
            (Some(1), Some(3), Some(5), Some(0))
        );
        assert_eq!(total.kind, CaseKind::Unlabelled);
        assert!(total.annotation.assumed_tumour_free);
        assert_eq!(resolve("freetumor").table[6], Some(6));
        assert_eq!(resolve("freetumor-unlabelled").table[2], None);
        assert!(
            Preset::named("lit")
                .unwrap_err()
                .to_string()
                .contains("lits, msd-liver")
        );
    }

    #[test]
    fn a_plan_with_fewer_classes_narrows_a_preset() {
        let labels = serde_json::from_str(r#"{"background":0,"kidney":1}"#).unwrap();
        let plan = Plan {
            labels,
            ..Plan::default()
        };
        let kits = Preset::named("kits").unwrap().resolve(&plan).unwrap();
        assert_eq!(kits.table[..4], [Some(0), Some(1), Some(1), Some(1)]);
        assert_eq!(
            (kits.kind, kits.annotation.classes),
            (CaseKind::Unlabelled, vec!["kidney".to_string()])
        );
        let error = Preset::named("lits").unwrap().resolve(&plan).unwrap_err().to_string();
        assert!(error.contains("preset lits: the plan has none"), "{error}");
    }

    #[test]
    fn custom_maps_are_read_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Preset::open(path.to_str().unwrap()).and_then(|preset| preset.resolve(&Plan::default()))
        };
        let mine = read("annotated = [\"liver\"]\nassumed_tumour_free = true\n[map]\n5 = \"liver\"\n9 = \"ignore\"\n")
            .unwrap();
        assert_eq!(
            (mine.table[5], mine.table[9], mine.table[1]),
            (Some(1), Some(255), None)
        );
        let error = |text: &str| read(text).unwrap_err().to_string();
        assert!(error("annotated = []\nextra = 1\n[map]\n").contains("extra"));
        assert!(error("annotated = [\"liver\"]\n[map]\n300 = \"liver\"\n").contains("300"));
        assert!(error("annotated = [\"liver\"]\n[map]\n5 = \"livr\"\n").contains("livr"));
        assert!(error("annotated = [\"liver\"]\n[map]\n5 = \"kidney\"\n").contains("no id of the map"));
    }
}
