//! Toy volumes in memory.

use freetumor::digest::Digest;
use freetumor::rng::{Purpose, Rng};
use freetumor::store::{CaseKind, CaseRecord, MemoryStore, OrganRecord, SourceGeometry, TumourRecord};
use freetumor::volume::{Affine, Annotation, Fingerprint, Grid, Plan, Region};
use ndarray::Array3;

const SIDE: usize = 28;

/// Labelled cases (a liver with one dark tumour of 9 mm) and unlabelled ones (a liver), sorted by id.
pub fn store(labelled: usize, unlabelled: usize) -> MemoryStore {
    let plan = Plan {
        patch: [16; 3],
        ..Plan::default()
    };
    let mut store = MemoryStore::new(plan);
    for i in 0..labelled {
        push(&mut store, i, CaseKind::Labelled);
    }
    for i in labelled..labelled + unlabelled {
        push(&mut store, i, CaseKind::Unlabelled);
    }
    store
}

fn push(store: &mut MemoryStore, number: usize, kind: CaseKind) {
    let mut rng = Rng::keyed(number as u64, 0, 0, Purpose::Test);
    let mut labels = Array3::from_shape_fn((SIDE, SIDE, SIDE), |(z, y, x)| {
        u8::from([z, y, x].iter().all(|v| (4..SIDE - 4).contains(v)))
    });
    let centre = std::array::from_fn(|_| 10 + rng.below(8) as i64);
    let mut tumours = Vec::new();
    if kind == CaseKind::Labelled {
        let mut voxels = 0;
        for ((z, y, x), label) in labels.indexed_iter_mut() {
            let offsets = [z as i64 - centre[0], y as i64 - centre[1], x as i64 - centre[2]];
            if offsets.iter().map(|o| o * o).sum::<i64>() <= 9 {
                *label = 2;
                voxels += 1;
            }
        }
        tumours.push(TumourRecord {
            id: 2,
            voxels,
            region: Region::centred(centre, [7; 3]),
            centre,
            diameter_mm: 9.2,
            contrast_hu: -50.0,
        });
    }
    let noise = rng.normals(SIDE * SIDE * SIDE);
    let image = labels.iter().zip(noise).map(|(label, noise)| {
        let hu = [-80.0, 100.0, 50.0][usize::from(*label)];
        (hu + 8.0 * noise) as i16
    });
    let image = Array3::from_shape_vec((SIDE, SIDE, SIDE), image.collect()).expect("a value for every voxel");
    let classes: &[&str] = match kind {
        CaseKind::Labelled => &["liver", "liver_tumour"],
        CaseKind::Unlabelled => &["liver"],
    };
    let id = format!("case_{number:03}");
    let record = CaseRecord {
        patient: String::new(),
        labels_by: String::new(),
        source_hash: Digest::of(id.as_bytes()),
        fingerprint: Fingerprint::default(),
        content_hash: Digest::of(id.as_bytes()),
        kind,
        grid: Grid {
            shape: [SIDE; 3],
            affine: Affine::axis_aligned([1.5; 3], [0.0; 3]),
        },
        annotation: Annotation {
            classes: classes.iter().map(|name| name.to_string()).collect(),
            assumed_tumour_free: false,
        },
        source: SourceGeometry {
            shape_xyz: [SIDE; 3],
            affine_xyz: [[0.0; 4]; 4],
            orientation: "RAS".into(),
        },
        organs: vec![OrganRecord {
            id: 1,
            voxels: labels.iter().filter(|label| **label == 1).count() as u64,
            region: Region::centred([14; 3], [20; 3]),
            holds_mm: 24.0,
        }],
        tumours,
        id,
    };
    store.push(record, image, labels);
}
