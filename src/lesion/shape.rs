//! A lesion's shape: an ellipsoid, randomly turned and smoothly deformed, in millimetres.
//!
//! The surface lies where the ellipsoid's own radius is `1 + d(w)`, `w` the direction in the ellipsoid's frame and `d` a
//! random sum of zonal harmonics (Legendre polynomials of the angle to random directions) of degree 2 to 6. That keeps
//! the body star-shaped, so it is one piece without holes, and lets [`Surface`] evaluate it as a polynomial.

use std::sync::LazyLock;

use super::LesionForm;
use super::surface::{Homogeneous, Surface};
use crate::rng::Rng;

/// What a shape must be.
#[derive(Clone, Copy, Debug)]
pub struct ShapeRequest<'a> {
    /// Diameter of the ball of equal volume before clipping, in mm.
    pub diameter_mm: f64,
    /// The recipe's form.
    pub form: &'a LesionForm,
}

/// A lesion's shape around its centre.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    diameter_mm: f64,
    semi_axes_mm: [f64; 3],
    /// Rows are the ellipsoid's axes in (z, y, x) mm.
    axes: [[f64; 3]; 3],
    harmonics: Vec<Harmonic>,
    /// The least and the greatest relative change of the radius.
    extremes: [f64; 2],
}

/// A zonal harmonic: a pole, its degree and its amplitude.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Harmonic {
    pole: [f64; 3],
    degree: usize,
    amplitude: f64,
}

/// The largest relative change of the radius; keeps thin necks and spikes away.
const LIMIT: f64 = 0.5;
/// Directions in which a shape is sampled when it is drawn.
const POINTS: usize = 400;
/// Degrees of the harmonics; low ones bend the body, high ones lobulate it.
const DEGREES: [usize; 12] = [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6];

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// The highest degree of a harmonic.
const TOP: usize = 6;
/// The Legendre polynomials' coefficients by degree, lowest power first.
#[rustfmt::skip]
const LEGENDRE: [[f64; TOP + 1]; TOP + 1] = [
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [-0.5, 0.0, 1.5, 0.0, 0.0, 0.0, 0.0],
    [0.0, -1.5, 0.0, 2.5, 0.0, 0.0, 0.0],
    [0.375, 0.0, -3.75, 0.0, 4.375, 0.0, 0.0],
    [0.0, 1.875, 0.0, -8.75, 0.0, 7.875, 0.0],
    [-0.3125, 0.0, 6.5625, 0.0, -19.6875, 0.0, 14.4375],
];

impl Shape {
    /// Draws a shape of the requested volume.
    pub fn draw(request: &ShapeRequest, rng: &mut Rng) -> Self {
        let longest = rng.range(1.0, request.form.elongation.max(1.0));
        let ratios = [1.0, rng.range(1.0, longest), longest];
        let axes = random_rotation(rng);
        let harmonics = draw_harmonics(request.form.deformation, rng);
        let mut shape = Self {
            diameter_mm: request.diameter_mm,
            semi_axes_mm: ratios,
            axes,
            harmonics,
            extremes: [-LIMIT, LIMIT],
        };
        let changes = shape.deformations(&SPHERE);
        // Sampled extremes bound the work per voxel; `deformation` keeps to them between the samples.
        shape.extremes = [
            changes.iter().copied().fold(LIMIT, f64::min),
            changes.iter().copied().fold(-LIMIT, f64::max),
        ];
        // Volume of the deformed body is the ellipsoid's times the mean of (1 + d)^3 over directions.
        let mean_cube = changes.iter().map(|d| (1.0 + d) * (1.0 + d) * (1.0 + d)).sum::<f64>() / POINTS as f64;
        let scale = request.diameter_mm / 2.0 / libm::cbrt(mean_cube * ratios.iter().product::<f64>());
        shape.semi_axes_mm = ratios.map(|ratio| ratio * scale);
        shape
    }

    /// Returns the requested diameter in mm.
    pub fn diameter_mm(&self) -> f64 {
        self.diameter_mm
    }

    /// Returns the semi-axes of the ellipsoid before deformation in mm, shortest first.
    pub fn radii_mm(&self) -> [f64; 3] {
        self.semi_axes_mm
    }

    /// Returns how far the body reaches from its centre at most, in mm.
    pub fn reach_mm(&self) -> f64 {
        self.semi_axes_mm[2] * (1.0 + self.extremes[1])
    }

