//! Which cases train and which are held out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::LearnError;
use crate::digest::Digest;
use crate::rng::{Purpose, Rng};
use crate::store::{CaseKind, Cases};

/// The most bytes of a file of folds: over 10^5 cases in each of ten.
const MAX_BYTES: u64 = 64 << 20;

/// How cases are held out: fold `fold` of `folds` by a seeded permutation, or of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Split {
    /// In how many parts the cases are divided; 1 holds nothing out.
    pub folds: usize,
    /// Which part is held out, from 0.
    pub fold: usize,
    /// The seed of the permutation.
    pub seed: u64,
    /// Folds in a file instead, as nnU-Net keeps them (`splits_final.json`): a list of `{"train": [ids], "val": [ids]}`.
    /// `folds` and `seed` then do nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// One fold of a file.
#[derive(Deserialize)]
struct Fold {
    train: BTreeSet<String>,
    val: BTreeSet<String>,
}

impl Default for Split {
    fn default() -> Self {
        Self {
            folds: 5,
            fold: 0,
            seed: 0,
            file: None,
        }
    }
}

impl Split {
    /// Returns the indices of training and of held-out cases, labelled and unlabelled divided alike. The same scan under
    /// two ids lands on the same side, because it is the voxels' hash that decides (promise P7). With a file, cases that
    /// the fold does not name train, as an unlabelled pool does.
    ///
    /// # Errors
    /// [`LearnError`] names the file and what is wrong with it: also an id that the store does not have, for it may be a
    /// typing error that lets a case slip into training.
    pub fn divide(&self, store: &dyn Cases) -> Result<(Vec<usize>, Vec<usize>), LearnError> {
        let held_out: BTreeSet<Digest> = match &self.file {
            Some(path) => self.of_file(path, store)?,
            None => [CaseKind::Labelled, CaseKind::Unlabelled]
                .into_iter()
                .flat_map(|kind| self.held_out_hashes(store, kind))
                .collect(),
        };
        let records = store.records();
        Ok((0..records.len()).partition(|&case| !held_out.contains(&records[case].source_hash)))
    }

    /// Returns the hashes of the cases that a file's fold validates on.
    fn of_file(&self, path: &Path, store: &dyn Cases) -> Result<BTreeSet<Digest>, LearnError> {
        let refused = |what: String| LearnError::Folds {
            path: path.into(),
            what,
        };
        let bytes = fs_err::metadata(path)?.len();
        if bytes > MAX_BYTES {
            return Err(refused(format!("{bytes} bytes, at most {MAX_BYTES}")));
        }
        let text = fs_err::read_to_string(path)?;
        let folds: Vec<Fold> = serde_json::from_str(&text).map_err(|error| {
            refused(format!(
                "{error}; expected a list of {{\"train\": [ids], \"val\": [ids]}}"
            ))
        })?;
        let Some(Fold { train, val }) = folds.get(self.fold) else {
            return Err(refused(format!("fold {}: the file has {}", self.fold, folds.len())));
        };
        if let Some(both) = train.intersection(val).next() {
            return Err(refused(format!("fold {}: {both:?} is in train and in val", self.fold)));
        }
        let hash_of = |id: &String| {
            let found = store.find(id).map(|case| store.records()[case].source_hash);
            found.ok_or_else(|| refused(format!("case {id:?} is not in the store")))
        };
        let validated = val.iter().map(hash_of).collect::<Result<BTreeSet<_>, _>>()?;
        for id in train {
            if validated.contains(&hash_of(id)?) {
                return Err(refused(format!("{id:?} of train is the same scan as one of val")));
            }
        }
        Ok(validated)
    }

    fn held_out_hashes(&self, store: &dyn Cases, kind: CaseKind) -> Vec<Digest> {
        if self.folds < 2 {
            return Vec::new();
        }
        let records = store.records().iter().filter(|record| record.kind == kind);
        let hashes: BTreeSet<Digest> = records.map(|record| record.source_hash).collect();
        let mut hashes: Vec<Digest> = hashes.into_iter().collect();
        Rng::keyed(self.seed, kind as u64, 0, Purpose::Split).shuffle(&mut hashes);
        hashes.into_iter().skip(self.fold).step_by(self.folds).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learn::toy;

    fn divide(json: &str, fold: usize) -> Result<(Vec<usize>, Vec<usize>), LearnError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("splits_final.json");
        std::fs::write(&path, json).unwrap();
        let split = Split {
            file: Some(path),
            fold,
            ..Split::default()
        };
        split.divide(&toy::store(3, 1))
    }

    #[test]
    fn folds_of_a_file_are_held_out() {
        let store = toy::store(3, 1);
        let ids: Vec<&str> = store.records().iter().map(|record| record.id.as_str()).collect();
        let fold =
            |train: &[&str], val: &[&str]| serde_json::json!([{"train": [], "val": []}, {"train": train, "val": val}]);
        let (training, held_out) = divide(&fold(&ids[2..], &ids[..1]).to_string(), 1).unwrap();
        assert_eq!(held_out, [0]);
        // The second case stands in neither list: it trains.
        assert_eq!(training, (1..ids.len()).collect::<Vec<_>>());
        let error = |json: &str, fold| divide(json, fold).unwrap_err().to_string();
        let both = fold(&ids[..2], &ids[..1]).to_string();
        assert!(
            error(&both, 1).contains("is in train and in val"),
            "{}",
            error(&both, 1)
        );
        assert!(error(&both, 2).contains("splits_final.json: fold 2: the file has 2"));
        assert!(error(&fold(&[], &["nobody"]).to_string(), 1).contains("case \"nobody\" is not in the store"));
        assert!(error("{}", 0).contains("expected a list of"));
    }
}
