//! Where the requests of all streams meet: who asks for its next patch, who makes it, and who gets it.
//!
//! ```text
//! stream: open, take, take, ... leave          preparation thread: next -> make -> finish
//!            |  its lane: how far it has asked and taken                  |
//!            +------------> fair pick <-----------------------------------+
//!                           computations: made once, for every stream of the recipe that wants the index
//! ```
//!
//! A stream asks for nothing itself: a thread that has nothing to do picks the stream whose turn it is, if that stream
//! has room. What streams of one recipe want at the same time, or within `share_patches` of each other, is made once;
//! a stream further behind gets its patches made again, equal by promise P1.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::{counter, gauge};

use super::course::Course;
use super::delivery::Priority;
use super::fair::Fair;
use super::lane::{Arrived, Lane};
use super::room::{Limits, Progress, Room};
use crate::digest::Digest;
use crate::synth::Cancelled;
use crate::telemetry::metrics::{PATCHES_IN_FLIGHT, PATCHES_TAKEN_BACK_TOTAL};

/// What a patch is taken to cost before any was made.
const FIRST_COST: Duration = Duration::from_millis(10);
/// How much a new measurement changes what a recipe's patches are taken to cost: one part in so many.
const COST_MEMORY: u64 = 32;
/// Recipes whose patches cost no more and no less than the median by this factor count as equals: single patches scatter
/// far more, and streams that differ in their seed alone would drift apart by what was measured of them.
const ALIKE: u64 = 2;

/// Streams of one key want the same patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The hash of the models.
    pub(super) models: Digest,
    /// The hash of the recipe.
    pub(super) recipe: Digest,
    /// Whether failures are items.
    pub(super) skips_failed: bool,
}

/// A stream's request to be served.
pub(super) struct Opening<W> {
    pub(super) key: Key,
    /// What a preparation thread needs to make one of the patches.
    pub(super) work: W,
    pub(super) course: Course,
    pub(super) priority: Priority,
    /// As how many patches of the plan's size one of its patches counts, at least 1.
    pub(super) room: u64,
}

/// A patch to be made.
pub(super) struct Order<W> {
    pub(super) work: W,
    pub(super) index: u64,
    /// Set once nobody waits for it any more.
    pub(super) cancelled: Cancelled,
    key: Key,
    number: u64,
}

/// What streams of one key share.
struct Group<W, T> {
    work: W,
    lanes: usize,
    /// What a patch costs, in nanoseconds.
    cost: u64,
    /// As in [`Opening`].
    room: u64,
    made: HashMap<u64, Computation<T>>,
}

enum Computation<T> {
    Running {
        number: u64,
        cancelled: Cancelled,
        /// Lane and ordinal; the first is who asked for it.
        waiting: Vec<(u64, u64)>,
    },
    /// Kept for the lanes that are behind.
    Kept { number: u64, value: T },
}

/// What a stream leaves behind that nobody else wants: to be freed.
struct Left<W, T> {
    _ready: BTreeMap<u64, Arrived<T>>,
    _unwanted: Vec<Computation<T>>,
    /// What the streams of its key shared, where it was the last one.
    _group: Option<Group<W, T>>,
}

struct State<W, T> {
    fair: Fair,
    lanes: BTreeMap<u64, Lane<T>>,
    groups: HashMap<Key, Group<W, T>>,
    /// What is kept, oldest first: key, index and room.
    kept: BTreeMap<u64, (Key, u64, u64)>,
    /// The room of what is kept.
    kept_room: u64,
    /// Patches asked for and not yet taken.
    in_flight: usize,
    /// Patches taken.
    reads: u64,
    numbers: u64,
    is_closed: bool,
}

/// The meeting point of streams and preparation threads.
pub(super) struct Scheduler<W, T> {
    limits: Limits,
    state: Mutex<State<W, T>>,
    work: Condvar,
}

impl<W: Clone, T: Clone> Scheduler<W, T> {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: Mutex::new(State {
                fair: Fair::new(limits.weights),
                lanes: BTreeMap::new(),
                groups: HashMap::new(),
                kept: BTreeMap::new(),
                kept_room: 0,
                in_flight: 0,
                reads: 0,
                numbers: 0,
                is_closed: false,
            }),
            work: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<W, T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many patches streams are ahead of their readers.
    pub(super) fn in_flight(&self) -> usize {
        self.state().in_flight
    }

