//! Streams whose readers stall, and those that need the room.

use super::*;

#[test]
fn a_stream_that_stalls_leaves_its_share_to_others() {
    let mut bench = Bench::new(limits(4, 16, 0));
    let stalled: Vec<u64> = (0..10)
        .map(|recipe| bench.open(recipe, course(0, 1, 1, 0, 100)))
        .collect();
    while bench.begin() {}
    while !bench.running.is_empty() {
        bench.end(0);
    }
    let reader = bench.open(99, course(0, 1, 1, 0, 100));
    bench.drain(&[reader]);
    assert_eq!(bench.read[&reader].len(), 100);
    // What the others hold is theirs still, and no more than a fair part of what there is.
    assert!(stalled.iter().all(|id| bench.read[id].is_empty()));
    assert!(bench.scheduler.in_flight() <= 16 + 10);
    stalled.iter().for_each(|id| bench.scheduler.leave(*id));
    assert_eq!(bench.scheduler.in_flight(), 0);
}

/// Lets streams of recipes of their own read once and stall, with all ready that they may hold.
fn stall(bench: &mut Bench, streams: u64) -> Vec<u64> {
    let stalled: Vec<u64> = (0..streams)
        .map(|recipe| bench.open(recipe, course(0, 1, 1, 0, 100)))
        .collect();
    for rounds in 0..2 {
        while bench.begin() {}
        while !bench.running.is_empty() {
            bench.end(0);
        }
        (0..1 - rounds).for_each(|_| stalled.iter().for_each(|id| assert!(bench.read(*id))));
    }
    stalled
}

#[test]
fn who_stalls_gives_back_what_others_need_and_misses_nothing_later() {
    // With fewer stalled streams than there is room, and with more.
    for streams in [8, 15, 16, 40] {
        let mut bench = Bench::new(limits(8, 16, 0));
        let stalled = stall(&mut bench, streams);
        let held = bench.scheduler.in_flight();
        let reader = bench.open(99, course(0, 1, 1, 0, 500));
        while bench.begin() {}
        assert!(!bench.running.is_empty());
        while bench.read[&reader].len() < 80 {
            while bench.begin() {}
            bench.check_bounds();
            (0..bench.running.len()).for_each(|_| bench.end(0));
            while bench.read(reader) {}
        }
        // All that there may be was read once since: the others have stalled, and the reader has all of its window.
        while bench.begin() {}
        let running = bench.running.iter().filter(|order| order.work == 99).count();
        assert_eq!(running, 8, "beside {streams} streams that hold {held}");
        assert!(
            stalled
                .iter()
                .all(|id| bench.scheduler.state().lanes[id].progress.ahead() >= 1)
        );
        bench.drain(&[&stalled[..], &[reader]].concat());
        for (id, recipe) in stalled.iter().zip(0..) {
            let expected: Vec<u64> = (0..100).map(|index| recipe * 1_000_000 + index).collect();
            assert_eq!(bench.values(*id), expected);
        }
    }
}

#[test]
fn steady_trainers_that_pause_between_batches_do_not_take_from_each_other() {
    // 24 trainers of batches of 8, one after the other: between two batches of one, the others read 184 patches.
    let mut bench = Bench::new(limits(8, 64, 0));
    let ids: Vec<u64> = (0..24)
        .map(|recipe| bench.open(recipe, course(0, 1, 8, 0, 30)))
        .collect();
    for _ in 0..30 {
        for id in &ids {
            for _ in 0..8 {
                bench.touch(*id);
                while !bench.read(*id) {
                    while bench.running.len() < 4 && bench.begin() {}
                    bench.end(0);
                }
            }
            // Some time passes until the next trainer comes: the threads go on while they may.
            while bench.begin() {}
            (0..bench.running.len()).for_each(|_| bench.end(0));
            bench.check_bounds();
        }
    }
    let read: usize = bench.read.values().map(Vec::len).sum();
    assert_eq!(read, 24 * 8 * 30);
    assert!(
        bench.made.len() <= read + read / 20,
        "{} made, {read} read",
        bench.made.len()
    );
}

#[test]
fn who_comes_gets_its_part_at_once_of_what_lies_ready_for_others() {
    let mut bench = Bench::new(limits(8, 64, 0));
    let stalled = stall(&mut bench, 12);
    let reader = bench.open(99, course(0, 1, 1, 0, 100));
    while bench.begin() {}
    // Of 64 patches beyond everybody's first, a thirteenth, and its own first.
    assert_eq!(bench.running.len(), 5);
    bench.check_bounds();
    let made = bench.made.len();
    bench.drain(&[reader]);
    // Until it shows who stalls, those of whom it does not show yet may fill their windows.
    let others = bench.made.len() - made - 100;
    assert!(others <= 12 * (8 - 6), "{others}");
    assert!(stalled.iter().all(|id| bench.read[id].len() == 1));
}
