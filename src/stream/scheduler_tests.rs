//! Streams that read, stall and leave, against threads that make patches: no thread, no clock.

use std::collections::BTreeSet;

use super::super::course::course;
use super::super::fair::Weights;
use super::*;
use proptest::prelude::*;

#[path = "stall_tests.rs"]
mod stalls;

const COST: Duration = Duration::from_millis(1);

fn limits(window: usize, max_patches: usize, share_patches: usize) -> Limits {
    Limits {
        window,
        max_patches,
        share_patches,
        weights: Weights::default(),
    }
}

/// The scheduler, what threads are making, and what was made.
struct Bench {
    scheduler: Scheduler<u64, u64>,
    running: Vec<Order<u64>>,
    made: Vec<(u64, u64)>,
    /// How long a recipe's next patch takes.
    took: fn(u64, usize) -> Duration,
    /// As how many patches a recipe's count.
    room: fn(u64) -> u64,
    read: BTreeMap<u64, Vec<Arrived<u64>>>,
}

fn key(recipe: u64) -> Key {
    Key {
        models: Digest::default(),
        recipe: Digest::of(&recipe.to_le_bytes()),
        skips_failed: false,
    }
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            running: Vec::new(),
            made: Vec::new(),
            took: |_, _| COST,
            room: |_| 1,
            read: BTreeMap::new(),
        }
    }

    /// Opens a stream whose patches are its recipe's number times 10^6 plus the index.
    fn open(&mut self, recipe: u64, course: Course) -> u64 {
        self.open_as(recipe, course, Priority::Stream)
    }

    fn open_as(&mut self, recipe: u64, course: Course, priority: Priority) -> u64 {
        let id = self.scheduler.open(Opening {
            key: key(recipe),
            work: recipe,
            course,
            priority,
            room: (self.room)(recipe),
        });
        self.read.insert(id, Vec::new());
        self.touch(id);
        id
    }

    /// What a reader does before it waits.
    fn touch(&self, id: u64) {
        let mut state = self.scheduler.state();
        let reads = state.reads;
        if let Some(lane) = state.lanes.get_mut(&id) {
            lane.come(reads);
        }
        state.reuse(id, &self.scheduler.limits);
    }

    /// Reads a patch, if one lies ready.
    fn read(&mut self, id: u64) -> bool {
        let is_ready = {
            let state = self.scheduler.state();
            let lane = &state.lanes[&id];
            lane.window.holds(lane.progress.taken)
        };
        if is_ready && let Some(arrived) = self.scheduler.take(id) {
            self.read.get_mut(&id).unwrap().push(arrived);
        }
        is_ready
    }

    /// A thread begins with the next patch, if there is one.
    fn begin(&mut self) -> bool {
        let next = self.scheduler.state().next(&self.scheduler.limits, &mut Vec::new());
        let is_some = next.is_some();
        self.running.extend(next);
        is_some
    }

    fn end(&mut self, which: usize) {
        if self.running.is_empty() {
            return;
        }
        let order = self.running.swap_remove(which % self.running.len());
        if !order.cancelled.is_set() {
            self.made.push((order.work, order.index));
        }
        let value = order.work * 1_000_000 + order.index;
        let took = (self.took)(order.work, self.made.len());
        self.scheduler.finish(&order, value, took, true);
    }

    fn check_bounds(&self) {
        let state = self.scheduler.state();
        let limits = self.scheduler.limits;
        let beyond = |lane: &Lane<u64>| lane.progress.ahead().saturating_sub(1) * lane.progress.room;
        assert!(state.lanes.values().map(beyond).sum::<u64>() <= limits.max_patches as u64);
        assert!(state.kept_room <= limits.share_patches as u64);
        assert_eq!(
            state.kept_room,
            state.kept.values().map(|(.., room)| *room).sum::<u64>()
        );
        let ahead: u64 = state.lanes.values().map(|lane| lane.progress.ahead()).sum();
        assert_eq!(ahead, state.in_flight as u64);
        let kept = state.groups.values().flat_map(|group| group.made.values());
        let kept = kept.filter(|made| matches!(made, Computation::Kept { .. })).count();
        assert_eq!(kept, state.kept.len());
    }

    fn values(&self, id: u64) -> Vec<u64> {
        self.read[&id].iter().map(|arrived| arrived.value).collect()
    }

    /// Makes and reads until nothing is left to do.
    fn drain(&mut self, ids: &[u64]) {
        loop {
            let mut is_busy = self.begin();
            while self.begin() {}
            is_busy |= !self.running.is_empty();
            while !self.running.is_empty() {
                self.end(0);
            }
            for id in ids {
                while self.read(*id) {
                    is_busy = true;
                }
            }
            self.check_bounds();
            if !is_busy {
                return;
            }
        }
    }
}

