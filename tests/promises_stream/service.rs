//! Promise P3 and the streams side by side: stalls, damaged cases, shared work.

use std::sync::Arc;
use std::time::Duration;

use freetumor::digest::Digest;
use freetumor::store::{Candidate, CaseRecord, Cases, Crop, NearDuplicate, StoreError};
use freetumor::stream::delivery::{Delivery, OnFailed};
use freetumor::stream::recipe::Fallback;
use freetumor::stream::{PatchService, StreamConfig, StreamError, Streams};
use freetumor::volume::{Plan, Region};

use super::{analytic, batches, bundle, config, digests, judged, known, read, start, store};

#[test]
fn p3_a_reader_that_stops_stalls_only_itself() {
    let streams = start(2, None);
    let recipe = analytic();
    let resolved = streams.resolve(recipe.clone()).unwrap();
    let delivery = batches(Delivery::default(), 10_000);
    let mut stalled = streams.open(&resolved, &delivery).unwrap();
    stalled.next_batch().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    // Two were read and at most the window lies ready.
    let made = streams.stats().snapshot().patches;
    assert!(made <= 2 + 6, "{made}");
    assert_eq!(read(&streams, &recipe, &batches(Delivery::default(), 4)).len(), 8);
    drop(stalled);
    assert_eq!(streams.in_flight(), 0);
}

/// A store in which one case is damaged.
struct Damaged(Arc<dyn Cases>, usize);

impl Cases for Damaged {
    fn plan(&self) -> &Plan {
        self.0.plan()
    }

    fn snapshot(&self) -> Digest {
        self.0.snapshot()
    }

    fn records(&self) -> &[CaseRecord] {
        self.0.records()
    }

    fn near_duplicates(&self) -> &[NearDuplicate] {
        self.0.near_duplicates()
    }

    fn read(&self, case: usize, region: Region) -> Result<Crop, StoreError> {
        if case == self.1 {
            return Err(StoreError::Damaged {
                path: "cases/case-3.ftv".into(),
                what: "chunk 0 has checksum 1, expected 2".into(),
            });
        }
        self.0.read(case, region)
    }

    fn candidates(&self, case: usize, organ_id: u8) -> Result<Vec<Candidate>, StoreError> {
        self.0.candidates(case, organ_id)
    }
}

#[test]
fn a_damaged_case_is_an_error_or_a_failed_item() {
    let streams = Streams::start(Arc::new(Damaged(store(), 3)), None, config(2)).unwrap();
    let resolved = streams.resolve(analytic()).unwrap();
    let mut stream = streams.open(&resolved, &Delivery::default()).unwrap();
    let error = std::iter::from_fn(|| stream.next_batch())
        .find_map(Result::err)
        .unwrap();
    assert!(
        matches!(&error, StreamError::Failed { what, .. } if what.contains("case-3.ftv")),
        "{error}"
    );
    assert!(stream.next_batch().is_none(), "an error ends the stream");
    let delivery = Delivery {
        on_failed: OnFailed::Skip,
        ..Delivery::default()
    };
    let patches = read(&streams, &analytic(), &delivery);
    assert_eq!(patches.len(), 24);
    for patch in &patches {
        assert_eq!(patch.meta.failed.is_some(), patch.meta.case == "case-3");
        assert!(patch.meta.failed.is_none() || patch.image.iter().all(|hu| *hu == 0));
        assert!(patch.meta.failed.is_none() || patch.label.iter().all(|label| *label == 255));
    }
    assert!(patches.iter().any(|patch| patch.meta.failed.is_some()));
}

#[test]
fn streams_of_one_recipe_are_one_computation_and_a_laggard_skips_nothing() {
    let streams = start(2, None);
    let recipe = analytic();
    let resolved = streams.resolve(recipe.clone()).unwrap();
    let reference = digests(&read(&start(1, None), &recipe, &Delivery::default()));
    let made = || streams.stats().snapshot().patches;
    let both: Vec<_> = (0..2)
        .map(|_| streams.open(&resolved, &Delivery::default()).unwrap())
        .collect();
    // In step: every patch is made once, and each stream is told which of its patches were made for the other.
    let reused = std::thread::scope(|scope| {
        let readers: Vec<_> = (both.into_iter())
            .map(|mut stream| {
                scope.spawn(move || {
                    let batches: Vec<_> = std::iter::from_fn(|| stream.next_batch()).map(Result::unwrap).collect();
                    let reused: usize = batches.iter().map(|batch| batch.reused.len()).sum();
                    let patches = batches.into_iter().flat_map(|batch| batch.patches);
                    (digests(&patches.map(Arc::unwrap_or_clone).collect::<Vec<_>>()), reused)
                })
            })
            .collect();
        let read: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        assert!(read.iter().all(|(digests, _)| *digests == reference));
        read.iter().map(|(_, reused)| *reused as u64).sum::<u64>()
    });
    assert_eq!(
        (made() + reused, made() < 30),
        (48, true),
        "{} made, {reused} reused",
        made()
    );
    // Far apart: what is no longer kept is made again, equal.
    assert_eq!(digests(&read(&streams, &recipe, &Delivery::default())), reference);
    assert_eq!(streams.in_flight(), 0);
}

#[test]
fn several_bundles_share_threads_turns_and_bounds() {
    let bounds = StreamConfig {
        max_patches: 6,
        ..config(2)
    };
    let plain = Streams::start(store(), None, bounds).unwrap();
    let judging = plain.beside(bundle(known())).unwrap();
    let recipe = judged(0.05, Fallback::Best);
    let delivery = batches(Delivery::default(), 4);
    let alone = read(&start(1, Some(bundle(known()))), &recipe, &delivery);
    assert_eq!(digests(&read(&judging, &recipe, &delivery)), digests(&alone));

    let endless = batches(Delivery::default(), 10_000);
    let mut streams = [(&plain, analytic()), (&judging, recipe)].map(|(service, recipe)| {
        let resolved = service.resolve(recipe).unwrap();
        service.open(&resolved, &endless).unwrap()
    });
    streams
        .iter_mut()
        .for_each(|stream| drop(stream.next_batch().unwrap().unwrap()));
    std::thread::sleep(Duration::from_millis(500));
    // What is ahead of both readers together is within one bound, and one for each.
    let ahead = plain.in_flight();
    assert_eq!(judging.in_flight(), ahead);
    assert!((2..=6 + 2).contains(&ahead), "{ahead}");
    drop(streams);
    assert_eq!(judging.in_flight(), 0);
    // The threads live as long as any service does.
    drop(plain);
    assert_eq!(digests(&read(&judging, &analytic(), &delivery)).len(), 8);
}

#[test]
fn a_stream_that_left_is_woken_and_costs_nothing_more() {
    let streams = start(1, Some(bundle(known())));
    let resolved = streams.resolve(judged(1.0, Fallback::Healthy)).unwrap();
    let mut stream = streams
        .open(
            &resolved,
            &batches(
                Delivery {
                    batch_size: 64,
                    ..Delivery::default()
                },
                100,
            ),
        )
        .unwrap();
    let leave = stream.leave();
    let waiting = std::thread::spawn(move || matches!(stream.next_batch(), Some(Err(StreamError::Stopped))));
    std::thread::sleep(Duration::from_millis(100));
    leave.now();
    assert!(waiting.join().unwrap());
    std::thread::sleep(Duration::from_millis(200));
    let made = streams.stats().snapshot().patches;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((streams.stats().snapshot().patches, streams.in_flight()), (made, 0));
}
