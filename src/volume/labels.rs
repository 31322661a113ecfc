//! Label ids and names, and what a partially annotated case allows a voxel to be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The id of everything that is no named class.
pub const BACKGROUND: u8 = 0;
/// The id that tells a loss to leave a voxel out.
pub const IGNORE: u8 = 255;

/// A refused label map or class name.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// Two classes with one id, a missing background, or an id out of range.
    #[error("label map: {0}")]
    Invalid(String),
    /// A name that the label map does not hold.
    #[error("unknown class {name:?}: the label map has {known:?}")]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// The names that exist.
        known: Vec<String>,
    },
}

/// A set of class ids below 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClassSet(pub u64);

impl ClassSet {
    /// Returns the set of the one class `id`.
    pub fn of(id: u8) -> Self {
        Self(1 << id)
    }

    /// Adds a class.
    pub fn insert(&mut self, id: u8) {
        self.0 |= 1 << id;
    }

    /// Tells whether `id` is in the set.
    pub fn contains(self, id: u8) -> bool {
        id < 64 && self.0 >> id & 1 == 1
    }

    /// Returns the only member, or nothing where there are several or none.
    pub fn single(self) -> Option<u8> {
        (self.0.count_ones() == 1).then(|| self.0.trailing_zeros() as u8)
    }

    /// Lists the members in ascending order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..64).filter(move |id| self.contains(*id))
    }
}

/// An organ with the id of its tumour class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Organ {
    /// The organ's name, such as `liver`.
    pub name: String,
    /// The label id of healthy tissue.
    pub id: u8,
    /// The label id of `<name>_tumour`.
    pub tumour_id: u8,
}

/// The plan's classes: canonical names and their ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, u8>", into = "BTreeMap<String, u8>")]
pub struct LabelMap {
    ids: BTreeMap<String, u8>,
}

impl Default for LabelMap {
    /// Returns the published abdomen map: liver 1, pancreas 3, kidney 5, each tumour one above its organ.
    fn default() -> Self {
        let names = [
            "background",
            "liver",
            "liver_tumour",
            "pancreas",
            "pancreas_tumour",
            "kidney",
            "kidney_tumour",
        ];
        Self {
            ids: names.iter().zip(0..).map(|(name, id)| (name.to_string(), id)).collect(),
        }
    }
}

impl TryFrom<BTreeMap<String, u8>> for LabelMap {
    type Error = LabelError;

    fn try_from(ids: BTreeMap<String, u8>) -> Result<Self, LabelError> {
        let invalid = |text: String| Err(LabelError::Invalid(text));
        if ids.get("background") != Some(&BACKGROUND) {
            return invalid("background must have id 0".into());
        }
        let mut seen = ClassSet::default();
        for (name, &id) in &ids {
            if usize::from(id) >= ids.len() || id > 62 {
                return invalid(format!(
                    "id {id} of {name:?}: ids must be consecutive from 0 and at most 62"
                ));
            }
            if seen.contains(id) {
                return invalid(format!("id {id} of {name:?} is used twice"));
            }
            seen.insert(id);
            if let Some(organ) = name.strip_suffix("_tumour")
                && !ids.contains_key(organ)
            {
                return invalid(format!("{name:?} needs its organ {organ:?}"));
            }
        }
        Ok(Self { ids })
    }
}

impl From<LabelMap> for BTreeMap<String, u8> {
    fn from(map: LabelMap) -> Self {
        map.ids
    }
}

impl LabelMap {
    /// Returns the number of classes, background included.
    pub fn class_count(&self) -> usize {
        self.ids.len()
    }

    /// Returns the id of a class.
    ///
    /// # Errors
    /// [`LabelError::Unknown`] names the classes that exist.
    pub fn id(&self, name: &str) -> Result<u8, LabelError> {
        self.ids.get(name).copied().ok_or_else(|| LabelError::Unknown {
            name: name.chars().take(80).collect(),
            known: self.ids.keys().cloned().collect(),
        })
    }

    /// Returns the name of an id, if it is a class.
    pub fn name(&self, id: u8) -> Option<&str> {
        self.ids
            .iter()
            .find(|(_, known)| **known == id)
            .map(|(name, _)| name.as_str())
    }

    /// Lists the classes as (name, id), by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u8)> {
        self.ids.iter().map(|(name, id)| (name.as_str(), *id))
    }

    /// Lists the organs that have a tumour class, by id.
    pub fn organs(&self) -> Vec<Organ> {
        let mut organs: Vec<Organ> = self
            .ids
            .iter()
            .filter_map(|(name, &id)| {
                let tumour_id = *self.ids.get(&format!("{name}_tumour"))?;
                Some(Organ {
                    name: name.clone(),
                    id,
                    tumour_id,
                })
            })
            .collect();
        organs.sort_by_key(|organ| organ.id);
        organs
    }

    /// Returns an organ with its tumour class.
    ///
    /// # Errors
    /// [`LabelError::Unknown`] where the map lacks the organ or its tumour.
    pub fn organ(&self, name: &str) -> Result<Organ, LabelError> {
        Ok(Organ {
            name: name.into(),
            id: self.id(name)?,
            tumour_id: self.id(&format!("{name}_tumour"))?,
        })
    }
}

