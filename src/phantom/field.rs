//! The phantom's grid in millimetres, smooth random fields on it, and separable filters.

use std::ops::Range;

use crate::rng::Rng;
use crate::volume::Shape;

/// A point or a vector in mm, ordered (z, y, x).
pub(super) type Point = [f32; 3];

/// A sampling grid whose middle is the origin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) shape: Shape,
    pub(super) spacing_mm: [f32; 3],
}

impl Frame {
    /// Returns the number of voxels.
    pub(super) fn voxels(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns a voxel's volume in mm3.
    pub(super) fn voxel_mm3(&self) -> f32 {
        self.spacing_mm.iter().product()
    }

    /// Returns a voxel's place in the flat arrays.
    pub(super) fn flat(&self, [z, y, x]: [usize; 3]) -> usize {
        (z * self.shape[1] + y) * self.shape[2] + x
    }

    /// Returns the voxel at a place in the flat arrays.
    pub(super) fn voxel(&self, flat: usize) -> [usize; 3] {
        let row = flat / self.shape[2];
        [row / self.shape[1], row % self.shape[1], flat % self.shape[2]]
    }

    /// Returns the position of voxel index `i` along an axis in mm from the middle of the grid.
    pub(super) fn mm(&self, axis: usize, i: usize) -> f32 {
        (i as f32 - (self.shape[axis] as f32 - 1.0) / 2.0) * self.spacing_mm[axis]
    }

    /// Returns the position of a voxel in mm from the middle of the grid.
    pub(super) fn position(&self, voxel: [usize; 3]) -> Point {
        std::array::from_fn(|axis| self.mm(axis, voxel[axis]))
    }

    fn range(&self, axis: usize, low_mm: f32, high_mm: f32) -> Range<usize> {
        let index = |mm: f32| mm / self.spacing_mm[axis] + (self.shape[axis] as f32 - 1.0) / 2.0;
        // Float to integer conversions saturate, so what lies outside the grid gives an empty range.
        let end = (index(high_mm).floor() + 1.0) as usize;
        (index(low_mm).ceil() as usize)..end.min(self.shape[axis])
    }

    /// Calls `f` with the place and the position of every voxel in a box.
    pub(super) fn visit(&self, low_mm: Point, high_mm: Point, mut f: impl FnMut(usize, Point)) {
        for z in self.range(0, low_mm[0], high_mm[0]) {
            for y in self.range(1, low_mm[1], high_mm[1]) {
                for x in self.range(2, low_mm[2], high_mm[2]) {
                    f(self.flat([z, y, x]), self.position([z, y, x]));
                }
            }
        }
    }

    /// Calls `f` with the places of the up to six face neighbours of a voxel.
    pub(super) fn neighbours(&self, flat: usize, mut f: impl FnMut(usize, usize)) {
        let voxel = self.voxel(flat);
        let strides = [self.shape[1] * self.shape[2], self.shape[2], 1];
        for axis in 0..3 {
            if voxel[axis] > 0 {
                f(axis, flat - strides[axis]);
            }
            if voxel[axis] + 1 < self.shape[axis] {
                f(axis, flat + strides[axis]);
            }
        }
    }
}

/// Where a voxel lies between the points of a lattice: the first of four points and their cubic B-spline weights.
fn spline(position: f32) -> (usize, [f32; 4]) {
    let first = position.floor();
    let t = position - first;
    let u = 1.0 - t;
    let weights = [
        u * u * u / 6.0,
        (3.0 * t * t * t - 6.0 * t * t + 4.0) / 6.0,
        (3.0 * u * u * u - 6.0 * u * u + 4.0) / 6.0,
        t * t * t / 6.0,
    ];
    (first as usize, weights)
}

/// Returns a smooth random field of zero mean and unit variance whose details are about `lattice_mm` wide.
///
/// Normal values on a coarse lattice are interpolated by cubic B-splines, which is smooth and costs four multiplications
/// per voxel along the last axis and next to nothing along the others.
pub(super) fn smooth_field(frame: &Frame, lattice_mm: f32, rng: &mut Rng) -> Vec<f32> {
    let place = |axis: usize, i: usize| spline(i as f32 * frame.spacing_mm[axis] / lattice_mm);
    let points: [usize; 3] = std::array::from_fn(|axis| place(axis, frame.shape[axis] - 1).0 + 4);
    let lattice = rng.normals(points.iter().product());
    let columns: Vec<_> = (0..frame.shape[2]).map(|x| place(2, x)).collect();
    let plane_size = points[1] * points[2];
    let mut plane = vec![0.0f32; plane_size];
    let mut row = vec![0.0f32; points[2]];
    let mut field = Vec::with_capacity(frame.voxels());
    for z in 0..frame.shape[0] {
        let (first, weights) = place(0, z);
        combine(
            &mut plane,
            &lattice[first * plane_size..],
            weights.map(|w| w * UNIT_GAIN),
        );
        for y in 0..frame.shape[1] {
            let (first, weights) = place(1, y);
            combine(&mut row, &plane[first * points[2]..], weights);
            field.extend(columns.iter().map(|(first, w)| {
                let r = &row[*first..*first + 4];
                w[0] * r[0] + w[1] * r[1] + w[2] * r[2] + w[3] * r[3]
            }));
        }
    }
    field
}

/// A smooth random field like that of [`smooth_field`], evaluated only where it is asked for.
pub(super) struct LocalField {
    low_mm: Point,
    lattice_mm: f32,
    points: [usize; 3],
    values: Vec<f32>,
}

impl LocalField {
    /// Draws a field over a box; positions outside see its border.
    pub(super) fn draw(low_mm: Point, high_mm: Point, lattice_mm: f32, rng: &mut Rng) -> Self {
        let points: [usize; 3] =
            std::array::from_fn(|axis| spline(((high_mm[axis] - low_mm[axis]) / lattice_mm).max(0.0)).0 + 4);
        Self {
            low_mm,
            lattice_mm,
            points,
            values: rng.normals(points.iter().product()),
        }
    }

