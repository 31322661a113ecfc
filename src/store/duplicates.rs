//! Which cases show one scan: the same voxels, or the same scan saved differently.

use std::collections::{BTreeMap, HashMap};

use rayon::prelude::*;
use serde::Serialize;

use super::{CaseRecord, NearDuplicate};
use crate::volume::{MIN_SCORE, Outline};

/// How two cases are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DuplicateKind {
    /// The same voxels.
    Exact,
    /// The same scan under another header, crop, clip or voxel size, as far as fingerprints tell.
    Near,
}

/// Two cases that show one scan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Duplicate {
    /// One case's id.
    pub first: String,
    /// The other's.
    pub second: String,
    /// How they are alike.
    pub kind: DuplicateKind,
    /// How much speaks for a near-duplicate, from [`MIN_SCORE`] on; absent where the voxels are the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<u16>,
}

/// Lists the pairs of cases that show one scan, by their ids. Of n cases with the same voxels, n - 1 pairs are listed.
pub fn duplicates(records: &[CaseRecord], near: &[NearDuplicate]) -> Vec<Duplicate> {
    let pair = |first: usize, second: usize, score: Option<u16>| Duplicate {
        first: records[first].id.clone(),
        second: records[second].id.clone(),
        kind: score.map_or(DuplicateKind::Exact, |_| DuplicateKind::Near),
        score,
    };
    let mut first_of = HashMap::new();
    let mut found = Vec::new();
    for (case, record) in records.iter().enumerate() {
        let first = *first_of.entry(record.source_hash).or_insert(case);
        if first != case {
            found.push(pair(first, case, None));
        }
    }
    let near = near
        .iter()
        .map(|near| pair(near.first as usize, near.second as usize, Some(near.score)));
    found.extend(near);
    found
}

/// Numbers the groups of cases that must stay together: the same voxels or near-duplicates, and where asked, one patient.
/// A group's number is its lowest case.
pub fn groups(records: &[CaseRecord], near: &[NearDuplicate], with_patients: bool) -> Vec<usize> {
    let mut group: Vec<usize> = (0..records.len()).collect();
    let mut first_of = HashMap::new();
    let mut first_of_patient = HashMap::new();
    for (case, record) in records.iter().enumerate() {
        join(&mut group, *first_of.entry(record.source_hash).or_insert(case), case);
        if with_patients && !record.patient.is_empty() {
            join(
                &mut group,
                *first_of_patient.entry(&record.patient).or_insert(case),
                case,
            );
        }
    }
    near.iter()
        .for_each(|near| join(&mut group, near.first as usize, near.second as usize));
    for case in 0..group.len() {
        // Roots are the lowest, so those before are settled.
        group[case] = group[group[case]];
    }
    group
}

fn root(group: &mut [usize], mut case: usize) -> usize {
    while group[case] != case {
        group[case] = group[group[case]];
        case = group[case];
    }
    case
}

fn join(group: &mut [usize], a: usize, b: usize) {
    let (a, b) = (root(group, a), root(group, b));
    group[a.max(b)] = a.min(b);
}

/// Tells how much speaks for two fingerprints being of one scan, where it is enough.
pub fn nearness(a: &Outline, b: &Outline) -> Option<u16> {
    let score = a.align(b)?.score.clamp(0, i32::from(u16::MAX)) as u16;
    (score >= MIN_SCORE).then_some(score)
}

/// A store's cases and their pairs as the index had them.
pub(super) struct Known<'a> {
    pub(super) records: &'a [CaseRecord],
    pub(super) near: &'a [NearDuplicate],
}

