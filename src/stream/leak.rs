//! No leakage (promise P7): what is held out appears neither in the patches nor in what the models were trained on.

use std::collections::{BTreeMap, HashSet};
use std::sync::OnceLock;

use rayon::prelude::*;

use super::StreamError;
use super::recipe::{Recipe, Selection};
use crate::checkpoint::{Bundle, Provenance};
use crate::digest::Digest;
use crate::store::{CaseRecord, Cases, groups, nearness};
use crate::volume::{Fingerprint, Outline};

/// Which of a store's cases the models have seen, the same scans or near-duplicates of them; found when first asked for.
#[derive(Default)]
pub(super) struct Seen(OnceLock<Vec<bool>>);

impl Seen {
    /// Tells it for every case.
    fn of(&self, cases: &dyn Cases, provenance: &Provenance) -> &[bool] {
        self.0.get_or_init(|| seen_cases(cases, provenance))
    }
}

/// Tells for every case of a store whether models were trained on it or on a near-duplicate.
pub fn seen_cases(cases: &dyn Cases, provenance: &Provenance) -> Vec<bool> {
    let group = groups(cases.records(), cases.near_duplicates(), false);
    Alike::of(cases, provenance).seen(cases, provenance, &group)
}

/// Tells for every case of a store whether models were trained on its patient: on it, on a near-duplicate, or on another scan of whoever it
/// is. What a model is worth is measured on patients that it has not seen.
pub fn seen_patients(cases: &dyn Cases, provenance: &Provenance) -> Vec<bool> {
    let group = groups(cases.records(), cases.near_duplicates(), true);
    Alike::of(cases, provenance).seen(cases, provenance, &group)
}

/// Tells for every case whose critic judges a lesion in it: the bundle's own (nothing), or, where that one learnt from the case or from
/// another scan of its patient, that of an inner fold which learnt from none of these; else of one which did not learn from this scan. Where
/// there is none, the own one judges.
pub fn judges(cases: &dyn Cases, bundle: &Bundle) -> Vec<Option<usize>> {
    if bundle.inner.is_empty() {
        return vec![None; cases.records().len()];
    }
    // What inner critics learnt from is a part of this: one comparison of all scans finds who is like whom.
    let alike = Alike::of(cases, &bundle.critic_seen);
    let seen_by = |provenance: &Provenance, with_patients: bool| {
        let group = groups(cases.records(), cases.near_duplicates(), with_patients);
        alike.seen(cases, provenance, &group)
    };
    let inner = |with_patients: bool| -> Vec<Vec<bool>> {
        let critics = bundle.inner.iter();
        critics.map(|inner| seen_by(&inner.seen, with_patients)).collect()
    };
    let (patients, scans) = (inner(true), inner(false));
    let unseen = |seen: &[Vec<bool>], case: usize| seen.iter().position(|seen| !seen[case]);
    let judge = |case: usize| unseen(&patients, case).or_else(|| unseen(&scans, case));
    let own = seen_by(&bundle.critic_seen, true);
    (own.iter().enumerate())
        .map(|(case, seen)| seen.then(|| judge(case)).flatten())
        .collect()
}

/// Which training scans each case of a store is the same as or nearly, among those that the store does not hold.
struct Alike<'a> {
    /// The training scans' fingerprints, by number.
    fingerprints: Vec<&'a Fingerprint>,
    /// Per case the numbers of those that it is near.
    near: Vec<Vec<usize>>,
}

impl<'a> Alike<'a> {
    /// Training scans that the store holds are looked up among its pairs; only the others, which are few where models and store
    /// belong together, are compared with every case.
    fn of(cases: &dyn Cases, provenance: &'a Provenance) -> Self {
        let records = cases.records();
        let held: HashSet<_> = records.iter().map(|record| &record.fingerprint).collect();
        let fingerprints: Vec<&Fingerprint> = provenance.fingerprints.iter().collect();
        let elsewhere = fingerprints.iter().enumerate().filter(|(_, one)| !held.contains(*one));
        let elsewhere: Vec<(usize, Outline)> = elsewhere
            .filter_map(|(number, one)| Some((number, Outline::of(one)?)))
            .collect();
        let near = |record: &CaseRecord| -> Vec<usize> {
            let (false, Some(outline)) = (elsewhere.is_empty(), Outline::of(&record.fingerprint)) else {
                return Vec::new();
            };
            let near = elsewhere
                .iter()
                .filter(|(_, other)| nearness(&outline, other).is_some());
            near.map(|(number, _)| *number).collect()
        };
        let near = records.par_iter().map(near).collect();
        Self { fingerprints, near }
    }