    /// Returns the field at a position.
    pub(super) fn at(&self, p: Point) -> f32 {
        let axes: [(usize, [f32; 4]); 3] = std::array::from_fn(|axis| {
            let limit = (self.points[axis] - 4) as f32;
            spline(((p[axis] - self.low_mm[axis]) / self.lattice_mm).clamp(0.0, limit + 0.999))
        });
        let mut sum = 0.0;
        for (dz, wz) in axes[0].1.iter().enumerate() {
            for (dy, wy) in axes[1].1.iter().enumerate() {
                let row = ((axes[0].0 + dz) * self.points[1] + axes[1].0 + dy) * self.points[2] + axes[2].0;
                let along: f32 = axes[2]
                    .1
                    .iter()
                    .zip(&self.values[row..row + 4])
                    .map(|(w, v)| w * v)
                    .sum();
                sum += wz * wy * along;
            }
        }
        sum * UNIT_GAIN
    }
}

/// Restores unit variance: the mean of the sum of squared spline weights is 151/315 per axis.
const UNIT_GAIN: f32 = 3.013_019;

/// Sets `out` to the weighted sum of the first four pieces of `from` of its length.
fn combine(out: &mut [f32], from: &[f32], weights: [f32; 4]) {
    let n = out.len();
    for (i, value) in out.iter_mut().enumerate() {
        *value = weights[0] * from[i]
            + weights[1] * from[n + i]
            + weights[2] * from[2 * n + i]
            + weights[3] * from[3 * n + i];
    }
}

/// Returns a normalised Gaussian kernel cut at 2.5 standard deviations.
fn gaussian(sigma_voxels: f32) -> Vec<f32> {
    let radius = (2.5 * sigma_voxels).ceil() as i32;
    let weight = |i: i32| libm::expf(-0.5 * (i as f32 / sigma_voxels).powi(2));
    let total: f32 = (-radius..=radius).map(weight).sum();
    (-radius..=radius).map(|i| weight(i) / total).collect()
}

/// Blurs along one axis: lines of `inner` neighbouring values, `n` lines `inner` apart, edges repeated.
fn blur_axis(values: &mut [f32], n: usize, inner: usize, kernel: &[f32]) {
    let radius = kernel.len() / 2;
    let mut source = vec![0.0; n * inner];
    for block in values.chunks_exact_mut(n * inner) {
        source.copy_from_slice(block);
        for (i, line) in block.chunks_exact_mut(inner).enumerate() {
            line.fill(0.0);
            for (k, weight) in kernel.iter().enumerate() {
                let from = (i + k).saturating_sub(radius).min(n - 1) * inner;
                let add = |(value, add): (&mut f32, &f32)| *value += weight * add;
                line.iter_mut().zip(&source[from..from + inner]).for_each(add);
            }
        }
    }
}

/// Blurs along the last axis, edges repeated.
fn blur_rows(values: &mut [f32], n: usize, kernel: &[f32]) {
    let radius = kernel.len() / 2;
    let mut padded = vec![0.0; n + 2 * radius];
    for row in values.chunks_exact_mut(n) {
        padded[..radius].fill(row[0]);
        padded[radius..radius + n].copy_from_slice(row);
        padded[radius + n..].fill(row[n - 1]);
        row.fill(0.0);
        for (k, weight) in kernel.iter().enumerate() {
            let add = |(value, add): (&mut f32, &f32)| *value += weight * add;
            row.iter_mut().zip(&padded[k..k + n]).for_each(add);
        }
    }
}

/// Applies a Gaussian filter with standard deviations in voxels; returns the factor by which it lowers the standard
/// deviation of white noise.
pub(super) fn blur(values: &mut [f32], shape: Shape, sigma_voxels: [f32; 3]) -> f32 {
    let mut remaining = 1.0;
    for (axis, sigma) in sigma_voxels.into_iter().enumerate() {
        if sigma < 0.2 {
            continue;
        }
        let kernel = gaussian(sigma);
        match axis {
            0 => blur_axis(values, shape[0], shape[1] * shape[2], &kernel),
            1 => blur_axis(values, shape[1], shape[2], &kernel),
            _ => blur_rows(values, shape[2], &kernel),
        }
        remaining *= kernel.iter().map(|w| w * w).sum::<f32>().sqrt();
    }
    remaining
}

/// Returns nearly normal white noise of unit variance: sums of eight random bytes, which cost no logarithm.
pub(super) fn white_noise(n: usize, rng: &mut Rng) -> Vec<f32> {
    // Eight uniform bytes have mean 8 x 127.5 and variance 8 x (256^2 - 1) / 12.
    let deviation = (8.0f32 * 65535.0 / 12.0).sqrt();
    (0..n)
        .map(|_| {
            let sum: u32 = rng.bits().to_le_bytes().iter().map(|byte| u32::from(*byte)).sum();
            (sum as f32 - 1020.0) / deviation
        })
        .collect()
}
