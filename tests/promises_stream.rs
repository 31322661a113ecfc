//! Holds streams to promises P1 to P5 and P7 on small volumes in memory and untrained models.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[path = "looks/mod.rs"]
mod looks;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Calibration, CalibrationEntry, InnerCritic, Provenance, Realism, Thresholds};
use freetumor::digest::Digest;
use freetumor::nn::{CubeSides, GeneratorConfig, PublishedConfig, Unet, UnetConfig};
use freetumor::sampler::{Augmentation, Pool};
use freetumor::store::{
    Candidate, CaseKind, CaseRecord, Cases, Crop, MemoryStore, NearDuplicate, OrganRecord, SourceGeometry, StoreError,
    TumourRecord,
};
use freetumor::stream::cursor::Cursor;
use freetumor::stream::delivery::{Delivery, LastBatch, OnFailed};
use freetumor::stream::negatives::UnlabelledNegatives;
use freetumor::stream::patch::{Outcome, StreamedPatch};
use freetumor::stream::recipe::{Fallback, Recipe, Selection};
use freetumor::stream::{
    PatchService, PatchStream, StartError, StreamConfig, StreamError, Streams, first_index, judges,
};
use freetumor::synth::{GateRule, GateSettings, SynthesizerKind};
use freetumor::volume::{Affine, Annotation, ClassSet, ContrastBin, Fingerprint, Grid, Plan, Region, SizeClass};
use ndarray::Array3;

const SIDE: usize = 56;
const SPACING_MM: f64 = 2.0;
/// Organ id, tumour id, centre and radii in voxels.
const LIVER: (u8, u8, [f64; 3], [f64; 3]) = (1, 2, [28.0, 28.0, 22.0], [22.0, 20.0, 18.0]);
const KIDNEY: (u8, u8, [f64; 3], [f64; 3]) = (5, 6, [28.0, 28.0, 49.0], [9.0, 6.0, 6.0]);

fn plan() -> Plan {
    Plan {
        spacing_mm: [SPACING_MM; 3],
        patch: [32; 3],
        ..Plan::default()
    }
}

fn inside((z, y, x): (usize, usize, usize), centre: [f64; 3], radii: [f64; 3]) -> bool {
    let r: f64 = [z, y, x]
        .iter()
        .zip(centre.iter().zip(radii))
        .map(|(v, (c, r))| ((*v as f64 - c) / r).powi(2))
        .sum();
    r <= 1.0
}

fn organ_record(labels: &Array3<u8>, (id, _, _, radii): (u8, u8, [f64; 3], [f64; 3])) -> OrganRecord {
    let least = radii.into_iter().fold(f64::INFINITY, f64::min);
    OrganRecord {
        id,
        voxels: labels.iter().filter(|label| **label == id).count() as u64,
        region: Region::whole([SIDE; 3]),
        holds_mm: (2.0 * least * SPACING_MM) as f32,
    }
}

/// Adds a case: even ones have both organs, odd ones only the liver; labelled ones have a tumour in it.
fn push_case(store: &mut MemoryStore, number: usize, kind: CaseKind) {
    let tumour = ([20.0, 28.0, 18.0], [3.0; 3]);
    let labels = Array3::from_shape_fn([SIDE; 3], |at| {
        if kind == CaseKind::Labelled && inside(at, tumour.0, tumour.1) {
            LIVER.1
        } else if inside(at, LIVER.2, LIVER.3) {
            LIVER.0
        } else if number.is_multiple_of(2) && inside(at, KIDNEY.2, KIDNEY.3) {
            KIDNEY.0
        } else {
            0
        }
    });
    let image = labels.mapv(|label| [-80, 110, 60, 0, 0, 150, 0][usize::from(label)]);
    // A pattern that differs everywhere, so that a misplaced voxel shows.
    let image = Array3::from_shape_fn([SIDE; 3], |(z, y, x)| {
        image[[z, y, x]] + ((z * 7 + y * 3 + x * 5 + number) % 11) as i16
    });
    let mut organs = vec![organ_record(&labels, LIVER)];
    if number.is_multiple_of(2) {
        organs.push(organ_record(&labels, KIDNEY));
    }
    let tumours = (kind == CaseKind::Labelled).then(|| TumourRecord {
        id: LIVER.1,
        voxels: 100,
        region: Region::centred([20, 28, 18], [7; 3]),
        centre: [20, 28, 18],
        diameter_mm: 12.0,
        contrast_hu: -50.0,
    });
    let classes = ["liver", "liver_tumour", "kidney", "kidney_tumour"].map(String::from);
    let annotated = if kind == CaseKind::Labelled { 4 } else { 1 };
    let record = CaseRecord {
        id: format!("case-{number}"),
        kind,
        grid: Grid {
            shape: [SIDE; 3],
            affine: Affine::axis_aligned([SPACING_MM; 3], [-50.0, -40.0, -30.0]),
        },
        annotation: Annotation {
            classes: classes[..annotated].to_vec(),
            assumed_tumour_free: kind == CaseKind::Unlabelled,
        },
        patient: String::new(),
        labels_by: String::new(),
        source_hash: Digest::of(format!("source-{number}").as_bytes()),
        fingerprint: Fingerprint::default(),
        content_hash: Digest::of(format!("content-{number}").as_bytes()),
        source: SourceGeometry {
            shape_xyz: [SIDE; 3],
            affine_xyz: Affine::axis_aligned([SPACING_MM; 3], [0.0; 3]).0,
            orientation: "RAS".into(),
        },
        organs,
        tumours: tumours.into_iter().collect(),
    };
    store.push(record, image, labels);
}

