//! Promise P7: what is held out is neither served nor learnt from.

use std::collections::BTreeSet;
use std::sync::Arc;

use freetumor::checkpoint::Provenance;
use freetumor::digest::Digest;
use freetumor::store::{CaseKind, CaseRecord, Cases, MemoryStore};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::negatives::UnlabelledNegatives;
use freetumor::stream::recipe::{Fallback, Recipe, Selection};
use freetumor::stream::{PatchService, StreamError, Streams};
use freetumor::volume::Region;

use super::{SIDE, analytic, batches, bundle, config, judged, known, looks, plan, push_case, read, start};

#[test]
fn p7_models_that_saw_a_held_out_case_are_refused() {
    let recipe = |case: &str, allow| Recipe {
        select: Selection {
            hold_out: vec![case.into()],
            ..Selection::default()
        },
        allow_unknown_provenance: allow,
        ..judged(0.0, Fallback::Healthy)
    };
    let resolve = |provenance, recipe| {
        let resolved = start(1, Some(bundle(provenance))).resolve(recipe);
        resolved.map(|resolved| resolved.bundle)
    };
    let error = resolve(known(), recipe("case-1", false)).unwrap_err();
    assert!(
        matches!(&error, StreamError::Leak { what } if what.contains("case-1")),
        "{error}"
    );
    assert!(resolve(known(), recipe("case-2", false)).is_ok());
    assert!(matches!(
        resolve(Provenance::default(), recipe("case-2", false)),
        Err(StreamError::Leak { .. })
    ));
    assert!(resolve(Provenance::default(), recipe("case-2", true)).is_ok());
    // Choosing cases holds the others out.
    let chosen = Recipe {
        select: Selection {
            cases: Some(vec!["case-2".into(), "case-3".into()]),
            ..Selection::default()
        },
        ..judged(0.0, Fallback::Healthy)
    };
    assert!(matches!(resolve(known(), chosen), Err(StreamError::Leak { .. })));
    // Models that are not needed are not asked, and do not decide the bytes.
    let unneeded = Recipe {
        select: recipe("case-1", false).select,
        unlabelled_negatives: Some(UnlabelledNegatives::Trust),
        ..analytic()
    };
    assert_eq!(resolve(known(), unneeded).unwrap(), Digest::default());
}

#[test]
fn p7_a_scan_is_held_out_by_its_voxels_whatever_it_is_called() {
    // The same scan as case-3 under another id.
    let mut store = MemoryStore::new(plan());
    for number in 0..4 {
        let kind = if number < 2 {
            CaseKind::Labelled
        } else {
            CaseKind::Unlabelled
        };
        push_case(&mut store, number, kind);
    }
    let twin = CaseRecord {
        id: "case-3-again".into(),
        ..store.records()[3].clone()
    };
    let crop = store.read(3, Region::whole([SIDE; 3])).unwrap();
    store.push(twin, crop.image, crop.labels);
    let streams = Streams::start(Arc::new(store), Some(bundle(known())), config(1)).unwrap();
    let served = |select: Selection| -> BTreeSet<String> {
        let recipe = Recipe { select, ..analytic() };
        let patches = read(&streams, &recipe, &batches(Delivery::default(), 16));
        patches.into_iter().map(|patch| patch.meta.case).collect()
    };
    let twins = BTreeSet::from(["case-3".to_string(), "case-3-again".to_string()]);
    assert!(!served(Selection::default()).is_disjoint(&twins));
    let by_id = Selection {
        hold_out: vec!["case-3".into()],
        ..Selection::default()
    };
    let by_hash = |source: &str| Selection {
        hold_out_hashes: vec![Digest::of(source.as_bytes())],
        ..Selection::default()
    };
    assert!(served(by_id).is_disjoint(&twins));
    assert!(served(by_hash("source-3")).is_disjoint(&twins));
    // Models are refused by hash as well, also for a scan that the store does not have.
    let leak = |select: Selection, provenance| {
        let recipe = Recipe {
            select,
            ..judged(0.0, Fallback::Healthy)
        };
        start(1, Some(bundle(provenance)))
            .resolve(recipe)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(leak(by_hash("source-1"), known()).contains("case-1"));
    let elsewhere = Provenance {
        source_hashes: BTreeSet::from([Digest::of(b"elsewhere")]),
        ..known()
    };
    assert!(leak(by_hash("elsewhere"), elsewhere).contains(&Digest::of(b"elsewhere").to_string()));
}

#[test]
fn near_duplicates_of_held_out_cases_are_neither_served_nor_trained_on() {
    let mut plain = MemoryStore::new(plan());
    for number in 0..5 {
        let kind = if number < 2 {
            CaseKind::Labelled
        } else {
            CaseKind::Unlabelled
        };
        push_case(&mut plain, number, kind);
    }
    let mut store = MemoryStore::new(plan());
    for (case, record) in plain.records().iter().enumerate() {
        let crop = plain.read(case, Region::whole([SIDE; 3])).unwrap();
        let record = CaseRecord {
            // The fourth is the third again, saved without its first ten planes.
            fingerprint: match case {
                3 => looks::fingerprint(2, 10..40),
                _ => looks::fingerprint(case as u64, 0..40),
            },
            ..record.clone()
        };
        store.push(record, crop.image, crop.labels);
    }
    let store: Arc<dyn Cases> = Arc::new(store);
    let hold_out = |id: &str| Selection {
        hold_out: vec![id.into()],
        ..Selection::default()
    };
    let streams = Streams::start(store.clone(), None, config(1)).unwrap();
    let served = |select: Selection| -> BTreeSet<String> {
        let recipe = Recipe { select, ..analytic() };
        let patches = read(&streams, &recipe, &batches(Delivery::default(), 16));
        patches.into_iter().map(|patch| patch.meta.case).collect()
    };
    assert!(served(Selection::default()).contains("case-3"));
    assert!(!served(hold_out("case-2")).contains("case-3"));
    let by_hash = Selection {
        hold_out_hashes: vec![Digest::of(b"source-2")],
        ..Selection::default()
    };
    assert!(!served(by_hash).contains("case-3"));

    let resolve = |trained_on: Provenance, id: &str| {
        let streams = Streams::start(store.clone(), Some(bundle(trained_on)), config(1)).unwrap();
        let recipe = Recipe {
            select: hold_out(id),
            ..judged(0.0, Fallback::Healthy)
        };
        streams.resolve(recipe).map(|_| ()).map_err(|error| error.to_string())
    };
    // Trained on the store's own copy of the held-out case.
    let on_copy = Provenance {
        source_hashes: BTreeSet::from([Digest::of(b"source-3")]),
        ..known()
    };
    let error = resolve(on_copy, "case-2").unwrap_err();
    assert!(
        error.contains("(1 as near-duplicates)") && error.contains("case-2"),
        "{error}"
    );
    // Trained elsewhere, on a copy that this store does not hold.
    let elsewhere = |fingerprints| Provenance {
        known: true,
        source_hashes: BTreeSet::from([Digest::of(b"elsewhere")]),
        fingerprints,
    };
    let copy = BTreeSet::from([looks::fingerprint(0, 5..33)]);
    let error = resolve(elsewhere(copy.clone()), "case-0").unwrap_err();
    assert!(error.contains("case-0") && error.contains("near-duplicate"), "{error}");
    resolve(elsewhere(copy), "case-1").unwrap();
    // Models of older manifests, which have no fingerprints, go by hashes alone.
    resolve(elsewhere(BTreeSet::new()), "case-0").unwrap();
}
