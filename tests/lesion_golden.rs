//! Published shapes and textures against tensors dumped from the reference implementation.

use freetumor::lesion::published::{Displacement, draw_shape, draw_texture, ellipsoid, source_coordinates, warp};
use freetumor::rng::{Purpose, Rng};
use freetumor::volume::SizeClass;
use ndarray::Array3;

#[path = "common/npz.rs"]
mod npz;

fn differing(ours: &Array3<u8>, golden: &npz::Array) -> usize {
    assert_eq!(ours.shape(), golden.shape);
    ours.iter()
        .zip(&golden.values)
        .filter(|(a, b)| f32::from(**a) != **b)
        .count()
}

#[test]
fn exact_shapes_match() {
    let Some(golden) = npz::golden("08_shape_exact.npz") else {
        return;
    };
    for radii in [[3, 4, 5], [8, 10, 6], [12, 20, 17]] {
        let name = format!("ellipsoid_{}_{}_{}", radii[0], radii[1], radii[2]);
        assert_eq!(differing(&ellipsoid(radii), &golden[&name]), 0, "{name}");
    }
    let values = &golden["displacement"].values;
    let displacement = |step: usize| -> Displacement {
        std::array::from_fn(|axis| {
            std::array::from_fn(|i| std::array::from_fn(|j| f64::from(values[((step * 2 + axis) * 3 + i) * 3 + j])))
        })
    };
    // The golden coordinates are clamped to the box.
    let coordinates = &golden["step1_source_coords"].values;
    for (i, source) in source_coordinates([32, 40], &displacement(0)).iter().enumerate() {
        for (axis, last) in [(0, 31.0), (1, 39.0)] {
            let golden = f64::from(coordinates[axis * 32 * 40 + i]);
            assert!(
                (source[axis].clamp(0.0, last) - golden).abs() < 1e-3,
                "{i} {axis}: {} {golden}",
                source[axis]
            );
        }
    }
    let mut mask = ellipsoid([8, 10, 6]);
    for (step, plane) in [[0, 1], [1, 2], [0, 2]].into_iter().enumerate() {
        mask = warp(&mask, plane, &displacement(step));
        let wrong = differing(&mask, &golden[&format!("step{}", step + 1)]);
        assert!(
            wrong * 500 <= mask.len(),
            "step {step}: {wrong} voxels differ, 0.2 % allowed"
        );
    }
}

/// Columns 3 to 5 and 8 to 15 and 17 of the golden draws; those that need marching cubes or pieces are left out.
fn describe(shape: &freetumor::lesion::published::PublishedShape) -> Vec<(usize, f64)> {
    let mask = &shape.mask;
    let undeformed = ellipsoid(shape.radii);
    let voxels = mask.iter().filter(|v| **v > 0).count() as f64;
    let before = undeformed.iter().filter(|v| **v > 0).count() as f64;
    let both = mask.iter().zip(&undeformed).filter(|(a, b)| **a > 0 && **b > 0).count() as f64;
    let mut faces = 0.0;
    let (mut low, mut high, mut sum) = ([usize::MAX; 3], [0; 3], [0.0; 3]);
    for ((z, y, x), _) in mask.indexed_iter().filter(|(_, v)| **v > 0) {
        for (axis, i) in [z, y, x].into_iter().enumerate() {
            (low[axis], high[axis]) = (low[axis].min(i), high[axis].max(i));
            sum[axis] += i as f64;
            for step in [-1i64, 1] {
                let mut at = [z as i64, y as i64, x as i64];
                at[axis] += step;
                let inside = at.iter().all(|v| *v >= 0);
                let there = inside.then(|| mask.get(at.map(|v| v as usize)).copied()).flatten();
                faces += f64::from(u8::from(there.unwrap_or(0) == 0));
            }
        }
    }
    let mut columns = vec![
        (3, voxels),
        (4, before),
        (5, voxels / before),
        (17, 2.0 * both / (voxels + before)),
    ];
    columns.push((8, std::f64::consts::PI.cbrt() * (6.0 * voxels).powf(2.0 / 3.0) / faces));
    for axis in 0..3 {
        let extent = (high[axis] + 1 - low[axis]) as f64;
        columns.push((9 + axis, extent / (2 * shape.radii[axis] - 1) as f64));
        columns.push((12 + axis, (sum[axis] / voxels - 2.0 * shape.radii[axis] as f64).abs()));
        columns.push((axis, shape.radii[axis] as f64));
    }
    columns
}