#[test]
fn readers_wait_while_their_next_patch_is_not_made() {
    let mut bench = Bench::new(limits(1, 16, 0));
    let waits = |bench: &Bench| bench.scheduler.has_waiting_readers();
    let training = bench.open_as(1, course(0, 1, 1, 0, 2), Priority::Training);
    bench.drain(&[]);
    assert!(!waits(&bench), "a training is no reader to give way to");
    let id = bench.open(2, course(0, 1, 1, 0, 1));
    assert!(waits(&bench));
    while bench.begin() {}
    while !bench.running.is_empty() {
        bench.end(0);
    }
    assert!(!waits(&bench), "its patch lies ready");
    bench.drain(&[id, training]);
    assert!(!waits(&bench), "it has read all of its course");
}

#[test]
fn equals_that_read_alike_get_alike() {
    let mut bench = Bench::new(limits(4, 16, 0));
    let ids: Vec<u64> = (0..7)
        .map(|recipe| bench.open(recipe, course(0, 1, 2, 0, 500)))
        .collect();
    // Fewer threads than streams, and readers in an order that favours the first.
    for round in 0..700 {
        while bench.running.len() < 2 && bench.begin() {}
        bench.end(round);
        ids.iter().for_each(|id| while bench.read(*id) {});
        bench.check_bounds();
    }
    let got: Vec<usize> = ids.iter().map(|id| bench.read[id].len()).collect();
    let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
    assert!(most * 10 <= least * 11, "{got:?}");
}

#[test]
fn equals_get_alike_whatever_single_patches_take_and_a_dear_recipe_gets_fewer() {
    let mut bench = Bench::new(limits(4, 64, 0));
    // Most patches take 2 to 3 ms and every thirteenth 40 ms, on a busy machine; those of recipe 9 take 60 ms.
    bench.took = |recipe, made| match (recipe, made % 13) {
        (9, _) => Duration::from_millis(60),
        (_, 0) => Duration::from_millis(40),
        _ => Duration::from_millis(2 + made as u64 % 2),
    };
    let ids: Vec<u64> = (0..10)
        .map(|recipe| bench.open(recipe, course(0, 1, 1, 0, 5000)))
        .collect();
    for round in 0..4000 {
        while bench.running.len() < 2 && bench.begin() {}
        bench.end(round * 7);
        ids.iter().for_each(|id| while bench.read(*id) {});
    }
    let got: Vec<usize> = ids.iter().map(|id| bench.read[id].len()).collect();
    let (least, most) = (got[..9].iter().min().unwrap(), got[..9].iter().max().unwrap());
    assert!(most * 10 <= least * 11, "{got:?}");
    assert!(got[9] * 4 <= *least, "{got:?}");
}

#[test]
fn who_comes_anew_for_every_few_patches_is_not_cheap() {
    let mut bench = Bench::new(limits(4, 64, 0));
    bench.took = |_, _| Duration::from_secs(2);
    let long = bench.open(0, course(0, 1, 1, 0, 100_000));
    let (mut next, mut short, mut got) = (1, Vec::new(), 0);
    for round in 0..4000 {
        // Streams of two patches, each of a recipe that nobody has asked for before.
        while round >= 400 && short.len() < 3 {
            short.push(bench.open(next, course(0, 1, 1, 0, 2)));
            next += 1;
        }
        while bench.running.len() < 4 && bench.begin() {}
        bench.end(round);
        while bench.read(long) {}
        short.retain(|id| {
            while bench.read(*id) {}
            let is_over = bench.read[id].len() == 2;
            if is_over {
                bench.scheduler.leave(*id);
                got += 2;
            }
            !is_over
        });
    }
    let long = bench.read[&long].len() - 400;
    // Four streams at any time, and all cost the same.
    assert!(
        (0.2..0.3).contains(&(long as f64 / (long + got) as f64)),
        "{long} of {}",
        long + got
    );
}

