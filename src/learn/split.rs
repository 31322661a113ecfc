//! Which cases train and which are held out.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::rng::{Purpose, Rng};
use crate::store::{CaseKind, Cases};

/// How cases are held out: fold `fold` of `folds` by a seeded permutation of case ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Split {
    /// In how many parts the cases are divided; 1 holds nothing out.
    pub folds: usize,
    /// Which part is held out, from 0.
    pub fold: usize,
    /// The seed of the permutation.
    pub seed: u64,
}

impl Default for Split {
    fn default() -> Self {
        Self {
            folds: 5,
            fold: 0,
            seed: 0,
        }
    }
}

impl Split {
    /// Returns the indices of training and of held-out cases, labelled and unlabelled divided alike. The same scan under
    /// two ids lands on the same side, because it is the voxels' hash that decides (promise P7).
    pub fn divide(&self, store: &dyn Cases) -> (Vec<usize>, Vec<usize>) {
        let held_out: BTreeSet<Digest> = [CaseKind::Labelled, CaseKind::Unlabelled]
            .into_iter()
            .flat_map(|kind| self.held_out_hashes(store, kind))
            .collect();
        (0..store.records().len()).partition(|&case| !held_out.contains(&store.records()[case].source_hash))
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
