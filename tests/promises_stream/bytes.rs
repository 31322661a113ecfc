//! Promises P1 and P2: the same bytes whatever the threads, cursors, shares, epochs and ranks.

use std::collections::BTreeMap;
use std::sync::Arc;

use freetumor::digest::Digest;
use freetumor::sampler::Pool;
use freetumor::stream::cursor::Cursor;
use freetumor::stream::delivery::{Delivery, LastBatch};
use freetumor::stream::patch::{Outcome, StreamedPatch};
use freetumor::stream::recipe::{Fallback, Recipe};
use freetumor::stream::{PatchService, first_index};
use freetumor::volume::SizeClass;

use super::{analytic, batches, bundle, digests, judged, known, read, start};

#[test]
fn p1_bytes_do_not_depend_on_threads_batches_worlds_or_restarts() {
    let delivery = |rank, world, batch_size, count| {
        batches(
            Delivery {
                rank,
                world,
                batch_size,
                ..Delivery::default()
            },
            count,
        )
    };
    for (recipe, bundle) in [
        (analytic(), None),
        (judged(0.05, Fallback::Best), Some(bundle(known()))),
    ] {
        let reference = digests(&read(&start(1, bundle.clone()), &recipe, &delivery(0, 1, 1, 12)));
        assert_eq!(reference.len(), 12);
        let streams = start(3, bundle);
        assert_eq!(digests(&read(&streams, &recipe, &delivery(0, 1, 4, 3))), reference);
        for world in [2u32, 3] {
            let mut together = BTreeMap::new();
            for rank in 0..world {
                let count = 12 / (2 * u64::from(world));
                together.extend(digests(&read(&streams, &recipe, &delivery(rank, world, 2, count))));
            }
            assert_eq!(together, reference, "world {world}");
        }
        let other = Recipe { seed: 12, ..recipe };
        let changed = digests(&read(&streams, &other, &delivery(0, 1, 4, 3)));
        assert!(changed.iter().all(|(index, digest)| reference[index] != *digest));
    }
}

#[test]
fn p2_a_cursor_goes_on_where_the_stream_stopped() {
    let recipe = analytic();
    let streams = start(2, None);
    let resolved = streams.resolve(recipe.clone()).unwrap();
    let whole = digests(&read(&streams, &recipe, &Delivery::default()));
    assert_eq!(whole.len(), 24);
    let mut stream = streams.open(&resolved, &Delivery::default()).unwrap();
    let first: Vec<_> = (0..5).map(|_| stream.next_batch().unwrap().unwrap()).collect();
    drop(stream);
    let cursor = first[4].next.clone();
    assert_eq!((first[4].step, cursor.next_index), (4, 10));
    // Another process, another world: the rest of the epoch is the same.
    let streams = start(1, None);
    let first = first.into_iter().flat_map(|batch| batch.patches);
    let mut pieces = digests(&first.map(Arc::unwrap_or_clone).collect::<Vec<_>>());
    for rank in 0..2 {
        let delivery = Delivery {
            rank,
            world: 2,
            batch_size: 1,
            cursor: Some(cursor.clone()),
            ..Delivery::default()
        };
        pieces.extend(digests(&read(&streams, &recipe, &delivery)));
    }
    assert_eq!(pieces, whole);
}

#[test]
fn p2_cursors_of_something_else_are_refused_by_field() {
    let streams = start(1, None);
    let resolved = streams.resolve(analytic()).unwrap();
    let open = |change: fn(&mut Cursor)| {
        let mut cursor = resolved.cursor(4);
        change(&mut cursor);
        let delivery = Delivery {
            cursor: Some(cursor),
            ..Delivery::default()
        };
        streams
            .open(&resolved, &delivery)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    assert!(open(|_| ()).is_ok());
    let error = |change| open(change).unwrap_err();
    assert!(error(|cursor| cursor.recipe = Digest::of(b"x")).starts_with("cursor field recipe"));
    assert!(error(|cursor| cursor.snapshot = Digest::of(b"x")).starts_with("cursor field snapshot"));
    assert!(error(|cursor| cursor.revision += 1).starts_with("cursor field revision"));
    assert!(error(|cursor| cursor.bundle = Digest::of(b"x")).contains("no longer held"));
    for (delivery, field) in [
        (
            Delivery {
                rank: 1,
                ..Delivery::default()
            },
            "rank",
        ),
        (
            Delivery {
                world: 0,
                ..Delivery::default()
            },
            "world",
        ),
        (
            Delivery {
                batch_size: 65,
                ..Delivery::default()
            },
            "batch_size",
        ),
    ] {
        let error = streams.open(&resolved, &delivery).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("delivery field {field}")), "{error}");
    }
}