    /// Tells for every case whether one of its group is among what models learnt from: all, or a part, of what this was made of.
    fn seen(&self, cases: &dyn Cases, provenance: &Provenance, group: &[usize]) -> Vec<bool> {
        let mut seen = vec![false; group.len()];
        for (case, record) in cases.records().iter().enumerate() {
            let is_held = !record.fingerprint.is_empty() && provenance.fingerprints.contains(&record.fingerprint);
            let is_near = |number: &usize| provenance.fingerprints.contains(self.fingerprints[*number]);
            seen[group[case]] |= provenance.source_hashes.contains(&record.source_hash)
                || is_held
                || self.near[case].iter().any(is_near);
        }
        group.iter().map(|group| seen[*group]).collect()
    }
}

/// Tells whether a scan that no store holds is one that models were trained on, or a near-duplicate of one.
pub fn is_seen(source_hash: &Digest, fingerprint: &Fingerprint, provenance: &Provenance) -> bool {
    if provenance.source_hashes.contains(source_hash) {
        return true;
    }
    let Some(outline) = Outline::of(fingerprint) else {
        return false;
    };
    let others = provenance.fingerprints.par_iter().filter_map(Outline::of);
    others.any(|other| nearness(&outline, &other).is_some())
}

/// Tells for every case whether it is held out: named by id or hash, or the same scan as one that is, or a near-duplicate.
pub fn held_out_cases(cases: &dyn Cases, select: &Selection) -> Vec<bool> {
    let records = cases.records();
    if select.hold_out.is_empty() && select.hold_out_hashes.is_empty() {
        return vec![false; records.len()];
    }
    let group = groups(records, cases.near_duplicates(), false);
    let mut held = vec![false; records.len()];
    let named = select.hold_out.iter().filter_map(|id| cases.find(id));
    named.for_each(|case| held[group[case]] = true);
    let hashes: HashSet<&Digest> = select.hold_out_hashes.iter().collect();
    for (record, group) in records.iter().zip(&group) {
        held[*group] |= hashes.contains(&record.source_hash);
    }
    group.iter().map(|group| held[*group]).collect()
}

/// Refuses models that were trained on what the recipe holds out, or on near-duplicates of it.
pub(super) fn check_leak(
    cases: &dyn Cases,
    (bundle, seen): (&Bundle, &Seen),
    recipe: &Recipe,
    allowed: &[bool],
) -> Result<(), StreamError> {
    let provenance = &bundle.provenance;
    let records = cases.records();
    let unwanted: Vec<usize> = (0..records.len()).filter(|case| !allowed[*case]).collect();
    if unwanted.is_empty() && recipe.select.hold_out_hashes.is_empty() {
        return Ok(());
    }
    if !provenance.known && !recipe.allow_unknown_provenance {
        return Err(StreamError::Leak {
            what: format!(
                "bundle {} does not say what it was trained on; set allow_unknown_provenance to use it all the same",
                bundle.hash
            ),
        });
    }
    let seen = seen.of(cases, provenance);
    let unwanted = unwanted
        .into_iter()
        .filter(|case| seen[*case])
        .map(|case| &records[case]);
    match leaks(bundle, unwanted, &recipe.select.hold_out_hashes) {
        Some(what) => Err(StreamError::Leak { what }),
        None => Ok(()),
    }
}

/// Says which held-out scans a bundle has seen: cases of the store, and hashes that the store need not have.
fn leaks<'a>(bundle: &Bundle, seen: impl Iterator<Item = &'a CaseRecord>, hashes: &[Digest]) -> Option<String> {
    let trained_on = &bundle.provenance.source_hashes;
    // The name of each scan: an id of the store, or the hash itself; exact ones come before near ones.
    let mut leaks: BTreeMap<(bool, Digest), String> = seen
        .map(|record| {
            let is_near = !trained_on.contains(&record.source_hash);
            ((is_near, record.source_hash), record.id.clone())
        })
        .collect();
    for hash in hashes.iter().filter(|hash| trained_on.contains(hash)) {
        leaks.entry((false, *hash)).or_insert_with(|| hash.to_string());
    }
    let named: Vec<&String> = leaks.values().take(5).collect();
    let of_them = match leaks.keys().filter(|(is_near, _)| *is_near).count() {
        0 => String::new(),
        near => format!(" ({near} as near-duplicates)"),
    };
    (!leaks.is_empty()).then(|| {
        format!(
            "bundle {} was trained on {} of the held-out cases{of_them}, such as {named:?}",
            bundle.hash,
            leaks.len()
        )
    })
}