#[test]
fn shape_statistics_match() {
    let Some(golden) = npz::golden("08_shape_stats.npz") else {
        return;
    };
    for (class, n) in [
        (SizeClass::Tiny, 200),
        (SizeClass::Small, 200),
        (SizeClass::Medium, 60),
        (SizeClass::Large, 12),
    ] {
        let mut sums = [0.0; 18];
        for i in 0..n {
            let shape = draw_shape(class, &mut Rng::keyed(5, i, class as u64, Purpose::Test));
            describe(&shape)
                .into_iter()
                .for_each(|(column, value)| sums[column] += value);
        }
        for column in [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 17] {
            let mean = f64::from(golden[&format!("{}_mean", class.name())].values[column]);
            let deviation = f64::from(golden[&format!("{}_sd", class.name())].values[column]);
            let ours = sums[column] / n as f64;
            // Three standard errors of the difference of two means, the stated tolerance.
            let tolerance = 3.0 * deviation * (1.0 / n as f64 + 1.0 / 200.0).sqrt();
            let class = class.name();
            assert!(
                (ours - mean).abs() <= tolerance,
                "{class} column {column}: {ours} {mean} +- {tolerance}"
            );
        }
    }
}

/// The 17 columns of the golden texture statistics: moments, percentiles and autocorrelations.
fn texture_columns(texture: &Array3<f32>) -> Vec<f64> {
    let n = texture.len() as f64;
    let mean = texture.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = texture.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let mut sorted: Vec<f32> = texture.iter().copied().collect();
    sorted.sort_by(f32::total_cmp);
    let saturated = texture.iter().filter(|v| **v >= 1.0).count() as f64 / n;
    let mut columns = vec![
        mean,
        variance.sqrt(),
        f64::from(sorted[0]),
        f64::from(sorted[sorted.len() - 1]),
        saturated,
    ];
    columns.extend([1, 5, 25, 50, 75, 95, 99].map(|p| f64::from(sorted[(sorted.len() - 1) * p / 100])));
    for lag in [1usize, 2, 4, 8, 16] {
        let along = (0..3).map(|axis| {
            let ahead = texture.slice_axis(ndarray::Axis(axis), (lag..).into());
            let behind = texture.slice_axis(ndarray::Axis(axis), (..-(lag as isize)).into());
            let products = ahead
                .iter()
                .zip(&behind)
                .map(|(a, b)| (f64::from(*a) - mean) * (f64::from(*b) - mean));
            products.sum::<f64>() / ahead.len() as f64 / variance
        });
        columns.push(along.sum::<f64>() / 3.0);
    }
    columns
}

#[test]
fn texture_statistics_match() {
    let Some(golden) = npz::golden("07_texture_stats.npz") else {
        return;
    };
    let n = 16;
    let mut sums = [0.0; 17];
    for seed in 0..n {
        let texture = draw_texture([105, 75, 80], [3.0, 4.0], &mut Rng::keyed(seed, 0, 0, Purpose::Test));
        sums.iter_mut()
            .zip(texture_columns(&texture))
            .for_each(|(sum, value)| *sum += value);
    }
    for (column, sum) in sums.iter().enumerate() {
        let [mean, deviation] = ["ens32_mean", "ens32_sd"].map(|name| f64::from(golden[name].values[column]));
        let tolerance = 3.0 * deviation * (1.0 / n as f64 + 1.0 / 32.0).sqrt();
        let ours = sum / n as f64;
        assert!(
            (ours - mean).abs() <= tolerance,
            "column {column}: {ours} {mean} +- {tolerance}"
        );
    }
}
