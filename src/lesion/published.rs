//! The published shapes and texture, in voxels as they are defined: a baseline, not our default.
//!
//! # Source
//! FreeTumor's lesion generator as described by its golden tensors: an ellipsoid in a box of four radii, three successive
//! 2-D elastic warps with a 3 x 3 control grid, nearest sampling; texture from a thresholded smooth field.

use std::sync::OnceLock;

use ndarray::{Array3, Axis, s};

use super::texture::{blur_axis, gaussian_kernel};
use crate::rng::{Purpose, Rng};
use crate::volume::SizeClass;

/// The planes of the three warps.
const PLANES: [[usize; 2]; 3] = [[0, 1], [1, 2], [0, 2]];

/// A 3 x 3 grid of displacements in voxels for each of a plane's two axes.
pub type Displacement = [[[f64; 3]; 3]; 2];

/// Returns the range of radii and the standard deviations of displacements of a size class, in voxels.
fn preset(class: SizeClass, rng: &mut Rng) -> ([usize; 2], f64) {
    match class {
        SizeClass::Tiny => ([3, 5], rng.range(0.5, 1.0)),
        SizeClass::Small => ([6, 10], 1.0 + rng.below(2) as f64),
        SizeClass::Medium => ([12, 20], 3.0 + rng.below(4) as f64),
        SizeClass::Large => ([24, 40], 5.0 + rng.below(6) as f64),
    }
}

/// A published shape.
#[derive(Clone, Debug, PartialEq)]
pub struct PublishedShape {
    /// The lesion in its box of four radii, 1 inside.
    pub mask: Array3<u8>,
    /// The radii in voxels.
    pub radii: [usize; 3],
}

/// Draws a shape of a size class.
pub fn draw_shape(class: SizeClass, rng: &mut Rng) -> PublishedShape {
    let ([low, high], sigma) = preset(class, rng);
    let radii = [(); 3].map(|()| low + rng.below(high - low + 1));
    let mut mask = ellipsoid(radii);
    for plane in PLANES {
        let displacement = [(); 2].map(|()| [(); 3].map(|()| [(); 3].map(|()| sigma * rng.normal())));
        mask = warp(&mask, plane, &displacement);
    }
    PublishedShape { mask, radii }
}

/// Returns the solid ellipsoid of radii in voxels, centred on voxel 2r of a box of side 4r.
pub fn ellipsoid(radii: [usize; 3]) -> Array3<u8> {
    let squares = radii.map(|r| (r * r) as u64);
    let along = |i: usize, axis: usize| (i as i64 - 2 * radii[axis] as i64).unsigned_abs().pow(2);
    Array3::from_shape_fn(radii.map(|r| 4 * r), |(z, y, x)| {
        // Sum of (i - 2r)^2 / r^2 below 1, in integers.
        let [a, b, c] = squares;
        let sum = along(z, 0) * b * c + along(y, 1) * a * c + along(x, 2) * a * b;
        u8::from(sum < a * b * c)
    })
}

/// Returns the weights of the three control values at position `t` from 0 to 2: a cubic B-spline through the control
/// values, continued by mirroring about its ends.
fn spline_weights(t: f64) -> [f64; 3] {
    // Spline coefficients c solve (c[i-1] + 4 c[i] + c[i+1]) / 6 = v[i] with c[-1] = c[1] and c[3] = c[1]:
    // the inverse of [[4, 2, 0], [1, 4, 1], [0, 2, 4]] / 6.
    const INVERSE: [[f64; 3]; 3] = [[1.75, -1.0, 0.25], [-0.5, 2.0, -0.5], [0.25, -1.0, 1.75]];
    let cubic = |d: f64| {
        let d = d.abs();
        if d < 1.0 {
            2.0 / 3.0 - d * d + d * d * d / 2.0
        } else if d < 2.0 {
            (2.0 - d) * (2.0 - d) * (2.0 - d) / 6.0
        } else {
            0.0
        }
    };
    let basis = [cubic(t) + 0.0, cubic(t - 1.0), cubic(t - 2.0)];
    // Mirrored neighbours: position -1 and 3 both hold the middle coefficient.
    let middle = basis[1] + cubic(t + 1.0) + cubic(t - 3.0);
    let basis = [basis[0], middle, basis[2]];
    std::array::from_fn(|value| (0..3).map(|c| basis[c] * INVERSE[c][value]).sum())
}