fn store() -> Arc<dyn Cases> {
    let mut store = MemoryStore::new(plan());
    for number in 0..5 {
        let kind = if number < 2 {
            CaseKind::Labelled
        } else {
            CaseKind::Unlabelled
        };
        push_case(&mut store, number, kind);
    }
    Arc::new(store)
}

fn unet(out_channels: usize, seed: u64) -> Unet {
    let config = UnetConfig {
        in_channels: 1,
        out_channels,
        widths: vec![4, 8],
        condition: 0,
    };
    config.init(&Device::flex(), seed)
}

fn bundle(provenance: Provenance) -> Arc<Bundle> {
    let device = Device::flex();
    let generator = GeneratorConfig {
        widths: vec![4, 8],
        organs: 3,
        spread_hu: 10.0,
    };
    Arc::new(Bundle {
        hash: Digest::of(b"untrained"),
        plan: plan(),
        cubes: CubeSides::default(),
        critic: unet(7, 1).into(),
        critic_seen: Provenance::default(),
        inner: Vec::new(),
        generator: Some(generator.init(&device, 2)),
        published: None,
        discriminator: Some(unet(3, 3)),
        calibration: Calibration {
            entries: vec![CalibrationEntry {
                organ: None,
                size: None,
                contrast: None,
                lesions: 20,
                thresholds: Thresholds {
                    recall: 0.0,
                    precision: 0.0,
                },
            }],
        },
        realism: None,
        provenance: provenance.into(),
    })
}

fn known() -> Provenance {
    Provenance {
        known: true,
        source_hashes: BTreeSet::from([Digest::of(b"source-1")]),
        fingerprints: BTreeSet::new(),
    }
}

fn config(preparation_threads: usize) -> StreamConfig {
    StreamConfig {
        preparation_threads,
        window: 6,
        max_patches: 32,
        ..StreamConfig::default()
    }
}

fn analytic() -> Recipe {
    Recipe {
        seed: 11,
        synthesizer: Some(SynthesizerKind::Analytic),
        sizes: BTreeMap::from([(SizeClass::Tiny, 0.5), (SizeClass::Small, 0.5)]),
        gate: GateSettings {
            enabled: false,
            ..GateSettings::default()
        },
        augment: Augmentation {
            flip: [0.5; 3],
            rotate90: 0.5,
            intensity: 0.5,
            ..Augmentation::default()
        },
        patches_per_epoch: Some(24),
        ..Recipe::default()
    }
}

/// The untrained critic judges, with the thresholds given.
fn judged(threshold: f64, fallback: Fallback) -> Recipe {
    Recipe {
        synthesizer: None,
        sizes: BTreeMap::from([(SizeClass::Tiny, 1.0)]),
        pools: Some(BTreeMap::from([(Pool::UnlabelledHost, 1.0)])),
        gate: GateSettings {
            enabled: true,
            rule: GateRule::Fixed,
            recall: threshold,
            precision: threshold,
            retries: 2,
            ..GateSettings::default()
        },
        fallback,
        ..analytic()
    }
}

fn batches(delivery: Delivery, count: u64) -> Delivery {
    Delivery {
        count: Some(count),
        ..delivery
    }
}

