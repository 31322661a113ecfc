//! What the gate let through, counted by organ, size class and contrast bin (promise P4).

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::volume::{ContrastBin, Organ, SizeClass};

const SIZES: usize = SizeClass::ALL.len();
const CONTRASTS: usize = ContrastBin::ALL.len();

/// Running counts of one organ, size class and contrast bin.
#[derive(Default)]
struct Bin {
    requested: AtomicU64,
    attempted: AtomicU64,
    accepted: AtomicU64,
    host_suspect: AtomicU64,
    unplaceable: AtomicU64,
}

/// Running counts of all streams since the start.
pub struct StreamStats {
    organs: Vec<String>,
    bins: Vec<Bin>,
    patches: AtomicU64,
    failed: AtomicU64,
}

/// What one host patch adds to the counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) attempts: u32,
    pub(super) host_suspect: u32,
    pub(super) accepted: bool,
    pub(super) unplaceable: bool,
}

/// The counts of one organ, size class and contrast bin.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BinCounts {
    /// The organ's name.
    pub organ: String,
    /// The size class.
    pub size: SizeClass,
    /// The contrast bin.
    pub contrast: ContrastBin,
    /// Host patches asked for.
    pub requested: u64,
    /// Lesions painted for them.
    pub attempted: u64,
    /// Patches whose lesion passed.
    pub accepted: u64,
    /// Lesions whose place the critic had called tumour before.
    pub host_suspect: u64,
    /// Patches for which no attempt found a place.
    pub unplaceable: u64,
}

/// The counts at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StatsSnapshot {
    /// Patches made, of any pool.
    pub patches: u64,
    /// Patches that could not be made.
    pub failed: u64,
    /// Counts of every bin, by organ, size and contrast.
    pub bins: Vec<BinCounts>,
}

impl StreamStats {
    /// Starts at zero for a label map's organs.
    pub fn new(organs: &[Organ]) -> Self {
        Self {
            organs: organs.iter().map(|organ| organ.name.clone()).collect(),
            bins: (0..organs.len() * SIZES * CONTRASTS).map(|_| Bin::default()).collect(),
            patches: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub(super) fn count_patch(&self) {
        self.patches.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_host(&self, organ: &str, size: SizeClass, contrast: ContrastBin, tally: Tally) {
        let Some(organ) = self.organs.iter().position(|name| name == organ) else {
            return;
        };
        let bin = &self.bins[(organ * SIZES + size as usize) * CONTRASTS + contrast as usize];
        let add = |count: &AtomicU64, by: u64| count.fetch_add(by, Ordering::Relaxed);
        add(&bin.requested, 1);
        add(&bin.attempted, u64::from(tally.attempts));
        add(&bin.accepted, u64::from(tally.accepted));
        add(&bin.host_suspect, u64::from(tally.host_suspect));
        add(&bin.unplaceable, u64::from(tally.unplaceable));
    }

    /// Returns the counts as they are now.
    pub fn snapshot(&self) -> StatsSnapshot {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let bins = self.bins.iter().enumerate().map(|(i, bin)| BinCounts {
            organ: self.organs[i / (SIZES * CONTRASTS)].clone(),
            size: SizeClass::ALL[i / CONTRASTS % SIZES],
            contrast: ContrastBin::ALL[i % CONTRASTS],
            requested: read(&bin.requested),
            attempted: read(&bin.attempted),
            accepted: read(&bin.accepted),
            host_suspect: read(&bin.host_suspect),
            unplaceable: read(&bin.unplaceable),
        });
        StatsSnapshot {
            patches: read(&self.patches),
            failed: read(&self.failed),
            bins: bins.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_land_in_their_bin() {
        let stats = StreamStats::new(&crate::volume::LabelMap::default().organs());
        let tally = Tally {
            attempts: 3,
            host_suspect: 1,
            accepted: true,
            unplaceable: false,
        };
        stats.count_host("pancreas", SizeClass::Medium, ContrastBin::Iso, tally);
        let snapshot = stats.snapshot();
        let filled: Vec<_> = snapshot.bins.iter().filter(|bin| bin.requested > 0).collect();
        assert_eq!(filled.len(), 1);
        assert_eq!(
            (filled[0].organ.as_str(), filled[0].size),
            ("pancreas", SizeClass::Medium)
        );
        assert_eq!((filled[0].contrast, filled[0].attempted), (ContrastBin::Iso, 3));
    }
}