    /// Returns the relative change of the radius in each direction of the ellipsoid's frame.
    fn deformations(&self, directions: &[[f64; 3]]) -> Vec<f64> {
        let mut sums = vec![0.0; directions.len()];
        for Harmonic {
            pole,
            degree,
            amplitude,
        } in &self.harmonics
        {
            let legendre = &LEGENDRE[*degree];
            for (sum, direction) in sums.iter_mut().zip(directions) {
                let t = dot(*pole, *direction);
                *sum += amplitude * legendre.iter().rev().fold(0.0, |value, c| value * t + c);
            }
        }
        sums.iter_mut()
            .for_each(|sum| *sum = sum.clamp(self.extremes[0], self.extremes[1]));
        sums
    }

    /// Returns the distance to the surface along the ray from the centre in mm, positive inside: the definition, against
    /// which the polynomials are checked.
    #[cfg(test)]
    pub(super) fn radial_depth(&self, offset_mm: [f64; 3]) -> f64 {
        let scaled: [f64; 3] = std::array::from_fn(|axis| dot(self.axes[axis], offset_mm) / self.semi_axes_mm[axis]);
        let k = dot(scaled, scaled).sqrt();
        if k == 0.0 {
            return self.semi_axes_mm[0] * (1.0 + self.extremes[0]);
        }
        let change = self.deformations(&[scaled.map(|v| v / k)])[0];
        (1.0 + change - k) * dot(offset_mm, offset_mm).sqrt() / k
    }

    /// Returns the body as polynomials of the offset from its centre.
    ///
    /// A harmonic of degree n at pole p is a sum of powers (p w)^j of the direction w = u / |u|, j as odd or even as n; so
    /// the deformation is E(u) / |u|^6 + O(u) / |u|^5 with homogeneous polynomials E of degree 6 and O of degree 5: each
    /// (p u)^j is filled up with powers of |u|^2. And u, the offset over the semi-axes in the ellipsoid's frame, is linear
    /// in the offset.
    pub(super) fn surface(&self) -> Surface {
        let unit_mm = self.diameter_mm / 2.0;
        let rows: [[f64; 3]; 3] = std::array::from_fn(|i| self.axes[i].map(|v| v * unit_mm / self.semi_axes_mm[i]));
        let column = |v: [f64; 3]| std::array::from_fn(|axis| (0..3).map(|i| v[i] * rows[i][axis]).sum());
        let mut powers: [Homogeneous; TOP + 1] = std::array::from_fn(Homogeneous::zero);
        for harmonic in &self.harmonics {
            let linear = Homogeneous::linear(column(harmonic.pole));
            let mut power = Homogeneous::constant(harmonic.amplitude);
            for j in 0..=harmonic.degree {
                powers[j].add(&power, LEGENDRE[harmonic.degree][j]);
                if j < harmonic.degree {
                    power = power.times(&linear);
                }
            }
        }
        let square = rows
            .map(Homogeneous::linear)
            .iter()
            .fold(Homogeneous::zero(2), |mut sum, row| {
                sum.add(&row.times(row), 1.0);
                sum
            });
        let filled = |top: usize| {
            (top % 2..=top).step_by(2).fold(None, |lower: Option<Homogeneous>, j| {
                let mut sum = lower.map_or_else(|| Homogeneous::zero(j), |lower| lower.times(&square));
                sum.add(&powers[j], 1.0);
                Some(sum)
            })
        };
        Surface {
            even: filled(TOP).unwrap_or_else(|| Homogeneous::zero(TOP)),
            odd: filled(TOP - 1).unwrap_or_else(|| Homogeneous::zero(TOP - 1)),
            square,
            unit_mm,
            extremes: self.extremes,
            shortest_mm: self.semi_axes_mm[0],
        }
    }
}

fn draw_harmonics(deformation: f64, rng: &mut Rng) -> Vec<Harmonic> {
    let draws = DEGREES.map(|degree| {
        let [x, y, z, strength] = std::array::from_fn(|_| rng.normal());
        let norm = libm::sqrt(x * x + y * y + z * z).max(1e-9);
        // A zonal harmonic's mean square over the sphere is 1 / (2 degree + 1).
        let amplitude = strength / libm::sqrt(DEGREES.len() as f64) * libm::sqrt(2.0 * degree as f64 + 1.0);
        Harmonic {
            pole: [x / norm, y / norm, z / norm],
            degree,
            amplitude: deformation * amplitude,
        }
    });
    draws.into_iter().filter(|harmonic| harmonic.amplitude != 0.0).collect()
}