fn drain(stream: &mut dyn PatchStream) -> Vec<StreamedPatch> {
    std::iter::from_fn(|| stream.next_batch())
        .flat_map(|batch| batch.unwrap().patches)
        .map(Arc::unwrap_or_clone)
        .collect()
}

fn read(streams: &Streams, recipe: &Recipe, delivery: &Delivery) -> Vec<StreamedPatch> {
    let resolved = streams.resolve(recipe.clone()).unwrap();
    drain(&mut *streams.open(&resolved, delivery).unwrap())
}

/// Everything a client can see of a patch, as one digest.
fn digest(patch: &StreamedPatch) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(serde_json::to_string(&patch.meta).unwrap().as_bytes());
    for image in [&patch.image, &patch.source] {
        image.iter().for_each(|hu| {
            hasher.update(&hu.to_le_bytes());
        });
    }
    for mask in [&patch.label, &patch.soft_mask, &patch.lesion_instance] {
        hasher.update(mask.as_slice().unwrap());
    }
    hasher.finalize().into()
}

fn digests(patches: &[StreamedPatch]) -> BTreeMap<u64, Digest> {
    patches.iter().map(|patch| (patch.meta.index, digest(patch))).collect()
}

fn start(threads: usize, bundle: Option<Arc<Bundle>>) -> Arc<Streams> {
    Streams::start(store(), bundle, config(threads)).unwrap()
}

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

#[test]
fn p4_what_the_gate_did_is_visible() {
    let streams = start(2, Some(bundle(known())));
    let delivery = batches(Delivery::default(), 3);
    for (fallback, outcome) in [
        (Fallback::Healthy, Outcome::HealthyAfterK),
        (Fallback::Best, Outcome::BestAfterK),
        (Fallback::Real, Outcome::RealAfterK),
    ] {
        for patch in read(&streams, &judged(1.0, fallback), &delivery) {
            let meta = &patch.meta;
            assert_eq!((meta.outcome, meta.attempts), (outcome, 3));
            let has_lesion = fallback == Fallback::Best;
            assert_eq!(meta.lesions.len(), usize::from(has_lesion));
            assert_eq!(patch.image != patch.source, has_lesion);
            if let Some(lesion) = meta.lesions.first() {
                let gate = lesion.gate.unwrap();
                assert_eq!((gate.recall_threshold, gate.precision_threshold), (1.0, 1.0));
                assert!((0.0..=1.0).contains(&lesion.discriminator.unwrap()));
            }
        }
    }
    let counts = streams.stats().snapshot().bins;
    let sum = |of: fn(&freetumor::stream::BinCounts) -> u64| counts.iter().map(of).sum::<u64>();
    assert_eq!((sum(|bin| bin.requested), sum(|bin| bin.attempted)), (18, 54));
    assert_eq!(sum(|bin| bin.accepted), 0);
}

#[test]
fn p4_lesions_have_the_size_and_contrast_that_were_asked_for() {
    let recipe = Recipe {
        sizes: BTreeMap::from([(SizeClass::Small, 0.5), (SizeClass::Medium, 0.5)]),
        contrasts: BTreeMap::from([(ContrastBin::Dark, 1.0)]),
        pools: Some(BTreeMap::from([(Pool::UnlabelledHost, 1.0)])),
        organs: Some(BTreeMap::from([("liver".into(), 1.0)])),
        ..analytic()
    };
    for patch in read(&start(2, None), &recipe, &batches(Delivery::default(), 6)) {
        let lesion = &patch.meta.lesions[0];
        assert_eq!(SizeClass::of_diameter(lesion.diameter_mm), lesion.size);
        assert_eq!(ContrastBin::of_contrast(lesion.requested_hu), lesion.contrast);
        // The soft edge takes some of the contrast: at least two thirds of it must arrive.
        let ratio = lesion.realised_hu / lesion.requested_hu;
        assert!((0.66..1.05).contains(&ratio), "{lesion:?}");
    }
}