/// What a case's annotators looked for: the classes whose absence in its label file means absence in the patient.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, bincode::Encode, bincode::Decode)]
pub struct Annotation {
    /// Canonical class names that were annotated.
    pub classes: Vec<String>,
    /// Whether organs without annotated tumours are taken to be healthy, as the published pools do. An assumption,
    /// kept apart from `classes` so that provenance shows it.
    pub assumed_tumour_free: bool,
}

impl Annotation {
    /// Returns, for every stored label id, the classes that the voxel may truly have.
    ///
    /// A background voxel may be any class nobody looked for; a voxel of an organ may be its tumour where nobody looked
    /// for tumours; 255 may be anything. With `assumed_tumour_free`, tumour classes count as looked for.
    ///
    /// # Errors
    /// [`LabelError::Unknown`] for an annotated class that the map does not hold.
    pub fn admissible(&self, map: &LabelMap) -> Result<[ClassSet; 256], LabelError> {
        let mut looked_for = ClassSet::of(BACKGROUND);
        for name in &self.classes {
            looked_for.insert(map.id(name)?);
        }
        let organs = map.organs();
        if self.assumed_tumour_free {
            organs.iter().for_each(|organ| looked_for.insert(organ.tumour_id));
        }
        let all = map
            .iter()
            .fold(ClassSet::default(), |set, (_, id)| ClassSet(set.0 | ClassSet::of(id).0));
        let unknown = ClassSet(all.0 & !looked_for.0);
        let mut table = [all; 256];
        for (_, id) in map.iter() {
            let mut set = ClassSet::of(id);
            if id == BACKGROUND {
                set.0 |= unknown.0;
            } else if let Some(organ) = organs.iter().find(|organ| organ.id == id)
                && unknown.contains(organ.tumour_id)
            {
                set.insert(organ.tumour_id);
            }
            table[usize::from(id)] = set;
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotation(classes: &[&str], assumed_tumour_free: bool) -> Annotation {
        Annotation {
            classes: classes.iter().map(|name| name.to_string()).collect(),
            assumed_tumour_free,
        }
    }

    #[test]
    fn the_default_map_is_the_published_one() {
        let map = LabelMap::default();
        assert_eq!(map.id("kidney_tumour").unwrap(), 6);
        assert_eq!(
            map.organs().iter().map(|organ| organ.name.as_str()).collect::<Vec<_>>(),
            ["liver", "pancreas", "kidney"]
        );
        assert!(
            map.id("spleen")
                .unwrap_err()
                .to_string()
                .contains("unknown class \"spleen\"")
        );
    }

    #[test]
    fn a_liver_case_says_nothing_about_the_pancreas() {
        let map = LabelMap::default();
        let table = annotation(&["liver", "liver_tumour"], false).admissible(&map).unwrap();
        assert_eq!(table[0].iter().collect::<Vec<_>>(), [0, 3, 4, 5, 6]);
        assert_eq!(table[1].single(), Some(1));
        assert_eq!(table[2].single(), Some(2));
        assert_eq!(table[255].iter().count(), 7);
    }

    #[test]
    fn a_pseudo_labelled_organ_may_hide_a_tumour_unless_assumed_free() {
        let map = LabelMap::default();
        let organs = ["liver", "pancreas", "kidney"];
        let table = annotation(&organs, false).admissible(&map).unwrap();
        assert_eq!(table[3].iter().collect::<Vec<_>>(), [3, 4]);
        let table = annotation(&organs, true).admissible(&map).unwrap();
        assert_eq!(table[3].single(), Some(3));
        assert_eq!(table[0].single(), Some(0));
    }

    #[test]
    fn maps_with_gaps_or_orphans_are_refused() {
        let parse = |text: &str| serde_json::from_str::<LabelMap>(text).map_err(|error| error.to_string());
        assert!(
            parse(r#"{"background":0,"liver":2}"#)
                .unwrap_err()
                .contains("consecutive")
        );
        assert!(parse(r#"{"liver":0}"#).unwrap_err().contains("background"));
        assert!(
            parse(r#"{"background":0,"liver_tumour":1}"#)
                .unwrap_err()
                .contains("organ")
        );
        assert!(parse(r#"{"background":0,"liver":1}"#).is_ok());
    }
}