#[test]
fn p2_every_rank_gets_as_many_batches_and_epochs_end() {
    let streams = start(1, None);
    let resolved = streams
        .resolve(Recipe {
            patches_per_epoch: Some(10),
            ..analytic()
        })
        .unwrap();
    for (last_batch, expected) in [(LastBatch::Fill, 2), (LastBatch::Drop, 1), (LastBatch::Partial, 2)] {
        for rank in 0..2 {
            let delivery = Delivery {
                rank,
                world: 2,
                batch_size: 3,
                last_batch,
                ..Delivery::default()
            };
            assert_eq!(streams.open(&resolved, &delivery).unwrap().batches(), expected);
        }
    }
    // Where indices are dropped at its end, the cursor stands at the next epoch.
    let dropping = |cursor| Delivery {
        batch_size: 4,
        last_batch: LastBatch::Drop,
        cursor,
        ..Delivery::default()
    };
    let mut first = streams.open(&resolved, &dropping(None)).unwrap();
    let ends = std::iter::from_fn(|| first.next_batch()).map(|batch| batch.unwrap().next);
    let ends: Vec<_> = ends.collect();
    assert_eq!(ends.iter().map(|cursor| cursor.next_index).collect::<Vec<_>>(), [4, 10]);
    let mut second = streams.open(&resolved, &dropping(ends.last().cloned())).unwrap();
    assert_eq!(second.batches(), 2);
    assert_eq!(second.next_batch().unwrap().unwrap().patches[0].meta.index, 10);
    // Also where no batch is left to say so.
    let late = Delivery {
        from: 7,
        ..dropping(None)
    };
    assert_eq!(streams.open(&resolved, &late).unwrap().batches(), 0);
    assert_eq!(first_index(&resolved, &late).unwrap(), 10);
}

#[test]
fn p2_shares_are_kept_and_cases_visited_evenly() {
    let recipe = Recipe {
        pools: Some(BTreeMap::from([(Pool::LabelledReal, 1.0), (Pool::UnlabelledHost, 2.0)])),
        organs: Some(BTreeMap::from([("liver".into(), 3.0), ("kidney".into(), 1.0)])),
        patch: Some([16; 3]),
        patches_per_epoch: Some(72),
        ..analytic()
    };
    let patches = read(&start(2, None), &recipe, &Delivery::default());
    let count = |keep: &dyn Fn(&StreamedPatch) -> bool| patches.iter().filter(|patch| keep(patch)).count();
    assert_eq!(count(&|patch| patch.meta.pool == Pool::LabelledReal), 24);
    assert_eq!(count(&|patch| patch.meta.organ == "kidney"), 18);
    let host = |patch: &&StreamedPatch| patch.meta.pool == Pool::UnlabelledHost;
    assert!(
        patches
            .iter()
            .filter(host)
            .all(|patch| patch.meta.outcome == Outcome::Accepted)
    );
    let tiny = count(&|patch| {
        patch
            .meta
            .lesions
            .first()
            .is_some_and(|lesion| lesion.size == SizeClass::Tiny)
    });
    assert!((23..=25).contains(&tiny), "{tiny}");
    let mut visits: BTreeMap<_, BTreeMap<String, usize>> = BTreeMap::new();
    for patch in &patches {
        let key = (patch.meta.pool, patch.meta.organ.clone());
        *visits
            .entry(key)
            .or_default()
            .entry(patch.meta.case.clone())
            .or_default() += 1;
    }
    for (key, cases) in visits {
        let (least, most) = (cases.values().min().unwrap(), cases.values().max().unwrap());
        assert!(most - least <= 1, "{key:?} {cases:?}");
    }
}

#[test]
fn p2_a_partial_epoch_ends_with_what_is_left_on_every_rank() {
    let streams = start(2, None);
    let recipe = Recipe {
        patches_per_epoch: Some(10),
        ..analytic()
    };
    let reference = digests(&read(
        &streams,
        &recipe,
        &batches(
            Delivery {
                batch_size: 1,
                ..Delivery::default()
            },
            10,
        ),
    ));
    let mut pieces = BTreeMap::new();
    for rank in 0..3 {
        let delivery = Delivery {
            rank,
            world: 3,
            batch_size: 3,
            last_batch: LastBatch::Partial,
            ..Delivery::default()
        };
        let resolved = streams.resolve(recipe.clone()).unwrap();
        let mut stream = streams.open(&resolved, &delivery).unwrap();
        let read: Vec<_> = std::iter::from_fn(|| stream.next_batch()).map(Result::unwrap).collect();
        let sizes: Vec<usize> = read.iter().map(|batch| batch.patches.len()).collect();
        // One index is left for three ranks: two get a batch without patches, so that all take two steps.
        assert_eq!(sizes, [3, usize::from(rank == 0)]);
        assert_eq!(read[1].next.next_index, 10);
        let patches = read.into_iter().flat_map(|batch| batch.patches);
        pieces.extend(digests(&patches.map(Arc::unwrap_or_clone).collect::<Vec<_>>()));
    }
    assert_eq!(pieces, reference);
}