#[test]
fn p5_only_the_lesion_changes() {
    let streams = start(2, Some(bundle(known())));
    for recipe in [analytic(), judged(0.0, Fallback::Best)] {
        let patches = read(&streams, &recipe, &batches(Delivery::default(), 12));
        let mut changed = 0;
        for patch in &patches {
            let lesion_tumour = match patch.meta.organ.as_str() {
                "liver" => LIVER.1,
                _ => KIDNEY.1,
            };
            for (at, soft) in patch.soft_mask.indexed_iter() {
                if *soft == 0 {
                    assert_eq!(patch.image[at], patch.source[at]);
                }
                assert_eq!(patch.lesion_instance[at] == 1, *soft >= 128);
                if *soft >= 128 {
                    assert_eq!(patch.label[at], lesion_tumour);
                } else if patch.meta.pool == Pool::UnlabelledHost {
                    assert!(![2, 4, 6].contains(&patch.label[at]), "a tumour outside the lesion");
                }
            }
            changed += u64::from(patch.image != patch.source);
            assert_eq!(patch.image != patch.source, !patch.meta.lesions.is_empty());
        }
        assert!(changed >= 8, "{changed} of {}", patches.len());
    }
}

#[test]
fn p5_voxels_that_nobody_looked_at_are_ignored() {
    let patches = read(&start(1, None), &analytic(), &batches(Delivery::default(), 12));
    let unlabelled = patches.iter().filter(|patch| patch.meta.pool == Pool::UnlabelledHost);
    let labels: BTreeSet<u8> = unlabelled.flat_map(|patch| patch.label.iter().copied()).collect();
    // Only the liver was annotated: background may be any other organ, a kidney voxel is a kidney.
    assert!(
        labels.contains(&255) && labels.contains(&LIVER.0) && !labels.contains(&0),
        "{labels:?}"
    );
    // A training in the same process is told what such a voxel cannot be: it teaches that no liver is there.
    let all = ClassSet(0b111_1111);
    for patch in patches.iter().filter(|patch| patch.meta.pool == Pool::UnlabelledHost) {
        for (label, set) in patch.label.iter().zip(&patch.admissible(all)) {
            if *label == 255 {
                assert!(set.contains(0) && !set.contains(LIVER.0) && *set != all, "{set:?}");
            } else {
                assert_eq!(*set, ClassSet::of(*label));
            }
        }
    }
}

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

#[test]
fn recipes_that_cannot_be_served_are_refused_by_field() {
    let streams = start(1, None);
    let refused = |recipe: Recipe| streams.resolve(recipe).map(|_| ()).unwrap_err().to_string();
    let organ = |name: &str| Recipe {
        organs: Some(BTreeMap::from([(name.into(), 1.0)])),
        ..analytic()
    };
    assert!(refused(organ("spleen")).starts_with("recipe field organs: unknown organ \"spleen\""));
    assert!(refused(organ("pancreas")).contains("no case of the store holds \"pancreas\""));
    let unknown = Recipe {
        select: Selection {
            hold_out: vec!["case-9".into()],
            ..Selection::default()
        },
        ..analytic()
    };
    assert!(refused(unknown).starts_with("recipe field select.hold_out: no case \"case-9\""));
    let kind = |kind| Recipe {
        synthesizer: Some(kind),
        ..analytic()
    };
    assert!(refused(kind(SynthesizerKind::Published)).starts_with("recipe field synthesizer: published"));
    assert!(refused(kind(SynthesizerKind::Conditional)).starts_with("recipe field synthesizer: conditional"));
    let gated = Recipe {
        gate: GateSettings::default(),
        ..analytic()
    };
    assert!(refused(gated).starts_with("recipe field gate.enabled"));
}

#[test]
fn absent_fields_and_spelled_defaults_are_one_recipe() {
    let streams = start(1, None);
    let resolved = streams.resolve(analytic()).unwrap();
    let again = streams.resolve(resolved.recipe.clone()).unwrap();
    assert_eq!((again.hash, &again.recipe), (resolved.hash, &resolved.recipe));
    // Kidneys of 24 mm hold no medium lesion: known beforehand.
    let medium = Recipe {
        sizes: BTreeMap::from([(SizeClass::Tiny, 1.0), (SizeClass::Large, 1.0)]),
        ..analytic()
    };
    let resolved = streams.resolve(medium).unwrap();
    let expected = ["labelled_host/kidney/large", "unlabelled_host/kidney/large"];
    assert_eq!(resolved.shortfall, expected);
    assert_eq!(resolved.feasible[&Pool::UnlabelledHost]["liver"], 3);
}