/// Returns where each voxel of a plane of `height` x `width` is taken from, before clamping.
pub fn source_coordinates([height, width]: [usize; 2], displacement: &Displacement) -> Vec<[f64; 2]> {
    let weights = |n: usize| -> Vec<[f64; 3]> {
        let last = (n.max(2) - 1) as f64;
        (0..n).map(|i| spline_weights(2.0 * i as f64 / last)).collect()
    };
    let (rows, columns) = (weights(height), weights(width));
    let mut out = Vec::with_capacity(height * width);
    for (i, row) in rows.iter().enumerate() {
        for (j, column) in columns.iter().enumerate() {
            let shift = |grid: &[[f64; 3]; 3]| -> f64 {
                let line = |values: &[f64; 3]| values.iter().zip(column).map(|(v, w)| v * w).sum::<f64>();
                grid.iter().zip(row).map(|(values, w)| w * line(values)).sum()
            };
            out.push([i as f64 + shift(&displacement[0]), j as f64 + shift(&displacement[1])]);
        }
    }
    out
}

/// Warps every slice of a mask along one plane, nearest voxel, 0 from outside.
pub fn warp(mask: &Array3<u8>, [first, second]: [usize; 2], displacement: &Displacement) -> Array3<u8> {
    let shape = [mask.dim().0, mask.dim().1, mask.dim().2];
    let size = [shape[first], shape[second]];
    let nearest = |v: f64, n: usize| {
        let rounded = (v + 0.5).floor();
        (rounded >= 0.0 && rounded < n as f64).then_some(rounded as usize)
    };
    let sources: Vec<Option<[usize; 2]>> = source_coordinates(size, displacement)
        .into_iter()
        .map(|[a, b]| Some([nearest(a, size[0])?, nearest(b, size[1])?]))
        .collect();
    let across = 3 - first - second;
    let mut out = Array3::zeros(shape);
    for (mut to, from) in out.axis_iter_mut(Axis(across)).zip(mask.axis_iter(Axis(across))) {
        for (value, source) in to.iter_mut().zip(&sources) {
            *value = source.map_or(0, |at| from[at]);
        }
    }
    out
}

/// Standard deviations in voxels of the filters of the abdominal texture.
const ABDOMINAL_SIGMA: [f64; 2] = [3.0, 4.0];
/// Side of the volume that crops are taken from, in voxels.
const TEXTURE_SIDE: usize = 160;

/// Cuts a random piece out of the abdominal texture, which is the same in every process.
///
/// Departure: the volume has 160 x 160 x 160 voxels instead of 420 x 300 x 320, which take ten seconds to make.
///
/// # Panics
/// When a side is longer than 160.
pub fn texture_crop(size: [usize; 3], rng: &mut Rng) -> Array3<f32> {
    static TEXTURE: OnceLock<Array3<f32>> = OnceLock::new();
    let texture = TEXTURE.get_or_init(|| {
        let mut rng = Rng::keyed(0, 0, 0, Purpose::Texture);
        draw_texture([TEXTURE_SIDE; 3], ABDOMINAL_SIGMA, &mut rng)
    });
    let start = size.map(|side| rng.below(TEXTURE_SIDE - side + 1));
    let [z, y, x] = std::array::from_fn(|axis| start[axis]..start[axis] + size[axis]);
    texture.slice(s![z, y, x]).to_owned()
}

/// Draws the published texture: a multiplicative factor around 0.53.
///
/// `sigma` are the standard deviations in voxels of the first and of the second filter.
pub fn draw_texture(size: [usize; 3], sigma: [f64; 2], rng: &mut Rng) -> Array3<f32> {
    let blur = |values: &mut [f32], sigma: f64| {
        let kernel = gaussian_kernel(sigma, 4.0);
        (0..3).for_each(|axis| blur_axis(values, size, axis, &kernel));
    };
    let mut field: Vec<f32> = (0..size.iter().product()).map(|_| rng.uniform() as f32).collect();
    blur(&mut field, sigma[0]);
    let low = field.iter().copied().fold(f32::INFINITY, f32::min);
    let high = field.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, base) = (rng.range(0.19, 0.21), rng.range(0.04, 0.06));
    for value in &mut field {
        let share = scale * f64::from((*value - low) / (high - low)) + base;
        *value = f32::from(u8::from(share > rng.uniform()));
    }
    blur(&mut field, sigma[1]);
    let bright = field.iter().filter(|v| **v > 0.12).map(|v| f64::from(*v));
    let (sum, count) = bright.fold((0.0, 0usize), |(sum, count), v| (sum + v, count + 1));
    let gain = rng.range(0.50, 0.55) * count.max(1) as f64 / sum.max(1e-9);
    field
        .iter_mut()
        .for_each(|v| *v = (f64::from(*v) * gain).clamp(0.0, 1.0) as f32);
    Array3::from_shape_vec(size, field).expect("one value per voxel")
}