#[test]
fn what_was_broken_off_tells_nothing_of_what_a_recipe_costs() {
    let mut bench = Bench::new(limits(4, 64, 0));
    bench.took = |_, _| COST;
    let stays = bench.open(0, course(0, 1, 1, 0, 100));
    bench.drain(&[stays]);
    let cost = |bench: &Bench| bench.scheduler.state().groups[&key(0)].cost;
    let before = cost(&bench);
    bench.took = |_, _| Duration::ZERO;
    for _ in 0..50 {
        let leaves = bench.open(0, course(0, 1, 1, 200, 100));
        assert!(bench.begin());
        bench.scheduler.leave(leaves);
        bench.end(0);
    }
    assert_eq!(cost(&bench), before);
}

#[test]
fn two_streams_of_a_recipe_are_one_computation() {
    let mut bench = Bench::new(limits(4, 16, 8));
    let ids = [
        bench.open(1, course(0, 1, 2, 0, 30)),
        bench.open(1, course(0, 1, 3, 0, 20)),
    ];
    bench.drain(&ids);
    let expected: Vec<u64> = (0..60).map(|index| 1_000_000 + index).collect();
    ids.iter().for_each(|id| assert_eq!(bench.values(*id), expected));
    assert_eq!(bench.made.len(), 60);
    let reused = ids
        .iter()
        .flat_map(|id| &bench.read[id])
        .filter(|arrived| arrived.is_reused);
    assert_eq!(reused.count(), 60);
}

#[test]
fn a_laggard_within_reach_reuses_and_one_beyond_it_gets_its_patches_made_again() {
    let mut bench = Bench::new(limits(4, 64, 8));
    let ahead = bench.open(1, course(0, 1, 1, 0, 40));
    let behind = bench.open(1, course(0, 1, 1, 0, 40));
    // The one behind asks for its first four and then stalls; the other goes on to the end.
    bench.drain(&[ahead]);
    assert_eq!(bench.made.len(), 40);
    bench.drain(&[behind]);
    let expected: Vec<u64> = (0..40).map(|index| 1_000_000 + index).collect();
    assert_eq!(
        (bench.values(ahead), bench.values(behind)),
        (expected.clone(), expected)
    );
    // Four were shared from the start; what was kept when the reader came back is reused, the rest made anew.
    let reused = bench.read.values().flatten().filter(|arrived| arrived.is_reused);
    assert_eq!(reused.count(), 4 + 8);
    assert_eq!(bench.made.len(), 40 + 40 - 12);
    assert!(bench.scheduler.state().kept.is_empty());
}

/// Patches of one, three and more of the plan's than there may be in all, read in turns and one after the other.
#[test]
fn large_patches_keep_within_the_room_and_all_arrive() {
    for one_by_one in [false, true] {
        let mut bench = Bench::new(limits(6, 9, 5));
        bench.room = |recipe| [1, 3, 20][recipe as usize % 3];
        let ids: Vec<u64> = (0..6)
            .map(|recipe| bench.open(recipe, course(0, 1, 1, 0, 30)))
            .collect();
        let late: Vec<u64> = (0..3)
            .map(|recipe| bench.open(recipe, course(0, 1, 1, 0, 30)))
            .collect();
        if one_by_one {
            ids.iter().chain(&late).for_each(|id| bench.drain(&[*id]));
        }
        bench.drain(&[ids.clone(), late.clone()].concat());
        for (recipe, id) in ids.iter().enumerate().chain(late.iter().enumerate()) {
            let expected: Vec<u64> = (0..30).map(|index| recipe as u64 * 1_000_000 + index).collect();
            assert_eq!(bench.values(*id), expected);
            bench.scheduler.leave(*id);
        }
        let state = bench.scheduler.state();
        assert_eq!((state.kept_room, state.in_flight), (0, 0));
    }
}