#[test]
fn p5_a_warp_moves_image_mask_and_label_together() {
    let mut recipe = analytic();
    recipe.augment = Augmentation {
        warp: 1.0,
        rotation_deg: 20.0,
        zoom: 1.2,
        elastic_mm: 3.0,
        ..recipe.augment
    };
    let delivery = batches(Delivery::default(), 8);
    let patches = read(&start(1, None), &recipe, &delivery);
    assert_eq!(digests(&read(&start(3, None), &recipe, &delivery)), digests(&patches));
    let plain = read(&start(2, None), &analytic(), &delivery);
    let mut painted = 0;
    for (patch, plain) in patches.iter().zip(&plain) {
        // The same case and box, seen otherwise.
        assert_eq!(
            (&patch.meta.case, patch.meta.region),
            (&plain.meta.case, plain.meta.region)
        );
        assert_ne!(patch.meta.affine, plain.meta.affine);
        assert_eq!(patch.image.dim(), plain.image.dim());
        painted += usize::from(!patch.meta.lesions.is_empty());
        check_warped(patch);
    }
    assert!(painted >= 8, "{painted}");
}

/// Checks that the label follows from the mask, and that voxels with no mask around them are the source's.
fn check_warped(patch: &StreamedPatch) {
    let shape = patch.image.dim();
    for ((z, y, x), now) in patch.image.indexed_iter() {
        let soft = patch.soft_mask[[z, y, x]];
        let is_tumour = [LIVER.1, KIDNEY.1].contains(&patch.label[[z, y, x]]);
        // Labelled hosts bring tumours of their own.
        assert!(soft < 128 || (is_tumour && patch.lesion_instance[[z, y, x]] == 1));
        let near = |at: usize, side: usize| at.saturating_sub(1)..(at + 2).min(side);
        let around = ndarray::s![near(z, shape.0), near(y, shape.1), near(x, shape.2)];
        if patch.soft_mask.slice(around).iter().all(|soft| *soft == 0) {
            assert_eq!(*now, patch.source[[z, y, x]]);
        }
    }
}

/// Returns untrained models of another grid.
fn bundle_of(spacing_mm: [f64; 3]) -> Arc<Bundle> {
    let mut other = Arc::into_inner(bundle(known())).unwrap();
    other.plan.spacing_mm = spacing_mm;
    Arc::new(other)
}

#[test]
fn p5_models_of_another_grid_change_only_the_lesion() {
    let recipe = Recipe {
        sizes: BTreeMap::from([(SizeClass::Tiny, 0.5), (SizeClass::Small, 0.5)]),
        ..judged(0.0, Fallback::Best)
    };
    let delivery = batches(Delivery::default(), 6);
    // The store's own grid is 2 mm; then finer, coarser, and both in one.
    let mean_off_hu = [[2.0; 3], [1.5; 3], [3.0; 3], [5.0, 0.9, 1.1]].map(|models_mm| {
        let other = bundle_of(models_mm);
        let patches = read(&start(1, Some(other.clone())), &recipe, &delivery);
        assert_eq!(
            digests(&read(&start(3, Some(other)), &recipe, &delivery)),
            digests(&patches)
        );
        let painted: Vec<f64> = patches.iter().filter_map(off_hu).collect();
        assert!(
            painted.len() >= 10,
            "{models_mm:?}: {} of {}",
            painted.len(),
            patches.len()
        );
        painted.iter().sum::<f64>() / painted.len() as f64
    });
    // Soft edges take a share of the contrast asked for and an untrained generator adds up to 10 HU of texture: as much on
    // every grid, give or take what interpolation takes from a lesion of a few voxels.
    let own = mean_off_hu[0];
    assert!(mean_off_hu.iter().all(|off| (off - own).abs() < 5.0), "{mean_off_hu:?}");
}

