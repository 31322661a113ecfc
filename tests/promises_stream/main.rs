//! Holds streams to promises P1 to P5 and P7 on small volumes in memory and untrained models.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod bytes;
mod gate;
mod held_out;
#[path = "../looks/mod.rs"]
mod looks;
mod requests;
mod service;
mod voxels;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn::tensor::Device;
use freetumor::checkpoint::{Bundle, Calibration, CalibrationEntry, Provenance, Thresholds};
use freetumor::digest::Digest;
use freetumor::nn::{ContrastOver, CubeSides, GeneratorConfig, Unet, UnetConfig};
use freetumor::sampler::{Augmentation, Pool};
use freetumor::store::{CaseKind, CaseRecord, Cases, MemoryStore, OrganRecord, SourceGeometry, TumourRecord};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::patch::StreamedPatch;
use freetumor::stream::recipe::{Fallback, Recipe};
use freetumor::stream::{PatchService, PatchStream, StreamConfig, Streams};
use freetumor::synth::{GateRule, GateSettings, SynthesizerKind};
use freetumor::volume::{Affine, Annotation, Fingerprint, Grid, Plan, Region, SizeClass};
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

fn generator(contrast_over: ContrastOver) -> GeneratorConfig {
    GeneratorConfig {
        widths: vec![4, 8],
        organs: 3,
        spread_hu: 10.0,
        contrast_over,
    }
}

fn bundle(provenance: Provenance) -> Arc<Bundle> {
    let device = Device::flex();
    Arc::new(Bundle {
        hash: Digest::of(b"untrained"),
        plan: plan(),
        cubes: CubeSides::default(),
        critic: unet(7, 1).into(),
        critic_seen: Provenance::default(),
        inner: Vec::new(),
        generator: Some(generator(ContrastOver::Lesion).init(&device, 2)),
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
            // Untrained: seven classes are about as probable, so that some tissue of the liver is suspect, and all of the kidneys.
            suspect_from: Some(BTreeMap::from([("liver".to_string(), 0.15)])),
        },
        realism: None,
        provenance: provenance.into(),
    })
}

/// Returns untrained models of another grid.
fn bundle_of(spacing_mm: [f64; 3]) -> Arc<Bundle> {
    let mut other = Arc::into_inner(bundle(known())).unwrap();
    other.plan.spacing_mm = spacing_mm;
    Arc::new(other)
}

/// The same with a generator of before there was a choice of what has the requested contrast.
fn bundle_of_before(spacing_mm: [f64; 3]) -> Arc<Bundle> {
    let mut other = Arc::into_inner(bundle_of(spacing_mm)).unwrap();
    other.generator = Some(generator(ContrastOver::FullMask).init(&Device::flex(), 2));
    Arc::new(other)
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
