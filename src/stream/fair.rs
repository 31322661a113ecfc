//! Who is served next: fair queueing in two levels, classes by their weights and the streams of a class equally.
//!
//! Everybody has a virtual time, which grows by what they cost divided by their weight; the one furthest behind is
//! served. Who had nothing to ask for starts again at the time of the others: idling earns no credit.
//!
//! # Source
//! Start-time fair queueing (Goyal, Vin, Cheng, 1996).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::delivery::Priority;

const CLASSES: usize = 3;

/// The classes' shares of the work while all of them have something to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// Of single batches.
    pub preview: u32,
    /// Of streams, all together.
    pub stream: u32,
    /// Of training runs inside this process, all together.
    pub training: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            preview: 4,
            stream: 4,
            training: 4,
        }
    }
}

impl Weights {
    /// Returns the weight of a class.
    pub(super) fn of(&self, priority: Priority) -> u32 {
        match priority {
            Priority::Preview => self.preview,
            Priority::Stream => self.stream,
            Priority::Training => self.training,
        }
    }
}

/// A virtual time: a cost in nanoseconds, times [`SCALE`], divided by a weight.
type Virtual = u128;
/// Keeps the division by a weight exact enough.
const SCALE: Virtual = 1 << 20;

#[derive(Clone, Copy)]
struct Share {
    priority: Priority,
    served: Virtual,
}

/// The virtual times of classes and streams.
pub(super) struct Fair {
    weights: Weights,
    streams: BTreeMap<u64, Share>,
    classes: [Virtual; CLASSES],
    /// The virtual time of what was served last: among classes, and within each.
    now: Virtual,
    now_within: [Virtual; CLASSES],
}

impl Fair {
    pub(super) fn new(weights: Weights) -> Self {
        Self {
            weights,
            streams: BTreeMap::new(),
            classes: [0; CLASSES],
            now: 0,
            now_within: [0; CLASSES],
        }
    }

    pub(super) fn add(&mut self, id: u64, priority: Priority) {
        let served = self.now_within[priority as usize];
        self.streams.insert(id, Share { priority, served });
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.streams.remove(&id);
    }

    /// Returns the stream to be served next among those that have something to ask for.
    pub(super) fn pick(&mut self, is_asking: impl Fn(u64) -> bool) -> Option<u64> {
        // The stream furthest behind in each class, then the class furthest behind; of equals the first.
        let mut best: [Option<(Virtual, u64)>; CLASSES] = [None; CLASSES];
        for (id, share) in self.streams.iter().filter(|(id, _)| is_asking(**id)) {
            let class = share.priority as usize;
            let start = share.served.max(self.now_within[class]);
            if best[class].is_none_or(|(least, _)| start < least) {
                best[class] = Some((start, *id));
            }
        }
        let class = (0..CLASSES)
            .filter(|class| best[*class].is_some())
            .min_by_key(|class| self.classes[*class].max(self.now))?;
        let (start, id) = best[class]?;
        self.now = self.classes[class].max(self.now);
        self.classes[class] = self.now;
        self.now_within[class] = start;
        if let Some(share) = self.streams.get_mut(&id) {
            share.served = start;
        }
        Some(id)
    }

    /// Charges a stream for what its patch costs.
    pub(super) fn charge(&mut self, id: u64, nanoseconds: u64) {
        let Some(share) = self.streams.get_mut(&id) else {
            return;
        };
        let cost = Virtual::from(nanoseconds) * SCALE;
        share.served += cost;
        self.classes[share.priority as usize] += cost / Virtual::from(self.weights.of(share.priority).max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Serves `rounds` patches of the given costs and returns how many each stream got.
    fn serve(fair: &mut Fair, costs: &BTreeMap<u64, u64>, rounds: u64) -> BTreeMap<u64, u64> {
        let mut got = BTreeMap::new();
        for _ in 0..rounds {
            let id = fair.pick(|id| costs.contains_key(&id)).unwrap();
            fair.charge(id, costs[&id]);
            *got.entry(id).or_default() += 1;
        }
        got
    }

    #[test]
    fn classes_share_by_weight_whatever_the_number_of_their_streams() {
        let weights = Weights {
            preview: 1,
            stream: 6,
            training: 3,
        };
        let mut fair = Fair::new(weights);
        (0..10).for_each(|id| fair.add(id, Priority::Stream));
        fair.add(10, Priority::Training);
        fair.add(11, Priority::Preview);
        let got = serve(&mut fair, &(0..12).map(|id| (id, 1000)).collect(), 1000);
        let streams: u64 = (0..10).map(|id| got[&id]).sum();
        assert!(streams.abs_diff(600) <= 2 && got[&10].abs_diff(300) <= 2, "{got:?}");
        assert!((0..10).all(|id| got[&id].abs_diff(60) <= 1), "{got:?}");
    }

    #[test]
    fn idling_earns_no_credit() {
        let mut fair = Fair::new(Weights::default());
        fair.add(0, Priority::Stream);
        fair.add(1, Priority::Stream);
        serve(&mut fair, &BTreeMap::from([(0, 1000)]), 500);
        let got = serve(&mut fair, &BTreeMap::from([(0, 1000), (1, 1000)]), 100);
        assert!(got[&0].abs_diff(50) <= 1, "{got:?}");
        // Nor does a class that was away.
        fair.add(2, Priority::Preview);
        let got = serve(&mut fair, &BTreeMap::from([(0, 1000), (2, 1000)]), 100);
        assert!(got[&0].abs_diff(50) <= 1, "{got:?}");
    }

    #[test]
    fn a_preview_is_served_before_a_second_patch_of_anybody() {
        let mut fair = Fair::new(Weights::default());
        (0..50).for_each(|id| fair.add(id, Priority::Stream));
        serve(&mut fair, &(0..50).map(|id| (id, 1000)).collect(), 75);
        fair.add(99, Priority::Preview);
        assert_eq!(fair.pick(|_| true), Some(99));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

        /// Equals get the same, and streams of dear patches get fewer: the same time.
        #[test]
        fn streams_of_a_class_get_equal_time(costs in prop::collection::vec(1_000u64..50_000, 2..20)) {
            let mut fair = Fair::new(Weights::default());
            (0..costs.len()).for_each(|id| fair.add(id as u64, Priority::Stream));
            let costs: BTreeMap<u64, u64> = (0..).zip(costs).collect();
            let dearest = costs.values().max().unwrap();
            let got = serve(&mut fair, &costs, 2_000);
            let times: Vec<u64> = got.iter().map(|(id, patches)| patches * costs[id]).collect();
            let (least, most) = (times.iter().min().unwrap(), times.iter().max().unwrap());
            prop_assert!(most - least <= 2 * dearest, "{:?}", times);
        }
    }
}