/// The paper's generator paints on its own grid and on others, the same bytes on one thread and on three, inside the mask alone.
#[test]
fn the_published_generator_paints_where_the_models_hold_it() {
    let published = |spacing_mm| {
        let mut models = Arc::into_inner(bundle_of(spacing_mm)).unwrap();
        models.generator = None;
        models.published = Some(PublishedConfig::generator(2, 3).init(&Device::flex(), 4));
        Arc::new(models)
    };
    let delivery = batches(Delivery::default(), 4);
    let recipe = judged(0.0, Fallback::Best);
    for spacing_mm in [[2.0; 3], [1.5; 3]] {
        let streams = start(1, Some(published(spacing_mm)));
        // Where the models hold no other generator, it is what an absent synthesizer means.
        let resolved = streams.resolve(recipe.clone()).unwrap();
        assert_eq!(resolved.recipe.synthesizer, Some(SynthesizerKind::Published));
        let patches = read(&streams, &recipe, &delivery);
        let three = start(3, Some(published(spacing_mm)));
        assert_eq!(digests(&read(&three, &recipe, &delivery)), digests(&patches));
        assert!(patches.iter().filter_map(off_hu).count() >= 6);
    }
    // Under the published rule a critic that recognises nothing refuses everything; what it refuses is the client's to choose.
    let mut strict = judged(0.0, Fallback::Healthy);
    strict.gate.rule = GateRule::Published;
    for patch in read(&start(2, Some(published([2.0; 3]))), &strict, &delivery) {
        let expected = if patch.meta.lesions.is_empty() {
            Outcome::HealthyAfterK
        } else {
            Outcome::Accepted
        };
        assert_eq!(patch.meta.outcome, expected);
    }
}

#[test]
fn lesions_must_look_as_real_as_the_recipe_asks() {
    let models = |scores: Option<Vec<f64>>| {
        let mut models = Arc::into_inner(bundle(known())).unwrap();
        models.realism = scores.map(|scores| Realism { scores });
        Arc::new(models)
    };
    let asking = |realism: f64, fallback| {
        let mut recipe = judged(0.0, fallback);
        recipe.gate.realism = realism;
        recipe
    };
    let delivery = batches(Delivery::default(), 8);
    let of =
        |scores: Vec<f64>, fallback| read(&start(2, Some(models(Some(scores)))), &asking(0.5, fallback), &delivery);
    // What everything reaches changes nothing but that it is told; what nothing reaches refuses every attempt.
    let plain = read(
        &start(1, Some(models(None))),
        &judged(0.0, Fallback::Healthy),
        &delivery,
    );
    let easy = of(vec![0.0, 0.0], Fallback::Healthy);
    let outcomes = |patches: &[StreamedPatch]| patches.iter().map(|patch| patch.meta.outcome).collect::<Vec<_>>();
    assert_eq!(outcomes(&easy), outcomes(&plain));
    let thresholds = |patches: &[StreamedPatch]| -> BTreeSet<String> {
        let lesions = patches.iter().flat_map(|patch| &patch.meta.lesions);
        let gates = lesions.filter_map(|lesion| lesion.gate);
        gates.map(|gate| format!("{:?}", gate.realism_threshold)).collect()
    };
    assert_eq!(thresholds(&easy), BTreeSet::from(["Some(0.0)".to_string()]));
    assert_eq!(thresholds(&plain), BTreeSet::from(["None".to_string()]));
    let strict = of(vec![0.0, 2.0], Fallback::Healthy);
    assert!(strict.iter().all(|patch| patch.meta.lesions.is_empty()));
    // The best of those refused is known by all its scores, the discriminator's too.
    let best = of(vec![0.0, 2.0], Fallback::Best);
    let lesions: Vec<_> = best.iter().flat_map(|patch| &patch.meta.lesions).collect();
    assert!(lesions.len() >= 4 && lesions.iter().all(|l| l.gate.is_some() && l.discriminator.is_some()));

    // A threshold between the scores of two lesions parts them.
    let real = |patches: &[StreamedPatch]| -> Vec<f64> {
        let lesions = patches.iter().flat_map(|patch| &patch.meta.lesions);
        lesions.filter_map(|lesion| lesion.discriminator).collect()
    };
    let mut all = real(&plain);
    all.sort_by(f64::total_cmp);
    let between = all[all.len() / 2];
    let kept = real(&of(vec![0.0, between], Fallback::Healthy));
    assert!(
        !kept.is_empty() && kept.iter().all(|real| *real >= between),
        "{kept:?} {between}"
    );

    let refused =
        |scores: Option<Vec<f64>>, recipe| start(1, Some(models(scores))).resolve(recipe).unwrap_err().to_string();
    for none in [None, Some(vec![])] {
        let why = refused(none, asking(0.5, Fallback::Healthy));
        assert!(why.contains("gate.realism") && why.contains("discriminator"), "{why}");
    }
    let mut published = asking(0.5, Fallback::Healthy);
    published.gate.rule = GateRule::Published;
    assert!(refused(Some(vec![0.0]), published).contains("gate.realism: expected 0 with the rule published"));
}