#[test]
fn ranks_share_no_patch_and_recipes_share_none() {
    let mut bench = Bench::new(limits(4, 64, 8));
    let ids = [
        bench.open(1, course(0, 2, 2, 0, 10)),
        bench.open(1, course(1, 2, 2, 0, 10)),
        bench.open(2, course(0, 2, 2, 0, 10)),
    ];
    bench.drain(&ids);
    assert_eq!(bench.made.len(), 60);
    assert_eq!(bench.made.iter().collect::<BTreeSet<_>>().len(), 60);
}

#[test]
fn a_stream_that_left_costs_nothing_more_and_takes_nothing_from_who_waits_with_it() {
    let mut bench = Bench::new(limits(4, 64, 8));
    let leaver = bench.open(1, course(0, 1, 1, 0, 40));
    assert!(bench.begin() && bench.begin());
    let stayer = bench.open(1, course(0, 1, 1, 1, 40));
    // Index 1 is being made for both, index 0 for the leaver alone.
    bench.scheduler.leave(leaver);
    let cancelled: Vec<bool> = bench.running.iter().map(|order| order.cancelled.is_set()).collect();
    assert_eq!(cancelled, [true, false]);
    bench.drain(&[stayer]);
    assert_eq!(bench.values(stayer)[0], 1_000_001);
    assert_eq!(bench.made.len(), 40);
    bench.scheduler.leave(stayer);
    let state = bench.scheduler.state();
    assert!(state.groups.is_empty() && state.lanes.is_empty() && state.kept.is_empty());
    assert_eq!(state.in_flight, 0);
}

#[test]
fn closing_wakes_readers_and_threads() {
    let scheduler: Scheduler<u64, u64> = Scheduler::new(limits(4, 16, 8));
    let id = scheduler.open(Opening {
        key: key(0),
        work: 0,
        course: course(0, 1, 1, 0, 10),
        priority: Priority::Stream,
        room: 1,
    });
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| scheduler.take(id).is_none());
        let thread = scope.spawn(|| {
            assert!(scheduler.next().is_some());
            (0..10).any(|_| scheduler.next().is_none())
        });
        std::thread::sleep(Duration::from_millis(30));
        scheduler.close();
        assert!(reader.join().unwrap() && thread.join().unwrap());
    });
}

#[derive(Clone, Debug)]
enum Event {
    Open {
        recipe: u64,
        rank: u64,
        world: u64,
        from: u64,
    },
    Read(usize),
    Begin,
    End(usize),
    Leave(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        1 => (0u64..2, 0u64..2, 1u64..3, 0u64..6).prop_map(|(recipe, rank, more, from)| Event::Open {
            recipe, rank, world: rank + more, from }),
        8 => any::<usize>().prop_map(Event::Read),
        6 => Just(Event::Begin),
        6 => any::<usize>().prop_map(Event::End),
        1 => any::<usize>().prop_map(Event::Leave),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever happens, memory stays within its bound, and every stream gets each of its indices once and in order.
    #[test]
    fn nothing_is_lost_repeated_or_held_beyond_the_bound(
        events in prop::collection::vec(event(), 1..400),
        window in 1usize..6, max_patches in 1usize..12, share_patches in 0usize..6,
    ) {
        let mut bench = Bench::new(limits(window, max_patches, share_patches));
        let mut open: Vec<(u64, u64, Course)> = Vec::new();
        for event in events {
            match event {
                Event::Open { recipe, rank, world, from } if open.len() < 8 => {
                    let course = course(rank, world, 2, from, 6);
                    open.push((bench.open(recipe, course), recipe, course));
                }
                Event::Open { .. } => {}
                Event::Read(which) if !open.is_empty() => drop(bench.read(open[which % open.len()].0)),
                Event::Leave(which) if open.len() > 1 => {
                    let (id, ..) = open.swap_remove(which % open.len());
                    bench.scheduler.leave(id);
                }
                Event::Begin => drop(bench.begin()),
                Event::End(which) => bench.end(which),
                Event::Read(_) | Event::Leave(_) => {}
            }
            bench.check_bounds();
        }
        let ids: Vec<u64> = open.iter().map(|(id, ..)| *id).collect();
        bench.drain(&ids);
        for (id, recipe, course) in open {
            let expected: Vec<u64> =
                (0..course.patches()).map(|ordinal| recipe * 1_000_000 + course.index(ordinal)).collect();
            prop_assert_eq!(bench.values(id), expected);
        }
    }
}
