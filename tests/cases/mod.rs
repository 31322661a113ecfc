//! Small cases and stores of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

use std::path::{Path, PathBuf};

use freetumor::digest::Digest;
use freetumor::rng::{Purpose, Rng};
use freetumor::store::{CaseInput, CaseKind, Compression, SourceGeometry, Store, StoreWriter};
use freetumor::volume::{Affine, Annotation, Fingerprint, Grid, Plan};
use ndarray::Array3;

/// The plan of all test stores.
pub fn plan() -> Plan {
    Plan {
        spacing_mm: [3.0, 2.0, 2.0],
        ..Plan::default()
    }
}

/// A small body with a liver and a tumour; noise everywhere so that no chunk repeats another.
pub fn case(id: &str, shape: [usize; 3]) -> CaseInput {
    let mut rng = Rng::keyed(1, id.len() as u64, 0, Purpose::Test);
    let centre = shape.map(|side| side as f64 / 2.0);
    let radius = shape.iter().copied().min().unwrap_or(1) as f64 / 2.5;
    let labels = Array3::from_shape_fn(shape, |(z, y, x)| {
        let away = (z as f64 - centre[0]).powi(2) + (y as f64 - centre[1]).powi(2) + (x as f64 - centre[2]).powi(2);
        u8::from(away < radius * radius) + u8::from(away < radius * radius / 9.0)
    });
    let image = labels.mapv(|label| [-100, 60, 20][usize::from(label)] + rng.below(20) as i16);
    CaseInput {
        id: id.into(),
        kind: CaseKind::Labelled,
        grid: Grid {
            shape,
            affine: Affine::axis_aligned([3.0, 2.0, 2.0], [-10.0, 5.0, 7.5]),
        },
        annotation: Annotation {
            classes: vec!["liver".into(), "liver_tumour".into()],
            assumed_tumour_free: false,
        },
        patient: format!("patient of {id}"),
        labels_by: String::new(),
        source_hash: Digest::of(id.as_bytes()),
        fingerprint: Fingerprint::from_bytes(vec![1, 2, 3]).unwrap(),
        source: SourceGeometry {
            shape_xyz: [shape[2], shape[1], shape[0]],
            affine_xyz: [
                [2.0, 0.0, 0.0, -10.0],
                [0.0, 2.0, 0.0, 5.0],
                [0.0, 0.0, 3.0, 7.5],
                [0.0, 0.0, 0.0, 1.0],
            ],
            orientation: "RAS".into(),
        },
        image,
        labels,
    }
}

/// Writes cases into a store and opens it.
pub fn store_of(dir: &Path, cases: &[(&str, [usize; 3])], compression: Compression) -> Store {
    let writer = StoreWriter::create(dir, &plan()).unwrap().compression(compression);
    for (id, shape) in cases {
        writer.write(case(id, *shape)).unwrap();
    }
    assert!(writer.finish().unwrap().damaged.is_empty());
    Store::open(dir).unwrap()
}

/// Returns where a case's file stands.
pub fn file_of(dir: &Path, id: &str) -> PathBuf {
    dir.join("cases").join(format!("{id}.ftc"))
}