#[test]
fn a_host_that_the_critic_learnt_from_is_judged_by_one_that_did_not() {
    let labelled: Vec<Digest> = store().records()[..2].iter().map(|record| record.source_hash).collect();
    let seen = |hashes: &[Digest]| Provenance {
        known: true,
        source_hashes: hashes.iter().copied().collect(),
        fingerprints: BTreeSet::new(),
    };
    // Case 2 is another scan of case 0's patient.
    let mut of_patients = MemoryStore::new(plan());
    for (number, record) in store().records().iter().enumerate() {
        let crop = store().read(number, Region::whole([SIDE; 3])).unwrap();
        let patient = if [0, 2].contains(&number) { "one" } else { "" };
        let record = CaseRecord {
            patient: patient.into(),
            ..record.clone()
        };
        of_patients.push(record, crop.image, crop.labels);
    }
    let models = |inner: usize| {
        let mut models = Arc::into_inner(bundle(known())).unwrap();
        models.critic_seen = seen(&labelled);
        // Each saw the other's case.
        models.inner = (0..inner)
            .map(|fold| InnerCritic {
                seen: seen(&[labelled[1 - fold]]),
                critic: unet(7, 20 + fold as u64).into(),
            })
            .collect();
        let (alone, together) = match inner {
            0 => ([None; 5], [None; 5]),
            _ => (
                [Some(0), Some(1), None, None, None],
                [Some(0), Some(1), Some(0), None, None],
            ),
        };
        assert_eq!(judges(&*store(), &models), alone);
        assert_eq!(judges(&of_patients, &models), together);
        Arc::new(models)
    };
    // Where each inner critic saw one of a patient's scans, the one that did not see this scan is next best.
    let mut torn = Arc::into_inner(models(2)).unwrap();
    torn.inner[0].seen = seen(&[labelled[0]]);
    torn.inner[1].seen = seen(&[store().records()[2].source_hash]);
    assert_eq!(judges(&of_patients, &torn)[..3], [Some(1), Some(0), Some(0)]);

    let recipe = Recipe {
        pools: Some(BTreeMap::from([(Pool::LabelledHost, 0.5), (Pool::UnlabelledHost, 0.5)])),
        unlabelled_negatives: Some(UnlabelledNegatives::Trust),
        ..judged(0.0, Fallback::Best)
    };
    let delivery = batches(Delivery::default(), 8);
    let [own, inner] = [0, 2].map(|folds| read(&start(2, Some(models(folds))), &recipe, &delivery));
    let scores = |patch: &StreamedPatch| patch.meta.lesions.first().map(|lesion| lesion.gate.unwrap().recall);
    let (mut same, mut other) = (0, 0);
    for (own, inner) in own.iter().zip(&inner) {
        match own.meta.pool {
            Pool::UnlabelledHost => {
                assert_eq!(digest(own), digest(inner));
                same += 1;
            }
            _ => other += usize::from(scores(own) != scores(inner)),
        }
    }
    assert!(same >= 4 && other >= 2, "{same} {other}");
}

/// Checks that a patch is its source but for its lesion; returns how far the lesion's contrast is off what was asked.
fn off_hu(patch: &StreamedPatch) -> Option<f64> {
    let [lesion] = &patch.meta.lesions[..] else { return None };
    assert!(lesion.gate.is_some());
    let mut changed = 0;
    let voxels = patch
        .image
        .iter()
        .zip(&patch.source)
        .zip(&patch.soft_mask)
        .zip(&patch.label);
    for (((now, before), soft), label) in voxels {
        assert!(*soft > 0 || now == before);
        assert_eq!(*soft >= 128, *label == LIVER.1 || *label == KIDNEY.1);
        changed += usize::from(now != before);
    }
    assert!(changed > 0);
    Some((lesion.realised_hu - lesion.requested_hu).abs())
}

#[test]
fn models_of_another_plan_are_refused_by_field() {
    // A fifth of the store's voxels: further than a grid is bridged.
    let other = bundle_of([0.4; 3]);
    let error = Streams::start(store(), Some(other), config(1)).map(|_| ()).unwrap_err();
    assert!(
        matches!(
            &error,
            StartError::PlanMismatch {
                field: "spacing_mm",
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("[0.4, 0.4, 0.4]") && error.to_string().contains("[2.0, 2.0, 2.0]"));
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