    /// Tells whether a reader other than a training waits for a patch that is still to be made.
    pub(super) fn has_waiting_readers(&self) -> bool {
        let state = self.state();
        let mut readers = state.lanes.values().filter(|lane| lane.priority != Priority::Training);
        readers.any(|lane| {
            let Progress { taken, is_reading, .. } = lane.progress;
            is_reading && taken < lane.course.patches() && !lane.window.holds(taken)
        })
    }

    /// Takes a stream in; nothing is made for it before its first [`take`](Self::take).
    pub(super) fn open(&self, opening: Opening<W>) -> u64 {
        let mut state = self.state();
        let id = state.number();
        let cost = state.first_cost();
        let group = state.groups.entry(opening.key).or_insert_with(|| Group {
            work: opening.work,
            lanes: 0,
            cost,
            room: opening.room.max(1),
            made: HashMap::new(),
        });
        group.lanes += 1;
        state.fair.add(id, opening.priority);
        let lane = Lane::new(opening.key, opening.priority, opening.course, opening.room);
        if state.is_closed {
            lane.window.close();
        }
        state.lanes.insert(id, lane);
        id
    }

    /// Waits for a stream's next patch; nothing once the stream left or the scheduler closed.
    pub(super) fn take(&self, id: u64) -> Option<Arrived<T>> {
        let (window, ordinal) = {
            let mut state = self.state();
            let reads = state.reads;
            let waiting = state.lanes.get_mut(&id)?.come(reads);
            state.reuse(id, &self.limits);
            waiting
        };
        self.work.notify_all();
        let arrived = window.take(ordinal)?;
        let mut state = self.state();
        let reads = state.reads + 1;
        if let Some(lane) = state.lanes.get_mut(&id) {
            lane.progress.reads(reads);
            state.reads = reads;
            state.in_flight -= 1;
            gauge!(PATCHES_IN_FLIGHT).decrement(1);
            state.reuse(id, &self.limits);
        }
        drop(state);
        self.work.notify_all();
        Some(arrived)
    }

    /// Forgets a stream: what only it waited for is not made, and who waits in its [`take`](Self::take) is woken.
    pub(super) fn leave(&self, id: u64) {
        // Patches that nobody wants any more and models whose last stream this was are freed, which takes its time: not under
        // the lock.
        let left = self.state().leave(id);
        self.work.notify_all();
        drop(left);
    }

