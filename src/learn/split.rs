//! Which cases train and which are held out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::LearnError;
use crate::digest::Digest;
use crate::rng::{Purpose, Rng};
use crate::store::{CaseKind, CaseRecord, Cases, groups};

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
    /// Whether a file may part the scans of one patient, or near-duplicates, between `train` and `val`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_straddling: bool,
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
            allow_straddling: false,
        }
    }
}

impl Split {
    /// Returns the indices of training and of held-out cases, labelled and unlabelled divided alike. Cases that show one scan, as
    /// far as hashes and fingerprints tell, and cases of one patient land on the same side (promise P7). With a file, cases that
    /// the fold does not name train, as an unlabelled pool does, unless they belong to one that it validates on.
    ///
    /// # Errors
    /// [`LearnError`] names the file and what is wrong with it: also an id that the store does not have, for it may be a
    /// typing error that lets a case slip into training, and cases that belong together but are parted.
    pub fn divide(&self, store: &dyn Cases) -> Result<(Vec<usize>, Vec<usize>), LearnError> {
        let cases = 0..store.records().len();
        let held_out = match &self.file {
            Some(path) => self.of_file(path, store)?,
            None => self.of_seed(store),
        };
        Ok(cases.partition(|case| !held_out[*case]))
    }

    /// Tells for every case whether the seeded permutation holds it out.
    fn of_seed(&self, store: &dyn Cases) -> Vec<bool> {
        let records = store.records();
        let group = groups(records, store.near_duplicates(), true);
        // A group goes by its least hash, so that the fold does not depend on ids, and counts as labelled where one of it is.
        let mut known: BTreeMap<usize, (Digest, bool)> = BTreeMap::new();
        for (record, group) in records.iter().zip(&group) {
            let (hash, is_labelled) = known.entry(*group).or_insert((record.source_hash, false));
            *hash = (*hash).min(record.source_hash);
            *is_labelled |= record.kind == CaseKind::Labelled;
        }
        let mut held_out = BTreeSet::new();
        for kind in [CaseKind::Labelled, CaseKind::Unlabelled] {
            let of_kind = known
                .values()
                .filter(|(_, is_labelled)| *is_labelled == (kind == CaseKind::Labelled));
            held_out.extend(self.held_out_hashes(of_kind.map(|(hash, _)| *hash).collect(), kind));
        }
        group.iter().map(|group| held_out.contains(&known[group].0)).collect()
    }

    /// Tells for every case whether a file's fold validates on it.
    fn of_file(&self, path: &Path, store: &dyn Cases) -> Result<Vec<bool>, LearnError> {
        let refused = |what: String| LearnError::Folds {
            path: path.into(),
            what,
        };
        let Fold { train, val } = self.read_fold(path)?;
        let find = |id: &String| {
            let found = store.find(id);
            found.ok_or_else(|| refused(format!("case {id:?} is not in the store")))
        };
        let train = train.iter().map(find).collect::<Result<Vec<usize>, _>>()?;
        let val = val.iter().map(find).collect::<Result<Vec<usize>, _>>()?;
        let records = store.records();
        let group = match self.allow_straddling {
            true => groups(records, &[], false),
            false => groups(records, store.near_duplicates(), true),
        };
        let validated: BTreeMap<usize, usize> = val.iter().map(|case| (group[*case], *case)).collect();
        for case in train {
            if let Some(other) = validated.get(&group[case]) {
                return Err(refused(straddle(&records[case], &records[*other])));
            }
        }
        Ok(group.iter().map(|group| validated.contains_key(group)).collect())
    }