/// Returns a uniformly random rotation, from a random unit quaternion.
fn random_rotation(rng: &mut Rng) -> [[f64; 3]; 3] {
    let q: [f64; 4] = std::array::from_fn(|_| rng.normal());
    let norm = libm::sqrt(q.iter().map(|v| v * v).sum::<f64>()).max(1e-9);
    let [w, x, y, z] = q.map(|v| v / norm);
    [
        [
            1.0 - 2.0 * (y * y + z * z),
            2.0 * (x * y - w * z),
            2.0 * (x * z + w * y),
        ],
        [
            2.0 * (x * y + w * z),
            1.0 - 2.0 * (x * x + z * z),
            2.0 * (y * z - w * x),
        ],
        [
            2.0 * (x * z - w * y),
            2.0 * (y * z + w * x),
            1.0 - 2.0 * (x * x + y * y),
        ],
    ]
}

/// Directions spread evenly over the sphere (a golden-angle spiral), the same for every shape.
static SPHERE: LazyLock<Vec<[f64; 3]>> = LazyLock::new(|| {
    const GOLDEN_ANGLE: f64 = 2.399_963_229_728_653;
    let direction = |i: usize| {
        let z = 1.0 - (2.0 * i as f64 + 1.0) / POINTS as f64;
        let (sine, cosine) = libm::sincos(GOLDEN_ANGLE * i as f64);
        let flat = (1.0 - z * z).sqrt();
        [z, flat * sine, flat * cosine]
    };
    (0..POINTS).map(direction).collect()
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    /// Area of the surface by a fine mesh over longitude and latitude, independent of the surface's polynomials.
    fn area_and_volume(shape: &Shape) -> (f64, f64) {
        let (rows, columns) = (90, 180);
        let at = |i: usize, j: usize| {
            let theta = std::f64::consts::PI * i as f64 / rows as f64;
            let phi = std::f64::consts::TAU * (j % columns) as f64 / columns as f64;
            let w = [theta.cos(), theta.sin() * phi.cos(), theta.sin() * phi.sin()];
            let radius = 1.0 + shape.deformations(&[w])[0];
            let p: [f64; 3] = std::array::from_fn(|axis| w[axis] * radius * shape.semi_axes_mm[axis]);
            p
        };
        let cross = |a: [f64; 3], b: [f64; 3]| {
            [
                a[1] * b[2] - a[2] * b[1],
                a[2] * b[0] - a[0] * b[2],
                a[0] * b[1] - a[1] * b[0],
            ]
        };
        let (mut area, mut volume) = (0.0, 0.0);
        for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
            let [a, b, c, d] = [at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j + 1)];
            for (p, q, r) in [(a, b, c), (a, c, d)] {
                let sub = |u: [f64; 3], v: [f64; 3]| std::array::from_fn(|axis| u[axis] - v[axis]);
                let normal = cross(sub(q, p), sub(r, p));
                area += dot(normal, normal).sqrt() / 2.0;
                volume += dot(p, cross(q, r)).abs() / 6.0;
            }
        }
        (area, volume)
    }

    #[test]
    fn volumes_are_as_requested_and_forms_like_real_ones() {
        let form = LesionForm::default();
        let mut rng = Rng::keyed(3, 0, 0, Purpose::Test);
        let mut sphericities: Vec<f64> = (0..100)
            .map(|_| {
                let shape = Shape::draw(
                    &ShapeRequest {
                        diameter_mm: 20.0,
                        form: &form,
                    },
                    &mut rng,
                );
                let (area, volume) = area_and_volume(&shape);
                let diameter = (volume * 6.0 / std::f64::consts::PI).cbrt();
                assert!((diameter / 20.0 - 1.0).abs() < 0.02, "{diameter}");
                std::f64::consts::PI.cbrt() * (6.0 * volume).powf(2.0 / 3.0) / area
            })
            .collect();
        sphericities.sort_by(f64::total_cmp);
        let median = sphericities[50];
        eprintln!(
            "sphericity median {median:.3}, 5 to 95 %: {:.3} to {:.3}",
            sphericities[5], sphericities[95]
        );
        // Real kidney tumours: median 0.75 on voxel masks, whose rough surface lowers it by some 0.05.
        assert!((0.70..0.88).contains(&median), "{median}");
    }
}