    /// Waits for a patch to be made; nothing once the scheduler is closed.
    pub(super) fn next(&self) -> Option<Order<W>> {
        // What is taken back is freed after the lock is.
        let mut taken_back = Vec::new();
        let mut state = self.state();
        while !state.is_closed {
            if let Some(order) = state.next(&self.limits, &mut taken_back) {
                return Some(order);
            }
            if !taken_back.is_empty() {
                drop(state);
                taken_back.clear();
                state = self.state();
                continue;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Hands a patch that was made to who waits for it. Where `is_shareable`, it is kept for streams that are behind.
    pub(super) fn finish(&self, order: &Order<W>, value: T, took: Duration, is_shareable: bool) {
        let share_patches = if is_shareable { self.limits.share_patches } else { 0 };
        self.state().finish(order, value, took, share_patches);
        self.work.notify_all();
    }

    /// Ends every stream and every thread that waits for work.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        state.lanes.values().for_each(|lane| drop(lane.window.close()));
        drop(state);
        self.work.notify_all();
    }
}

impl<W: Clone, T: Clone> State<W, T> {
    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn room(&self, limits: &Limits) -> Room {
        Room::of(limits, self.lanes.values().map(|lane| &lane.progress), self.reads)
    }

    /// Returns the median of what patches of the streamed recipes cost.
    fn typical_cost(&self) -> u64 {
        let mut costs: Vec<u64> = self.groups.values().map(|group| group.cost).collect();
        let middle = costs.len() / 2;
        if costs.is_empty() {
            return 0;
        }
        *costs.select_nth_unstable(middle).1
    }

    /// Returns what patches of a recipe cost of which none was made yet: as much as others, so that nobody who comes anew for every few
    /// patches is always cheap.
    fn first_cost(&self) -> u64 {
        match self.typical_cost() {
            0 => FIRST_COST.as_nanos() as u64,
            typical => typical,
        }
    }

    /// Returns the next patch to be made, handing out on the way what is made already.
    fn next(&mut self, limits: &Limits, taken_back: &mut Vec<Arrived<T>>) -> Option<Order<W>> {
        loop {
            let room = self.room(limits);
            let (lanes, giver) = (&self.lanes, self.giver(&room));
            let id = self.fair.pick(|id| {
                let lane = lanes.get(&id).filter(|lane| lane.is_due(&room));
                lane.is_some_and(|lane| room.has_room(&lane.progress) || giver.is_some())
            })?;
            if let Some(lane) = self.lanes.get(&id)
                && !room.has_room(&lane.progress)
            {
                taken_back.extend(self.take_back(giver?));
                // A small patch makes too little room for a large one.
                let room = self.room(limits);
                if !self.lanes.get(&id).is_some_and(|lane| room.has_room(&lane.progress)) {
                    continue;
                }
            }
            if let Some(order) = self.ask(id) {
                return Some(order);
            }
        }
    }

    /// Returns who gives room back where all is used: the stream furthest above its part, of those whose last patch lies ready.
    fn giver(&self, room: &Room) -> Option<u64> {
        if !room.is_tight {
            return None;
        }
        let above = self.lanes.iter().filter(|(_, lane)| room.surplus(&lane.progress) > 0);
        let ready = above.filter(|(_, lane)| lane.window.holds(lane.progress.asked - 1));
        ready
            .max_by_key(|(_, lane)| room.surplus(&lane.progress))
            .map(|(id, _)| *id)
    }

    /// Takes the last patch back that a stream has asked for: its reader has another before it, which stays.
    fn take_back(&mut self, id: u64) -> Option<Arrived<T>> {
        let lane = self.lanes.get_mut(&id)?;
        self.in_flight -= 1;
        gauge!(PATCHES_IN_FLIGHT).decrement(1);
        counter!(PATCHES_TAKEN_BACK_TOTAL).increment(1);
        lane.take_back()
    }

    /// Gives a stream what others had made, as far as it goes.
    fn reuse(&mut self, id: u64, limits: &Limits) {
        while let Some(lane) = self.lanes.get(&id) {
            let index = lane.course.index(lane.progress.asked);
            let group = self.groups.get(&lane.key);
            let is_made = group.is_some_and(|group| group.made.contains_key(&index));
            let has_room = || {
                let room = self.room(limits);
                lane.is_due(&room) && room.has_room(&lane.progress)
            };
            if !is_made || !has_room() {
                break;
            }
            self.ask(id);
        }
    }

    /// Asks for a stream's next patch; returns an order where nobody had asked for it yet.
    fn ask(&mut self, id: u64) -> Option<Order<W>> {
        let (number, typical) = (self.number(), self.typical_cost());
        let lane = self.lanes.get_mut(&id)?;
        let group = self.groups.get_mut(&lane.key)?;
        let (ordinal, key) = (lane.progress.asked, lane.key);
        let index = lane.course.index(ordinal);
        lane.progress.asked += 1;
        self.in_flight += 1;
        gauge!(PATCHES_IN_FLIGHT).increment(1);
        match group.made.get_mut(&index) {
            Some(Computation::Running { waiting, .. }) => waiting.push((id, ordinal)),
            Some(Computation::Kept { value, .. }) => {
                let value = value.clone();
                lane.window.put(ordinal, Arrived { value, is_reused: true });
                self.forget_unwanted(key, index);
            }
            None => {
                let cancelled = Cancelled::default();
                let running = Computation::Running {
                    number,
                    cancelled: cancelled.clone(),
                    waiting: vec![(id, ordinal)],
                };
                group.made.insert(index, running);
                let is_alike = group.cost <= typical.saturating_mul(ALIKE) && group.cost >= typical / ALIKE;
                self.fair.charge(id, if is_alike { typical } else { group.cost });
                return Some(Order {
                    work: group.work.clone(),
                    index,
                    cancelled,
                    key,
                    number,
                });
            }
        }
        None
    }

    fn finish(&mut self, order: &Order<W>, value: T, took: Duration, share_patches: usize) {
        let Some(group) = self.groups.get_mut(&order.key) else {
            return;
        };
        // Everybody may have left and somebody else may have asked anew; what was broken off tells nothing of the cost.
        let is_ours = matches!(group.made.get(&order.index),
            Some(Computation::Running { number, .. }) if *number == order.number);
        if !is_ours {
            return;
        }
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX / COST_MEMORY);
        group.cost = (group.cost / COST_MEMORY * (COST_MEMORY - 1)).saturating_add(took / COST_MEMORY);
        if let Some(Computation::Running { waiting, .. }) = group.made.remove(&order.index) {
            for (nth, (id, ordinal)) in waiting.into_iter().enumerate() {
                if let Some(lane) = self.lanes.get(&id) {
                    let arrived = Arrived {
                        value: value.clone(),
                        is_reused: nth > 0,
                    };
                    lane.window.put(ordinal, arrived);
                }
            }
        }
        let most = share_patches as u64 / group.room;
        if most > 0 && self.is_wanted(order.key, order.index, most) {
            self.keep(order, value, share_patches as u64);
        }
    }

    /// Tells whether a stream of the key is behind an index, but not by more than is kept.
    fn is_wanted(&self, key: Key, index: u64, most: u64) -> bool {
        let mut lanes = self.lanes.values().filter(|lane| lane.key == key);
        lanes.any(|lane| {
            let ordinal = lane.course.ordinal(index);
            let asked = lane.progress.asked;
            ordinal.is_some_and(|ordinal| ordinal >= asked && ordinal - asked < most)
        })
    }

    fn keep(&mut self, order: &Order<W>, value: T, share_patches: u64) {
        if let Some(group) = self.groups.get_mut(&order.key) {
            let number = order.number;
            group.made.insert(order.index, Computation::Kept { number, value });
            self.kept.insert(number, (order.key, order.index, group.room));
            self.kept_room += group.room;
        }
        while self.kept_room > share_patches {
            let Some((_, (key, index, room))) = self.kept.pop_first() else {
                break;
            };
            self.kept_room -= room;
            if let Some(group) = self.groups.get_mut(&key) {
                group.made.remove(&index);
            }
        }
    }

    /// Takes a kept patch out that no stream is behind any more.
    fn forget_unwanted(&mut self, key: Key, index: u64) -> Option<Computation<T>> {
        if self.is_wanted(key, index, u64::MAX) {
            return None;
        }
        let group = self.groups.get_mut(&key)?;
        let Some(Computation::Kept { number, .. }) = group.made.get(&index) else {
            return None;
        };
        self.kept_room -= self.kept.remove(number).map_or(0, |(.., room)| room);
        group.made.remove(&index)
    }

    /// Forgets a stream; returns what goes with it.
    fn leave(&mut self, id: u64) -> Option<Left<W, T>> {
        let lane = self.lanes.remove(&id)?;
        self.fair.remove(id);
        let ready = lane.window.close();
        let ahead = lane.progress.ahead();
        self.in_flight -= usize::try_from(ahead).unwrap_or(usize::MAX);
        gauge!(PATCHES_IN_FLIGHT).decrement(ahead as f64);
        let group = self.groups.get_mut(&lane.key)?;
        group.lanes -= 1;
        group.made.retain(|_, computation| match computation {
            Computation::Running { waiting, cancelled, .. } => {
                waiting.retain(|(waiter, _)| *waiter != id);
                if waiting.is_empty() {
                    cancelled.cancel();
                }
                !waiting.is_empty()
            }
            Computation::Kept { .. } => true,
        });
        let kept: Vec<u64> = (group.made.iter())
            .filter(|(_, computation)| matches!(computation, Computation::Kept { .. }))
            .map(|(index, _)| *index)
            .collect();
        let is_last = group.lanes == 0;
        let unwanted = kept
            .into_iter()
            .filter_map(|index| self.forget_unwanted(lane.key, index));
        let unwanted = unwanted.collect();
        let group = if is_last { self.groups.remove(&lane.key) } else { None };
        Some(Left {
            _ready: ready,
            _unwanted: unwanted,
            _group: group,
        })
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
