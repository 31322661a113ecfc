//! `freetumor evaluate` and `freetumor predict` with the bundled critic: reports, and labels on the grids of their files.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod predictions;
mod scores;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};

use freetumor::ingest::nifti::{write_image, write_labels};
use freetumor::phantom::{PhantomSpec, cohort, generate};
use freetumor::volume::{Affine, Grid};
use ndarray::{Array3, Axis};
use support::run;

const MODEL: [&str; 6] = ["--models", "assets/demo", "--network", "critic", "--device", "cpu"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Saves a phantom and its labels as they are, and with axes permuted and turned round; returns the labels.
fn two_files(folder: &Path) -> Array3<u8> {
    let spec = cohort(91, 1, 0).remove(0);
    let volume = generate(&PhantomSpec {
        spacing_mm: [3.0; 3],
        ..spec
    });
    write_image(&folder.join("plain.nii.gz"), volume.image.view(), &volume.grid).unwrap();
    // Axes (y, z, x) instead of (z, y, x), y turned round.
    let mut turned = volume.image.clone().permuted_axes([1, 0, 2]);
    turned.invert_axis(Axis(0));
    let mut turned_labels = volume.labels.clone().permuted_axes([1, 0, 2]);
    turned_labels.invert_axis(Axis(0));
    write_labels(&folder.join("plain-truth.nii.gz"), volume.labels.view(), &volume.grid).unwrap();
    let m = &volume.grid.affine.0;
    let last = (volume.grid.shape[1] - 1) as f64;
    let affine = std::array::from_fn(|row| [-m[row][1], m[row][0], m[row][2], m[row][3] + last * m[row][1]]);
    let grid = Grid {
        shape: turned.dim().into(),
        affine: Affine(affine),
    };
    write_image(&folder.join("turned.nii"), turned.view(), &grid).unwrap();
    write_labels(&folder.join("turned-truth.nii"), turned_labels.view(), &grid).unwrap();
    volume.labels
}

/// Makes a store of two labelled phantoms and one without labels.
fn two_cases(folder: &Path) -> PathBuf {
    let store = folder.join("store");
    let counts = ["--labelled", "2", "--unlabelled", "1", "--seed", "93"];
    let said = run(&[
        &["phantom", "--config", "configs/demo.toml", "--store", text(&store)][..],
        &counts,
    ]
    .concat());
    assert_eq!(said.code, Some(0), "{}", said.text);
    store
}