    /// Reads the fold of a file.
    fn read_fold(&self, path: &Path) -> Result<Fold, LearnError> {
        let refused = |what: String| LearnError::Folds {
            path: path.into(),
            what,
        };
        let bytes = fs_err::metadata(path)?.len();
        if bytes > MAX_BYTES {
            return Err(refused(format!("{bytes} bytes, at most {MAX_BYTES}")));
        }
        let text = fs_err::read_to_string(path)?;
        let mut folds: Vec<Fold> = serde_json::from_str(&text).map_err(|error| {
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
        Ok(folds.swap_remove(self.fold))
    }

    /// Deals groups, each known by a hash, to the folds, and returns those of the held-out one.
    fn held_out_hashes(&self, hashes: BTreeSet<Digest>, kind: CaseKind) -> Vec<Digest> {
        if self.folds < 2 {
            return Vec::new();
        }
        let mut hashes: Vec<Digest> = hashes.into_iter().collect();
        Rng::keyed(self.seed, kind as u64, 0, Purpose::Split).shuffle(&mut hashes);
        hashes.into_iter().skip(self.fold).step_by(self.folds).collect()
    }
}

/// Says why a case of `train` and one of `val` belong together.
fn straddle(train: &CaseRecord, val: &CaseRecord) -> String {
    let (a, b) = (&train.id, &val.id);
    if train.source_hash == val.source_hash {
        return format!("{a:?} of train is the same scan as {b:?} of val");
    }
    let allow = "parting them needs split.allow_straddling = true";
    if !train.patient.is_empty() && train.patient == val.patient {
        return format!("{a:?} of train is of the same patient as {b:?} of val; {allow}");
    }
    format!("{a:?} of train is a near-duplicate of {b:?} of val, or linked to it by others; {allow}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learn::looks;
    use crate::store::MemoryStore;
    use crate::toy;
    use crate::volume::Region;

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

    /// Six labelled and two unlabelled cases: 0 and 3 of one patient, 1 and 6 one scan saved twice.
    fn related() -> MemoryStore {
        let toys = toy::store(6, 2);
        let mut store = MemoryStore::new(toys.plan().clone());
        for (case, record) in toys.records().iter().enumerate() {
            let crop = toys.read(case, Region::whole(record.grid.shape)).unwrap();
            let mut record = record.clone();
            record.patient = ["p", "", "q", "p", "", "", "", ""][case].into();
            record.fingerprint = match case {
                1 => looks::fingerprint(1, 0..40),
                6 => looks::fingerprint(1, 12..40),
                _ => looks::fingerprint(100 + case as u64, 0..40),
            };
            store.push(record, crop.image, crop.labels);
        }
        store
    }

    #[test]
    fn patients_and_near_duplicates_never_straddle_a_seeded_fold() {
        let store = related();
        let pairs: Vec<_> = store
            .near_duplicates()
            .iter()
            .map(|pair| (pair.first, pair.second))
            .collect();
        assert_eq!(pairs, [(1, 6)]);
        let mut held = [0; 8];
        for seed in 0..20 {
            for fold in 0..3 {
                let split = Split {
                    folds: 3,
                    fold,
                    seed,
                    ..Split::default()
                };
                let (training, held_out) = split.divide(&store).unwrap();
                assert_eq!(training.len() + held_out.len(), 8);
                for (a, b) in [(0, 3), (1, 6)] {
                    assert_eq!(
                        held_out.contains(&a),
                        held_out.contains(&b),
                        "{seed} {fold}: {a} and {b}"
                    );
                }
                held_out.iter().for_each(|case| held[*case] += 1);
            }
        }
        // Over the folds of a seed every case is held out once.
        assert_eq!(held, [20; 8]);
    }

    #[test]
    fn a_file_that_parts_what_belongs_together_is_refused_unless_allowed() {
        let store = related();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("splits_final.json");
        let divide = |train: &[usize], val: &[usize], allow_straddling: bool| {
            let ids = |cases: &[usize]| -> Vec<&str> {
                cases.iter().map(|case| store.records()[*case].id.as_str()).collect()
            };
            let json = serde_json::json!([{"train": ids(train), "val": ids(val)}]);
            std::fs::write(&path, json.to_string()).unwrap();
            let split = Split {
                file: Some(path.clone()),
                allow_straddling,
                ..Split::default()
            };
            split.divide(&store)
        };
        let error = |train: &[usize], val: &[usize]| divide(train, val, false).unwrap_err().to_string();
        let of_patient = error(&[3, 4], &[0]);
        assert!(
            of_patient.contains("\"case_003\" of train is of the same patient as \"case_000\" of val"),
            "{of_patient}"
        );
        let near = error(&[1], &[6]);
        assert!(
            near.contains("\"case_001\" of train is a near-duplicate of \"case_006\" of val"),
            "{near}"
        );
        assert!(near.contains("split.allow_straddling = true"), "{near}");
        assert_eq!(divide(&[1], &[6], true).unwrap().1, [6]);
        // What the file does not name goes where its patient and its copies go.
        assert_eq!(divide(&[2], &[0, 6], false).unwrap().1, [0, 1, 3, 6]);
    }
}