/// Finds the near-duplicates among cases. Pairs of cases that the index had with the same voxels are taken from there, so that m new
/// ones among n cost m n comparisons. (Not with the same fingerprints alone: of two copies one may have become another scan of the same
/// fingerprint, and pairs of copies are not in the index.)
pub(super) fn find_near(records: &[CaseRecord], known: &Known) -> Vec<NearDuplicate> {
    let before: HashMap<&str, (usize, &CaseRecord)> = (known.records.iter().enumerate())
        .map(|(case, record)| (record.id.as_str(), (case, record)))
        .collect();
    // For every case, which it was in the index before.
    let was = |record: &CaseRecord| {
        let (case, known) = before.get(record.id.as_str())?;
        let is_same = known.fingerprint == record.fingerprint && known.source_hash == record.source_hash;
        is_same.then_some(*case)
    };
    let was: Vec<Option<usize>> = records.iter().map(was).collect();
    let is: BTreeMap<usize, u32> = (was.iter().zip(0..))
        .filter_map(|(was, is)| Some(((*was)?, is)))
        .collect();
    let kept = known.near.iter().filter_map(|near| {
        let (a, b) = (is.get(&(near.first as usize))?, is.get(&(near.second as usize))?);
        let same = records[*a as usize].source_hash == records[*b as usize].source_hash;
        (!same).then_some((*a.min(b), *a.max(b), near.score))
    });
    let outlines: Vec<Option<Outline>> = records
        .par_iter()
        .map(|record| Outline::of(&record.fingerprint))
        .collect();
    let compare = |new: usize| {
        let outlines = &outlines;
        let was = &was;
        let others = (0..records.len()).filter(move |other| *other != new && (was[*other].is_some() || *other > new));
        others.filter_map(move |other| {
            if records[other].source_hash == records[new].source_hash {
                return None;
            }
            let score = nearness(outlines[new].as_ref()?, outlines[other].as_ref()?)?;
            Some((new.min(other) as u32, new.max(other) as u32, score))
        })
    };
    let new: Vec<usize> = (0..records.len()).filter(|case| was[*case].is_none()).collect();
    let mut found: Vec<(u32, u32, u16)> = new.into_par_iter().flat_map_iter(compare).collect();
    found.extend(kept);
    found.sort_unstable();
    let pair = |(first, second, score)| NearDuplicate { first, second, score };
    found.into_iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;
    use crate::digest::Digest;

    /// Of two copies one becomes another scan of the same fingerprint: the pair was in no index, and must be found.
    #[test]
    fn copies_that_part_are_compared() {
        let random = |seed: u64| -> Vec<i16> {
            let mut rng = crate::rng::Rng::keyed(seed, 0, 0, crate::rng::Purpose::Test);
            (0..64 * 64 * 48).map(|_| (60.0 + 40.0 * rng.normal()) as i16).collect()
        };
        let image = ndarray::Array3::from_shape_vec((48, 64, 64), random(1)).unwrap();
        let fingerprint = crate::volume::Fingerprint::of(image.view(), [3.0; 3]);
        let with = |number: usize, hash: u8| CaseRecord {
            fingerprint: fingerprint.clone(),
            source_hash: Digest::of(&[hash]),
            ..record(number)
        };
        let before = [with(0, 7), with(1, 7)];
        let after = [with(0, 7), with(1, 8)];
        let near = |records: &[CaseRecord], known: &[CaseRecord]| {
            find_near(
                records,
                &Known {
                    records: known,
                    near: &[],
                },
            )
        };
        assert!(near(&before, &[]).is_empty(), "copies are no near-duplicates");
        let expected = near(&after, &[]);
        assert_eq!(expected.len(), 1, "{expected:?}");
        assert_eq!(near(&after, &before), expected);
    }

    #[test]
    fn groups_join_scans_copies_and_patients_through_each_other() {
        let mut records: Vec<CaseRecord> = (0..7).map(record).collect();
        for (case, record) in records.iter_mut().enumerate() {
            record.source_hash = Digest::of(&[case as u8]);
        }
        records[6].source_hash = records[2].source_hash;
        records[5].patient = "p".into();
        records[2].patient = "p".into();
        let near = |first, second| NearDuplicate {
            first,
            second,
            score: 100,
        };
        let near = [near(1, 5), near(3, 4)];
        assert_eq!(groups(&records, &near, true), [0, 1, 1, 3, 3, 1, 1]);
        assert_eq!(groups(&records, &near, false), [0, 1, 2, 3, 3, 1, 2]);
        let pairs = duplicates(&records, &near);
        let ids: Vec<_> = pairs
            .iter()
            .map(|pair| (&pair.first[5..], &pair.second[5..], pair.score))
            .collect();
        let score = Some(100);
        assert_eq!(
            ids,
            [
                ("000002", "000006", None),
                ("000001", "000005", score),
                ("000003", "000004", score)
            ]
        );
    }
}
