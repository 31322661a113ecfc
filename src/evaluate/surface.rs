//! Distances between the surfaces of two masks, element by element and weighted by area.
//!
//! ```text
//! mask -> codes of 2 x 2 x 2 voxels at every voxel corner -> surface elements with areas -> distance to the other's elements
//! ```
//!
//! # Source
//! Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
//! radiotherapy" (arXiv 1809.04430), whose published implementation takes its areas from a table. Here the areas follow
//! from the geometry that the table has: a test holds all of them, and whole masks, to that implementation.

use std::sync::LazyLock;

use ndarray::{Array3, ArrayView3};
use serde::{Deserialize, Serialize};

use crate::volume::{Region, Shape, squared_distance_mm};

/// Rounding by which a distance may pass the tolerance, as a share of it: no element may be lost by the last bits.
const ROUNDING: f64 = 1e-9;

/// A piece of a mask's surface.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Element {
    /// From the element to the nearest one of the other surface; infinite where there is none.
    distance_mm: f64,
    area_mm2: f64,
}

/// How much of two surfaces lies within a tolerance of each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SurfaceOverlap {
    /// Area of both surfaces within the tolerance of the other.
    pub near_mm2: f64,
    /// Area of both surfaces.
    pub total_mm2: f64,
}

impl SurfaceOverlap {
    /// Returns the normalised surface Dice (NSD), the share within the tolerance; nothing where there is no surface.
    pub fn dice(&self) -> Option<f64> {
        (self.total_mm2 > 0.0).then(|| self.near_mm2 / self.total_mm2)
    }

    /// Returns the areas of several together.
    pub fn sum<'a>(parts: impl IntoIterator<Item = &'a Self>) -> Self {
        parts.into_iter().fold(Self::default(), |mut sum, part| {
            sum.add(part);
            sum
        })
    }

    /// Adds other areas.
    pub fn add(&mut self, other: &Self) {
        self.near_mm2 += other.near_mm2;
        self.total_mm2 += other.total_mm2;
    }
}

/// How far the surfaces of a prediction and of the truth lie from each other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SurfaceDistances {
    /// The prediction's elements and the truth's, nearest first.
    elements: [Vec<Element>; 2],
}

impl SurfaceDistances {
    /// Measures two masks of one shape; a mask that reaches the volume's border has a surface there.
    ///
    /// # Panics
    /// Where the shapes differ.
    pub fn between(prediction: ArrayView3<bool>, truth: ArrayView3<bool>, spacing_mm: [f64; 3]) -> Self {
        assert_eq!(prediction.dim(), truth.dim(), "two masks of one case");
        let Some(region) = box_around([prediction, truth]) else {
            return Self::default();
        };
        let areas = areas_mm2(spacing_mm);
        let codes = [prediction, truth].map(|mask| codes(mask, region));
        let away = [1, 0].map(|other| squared_distance_mm(codes[other].mapv(is_border).view(), spacing_mm));
        let elements = std::array::from_fn(|side| {
            let pairs = codes[side].iter().zip(&away[side]);
            let mut elements: Vec<Element> = pairs
                .filter(|(code, _)| is_border(**code))
                .map(|(code, squared)| Element {
                    distance_mm: libm::sqrt(*squared),
                    area_mm2: areas[usize::from(*code)],
                })
                .collect();
            let order = |a: &Element, b: &Element| a.distance_mm.total_cmp(&b.distance_mm);
            elements.sort_by(|a, b| order(a, b).then(a.area_mm2.total_cmp(&b.area_mm2)));
            elements
        });
        Self { elements }
    }

    /// Returns how much of both surfaces lies within a tolerance of the other.
    pub fn within(&self, tolerance_mm: f64) -> SurfaceOverlap {
        let limit = tolerance_mm * (1.0 + ROUNDING);
        let all = || self.elements.iter().flatten();
        let near = all().filter(|element| element.distance_mm <= limit);
        SurfaceOverlap {
            near_mm2: near.map(|element| element.area_mm2).sum(),
            total_mm2: all().map(|element| element.area_mm2).sum(),
        }
    }

    /// Returns the normalised surface Dice (NSD): the share of both surfaces within a tolerance of the other; nothing where
    /// both masks are empty, 0 where one is.
    pub fn dice_at(&self, tolerance_mm: f64) -> Option<f64> {
        self.within(tolerance_mm).dice()
    }

    /// Returns the robust Hausdorff distance in mm: of each surface the distance within which `share` of its area lies, and
    /// of the two the larger; nothing where a mask is empty.
    pub fn robust_hausdorff_mm(&self, share: f64) -> Option<f64> {
        let [a, b] = [0, 1].map(|side| quantile(&self.elements[side], share));
        Some(a?.max(b?)).filter(|distance| distance.is_finite())
    }
}

/// Returns the distance of the first element with which the area reaches a share of the whole.
fn quantile(sorted: &[Element], share: f64) -> Option<f64> {
    let total: f64 = sorted.iter().map(|element| element.area_mm2).sum();
    let mut sum = 0.0;
    let reaching = sorted.iter().find(|element| {
        sum += element.area_mm2;
        sum / total >= share
    });
    reaching.or(sorted.last()).map(|element| element.distance_mm)
}

/// Returns the box around the voxels of either mask, or nothing where both are empty.
fn box_around(masks: [ArrayView3<bool>; 2]) -> Option<Region> {
    let (mut low, mut high) = ([usize::MAX; 3], [0; 3]);
    for mask in masks {
        for ((z, y, x), _) in mask.indexed_iter().filter(|(_, inside)| **inside) {
            for (axis, at) in [z, y, x].into_iter().enumerate() {
                low[axis] = low[axis].min(at);
                high[axis] = high[axis].max(at + 1);
            }
        }
    }
    (low[0] != usize::MAX).then(|| Region {
        start: low.map(|v| v as i64),
        size: std::array::from_fn(|axis| high[axis] - low[axis]),
    })
}

/// Tells whether a code has voxels on both sides.
fn is_border(code: u8) -> bool {
    code != 0 && code != u8::MAX
}

/// Returns for every voxel corner of a box which of the eight voxels around it are inside the mask: bit 4z + 2y + x.
fn codes(mask: ArrayView3<bool>, region: Region) -> Array3<u8> {
    let from = region.start.map(|v| v as usize);
    let [d, h, w] = region.size;
    let mut codes = Array3::zeros([d + 1, h + 1, w + 1]);
    for (z, y, x) in ndarray::indices([d, h, w]) {
        if mask[[from[0] + z, from[1] + y, from[2] + x]] {
            // The voxel is the farthest of eight for its nearest corner, and so on.
            for (bit, [dz, dy, dx]) in CORNERS.into_iter().enumerate() {
                codes[[z + 1 - dz, y + 1 - dy, x + 1 - dx]] |= 1 << bit;
            }
        }
    }
    codes
}

/// The eight voxels around a corner, or the eight corners of a cube, by bit.
const CORNERS: [Shape; 8] = [
    [0, 0, 0],
    [0, 0, 1],
    [0, 1, 0],
    [0, 1, 1],
    [1, 0, 0],
    [1, 0, 1],
    [1, 1, 0],
    [1, 1, 1],
];

/// Returns the surface's area of every code in mm^2.
fn areas_mm2(spacing_mm: [f64; 3]) -> Vec<f64> {
    let [z, y, x] = spacing_mm;
    // A unit cube's area vector scales along an axis with the other two.
    let scale = [y * x, z * x, z * y];
    let area = |vector: &[f64; 3]| length(std::array::from_fn(|axis| vector[axis] * scale[axis]));
    AREA_VECTORS
        .iter()
        .map(|vectors| vectors.iter().map(area).sum())
        .collect()
}

/// For every code, the area vectors of the triangles that separate its voxels in a cube of side 1.
static AREA_VECTORS: LazyLock<Vec<Vec<[f64; 3]>>> = LazyLock::new(|| (0..=u8::MAX).map(triangles_of).collect());

/// A point on the edge between two corners: their bits, the inner first.
type Cut = (usize, usize);

/// Returns the triangles of a code: marching cubes with every cut half-way along its edge.
///
/// Two rules settle what marching cubes leave open, both as in the published table: inside and outside may change places
/// without changing the surface, and of the ways to divide a bent polygon into triangles the one of largest area counts.
fn triangles_of(code: u8) -> Vec<[f64; 3]> {
    // Voxels that meet only along an edge stay separate where they are the fewer.
    let code = if code.count_ones() > 4 { !code } else { code };
    polygons(code)
        .iter()
        .flat_map(|polygon| divide(&polygon.iter().map(|cut| midpoint(*cut)).collect::<Vec<_>>()).1)
        .collect()
}

/// Follows the cuts of a cube's edges from face to face; returns closed polygons.
fn polygons(code: u8) -> Vec<Vec<Cut>> {
    let mut segments: Vec<[Cut; 2]> = FACES.iter().flat_map(|face| segments(code, face)).collect();
    let mut polygons = Vec::new();
    while let Some([first, mut at]) = segments.pop() {
        let mut polygon = vec![first];
        while at != first {
            polygon.push(at);
            let next = segments.iter().position(|segment| segment.contains(&at));
            let [a, b] = segments.swap_remove(next.expect("every cut lies on two faces"));
            at = if a == at { b } else { a };
        }
        polygons.push(polygon);
    }
    polygons
}

/// The corners of a cube's faces, each next to the one before.
const FACES: [[usize; 4]; 6] = [
    [0, 1, 3, 2],
    [4, 5, 7, 6],
    [0, 1, 5, 4],
    [2, 3, 7, 6],
    [0, 2, 6, 4],
    [1, 3, 7, 5],
];

/// Returns where the surface crosses a face: one line around every run of inner corners.
fn segments(code: u8, face: &[usize; 4]) -> Vec<[Cut; 2]> {
    let is_inside = |at: usize| code >> face[at % 4] & 1 == 1;
    let starts = (0..4).filter(|at| is_inside(*at) && !is_inside(at + 3));
    starts
        .map(|start| {
            let end = (start..start + 4)
                .take_while(|at| is_inside(*at))
                .last()
                .unwrap_or(start);
            [
                (face[start], face[(start + 3) % 4]),
                (face[end % 4], face[(end + 1) % 4]),
            ]
        })
        .collect()
}

fn midpoint((a, b): Cut) -> [f64; 3] {
    std::array::from_fn(|axis| (CORNERS[a][axis] + CORNERS[b][axis]) as f64 / 2.0)
}

/// Divides a polygon into triangles so that their area is the largest; returns it and the triangles' area vectors.
fn divide(polygon: &[[f64; 3]]) -> (f64, Vec<[f64; 3]>) {
    let last = polygon.len().saturating_sub(1);
    let mut best = (0.0, Vec::new());
    // The triangle on the edge from the last point to the first has its tip at one of the others.
    for tip in 1..last {
        let vector = half_cross(polygon[0], polygon[tip], polygon[last]);
        let [left, right] = [&polygon[..=tip], &polygon[tip..]].map(divide);
        let area = length(vector) + left.0 + right.0;
        if area > best.0 {
            best = (area, [vec![vector], left.1, right.1].concat());
        }
    }
    best
}

fn half_cross(a: [f64; 3], b: [f64; 3], c: [f64; 3]) -> [f64; 3] {
    let [u, v]: [[f64; 3]; 2] = [b, c].map(|point| std::array::from_fn(|axis| point[axis] - a[axis]));
    std::array::from_fn(|axis| {
        let [next, last] = [(axis + 1) % 3, (axis + 2) % 3];
        0.5 * (u[next] * v[last] - u[last] * v[next])
    })
}

fn length(vector: [f64; 3]) -> f64 {
    libm::sqrt(vector.iter().map(|value| value * value).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ball(side: usize, radius: f64, centre: f64) -> Array3<bool> {
        Array3::from_shape_fn([side; 3], |(z, y, x)| {
            let away = [z, y, x].map(|at| (at as f64 - centre).powi(2));
            away.iter().sum::<f64>() <= radius * radius
        })
    }

    #[test]
    fn codes_and_their_complements_have_the_same_area() {
        let areas = areas_mm2([2.0, 0.7, 1.3]);
        for code in 0..256 {
            assert!((areas[code] - areas[255 - code]).abs() < 1e-12, "{code}");
            assert_eq!(areas[code] > 0.0, is_border(code as u8), "{code}");
        }
        // A plane across the cube, normal to z, and one corner cut off half-way along its edges.
        assert!((areas[0b0000_1111] - 0.7 * 1.3).abs() < 1e-12);
        let corner = libm::sqrt((0.7_f64 * 1.3).powi(2) + (2.0_f64 * 1.3).powi(2) + (2.0_f64 * 0.7).powi(2)) / 8.0;
        assert!((areas[1] - corner).abs() < 1e-12);
    }

    #[test]
    fn areas_are_those_of_the_published_table() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/evaluate/metrics.json")).unwrap();
        for table in golden["areas"].as_array().unwrap() {
            let spacing_mm: [f64; 3] = serde_json::from_value(table["spacing_mm"].clone()).unwrap();
            let expected: Vec<f64> = serde_json::from_value(table["areas_mm2"].clone()).unwrap();
            for (code, (got, expected)) in areas_mm2(spacing_mm).into_iter().zip(expected).enumerate() {
                // Sums of a handful of f64.
                assert!(
                    (got - expected).abs() < 1e-12 * expected.max(1.0),
                    "{code:08b}: {got} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_shifted_ball_is_as_far_as_it_was_shifted() {
        let (a, b) = (ball(40, 10.0, 18.0), ball(40, 10.0, 18.0));
        let same = SurfaceDistances::between(a.view(), b.view(), [1.0; 3]);
        assert_eq!(
            (same.dice_at(0.0), same.robust_hausdorff_mm(0.95)),
            (Some(1.0), Some(0.0))
        );
        // The sphere's area is 4 pi r^2 = 1257; cuts half-way between centres make it 10.5 at most and rough.
        let area: f64 = same.elements[0].iter().map(|element| element.area_mm2).sum();
        assert!((1200.0..1450.0).contains(&area), "{area}");
        let moved = Array3::from_shape_fn([40; 3], |(z, y, x)| z >= 3 && a[[z - 3, y, x]]);
        let apart = SurfaceDistances::between(moved.view(), a.view(), [2.0, 1.0, 1.0]);
        assert_eq!(apart.robust_hausdorff_mm(1.0), Some(6.0));
        assert_eq!(apart.dice_at(6.0), Some(1.0));
        assert!(apart.dice_at(2.0).is_some_and(|dice| dice < 0.8));
    }

    #[test]
    fn empty_masks_have_no_distance() {
        let (empty, full) = (Array3::from_elem([3; 3], false), Array3::from_elem([3; 3], true));
        let neither = SurfaceDistances::between(empty.view(), empty.view(), [1.0; 3]);
        assert_eq!((neither.dice_at(1.0), neither.robust_hausdorff_mm(0.95)), (None, None));
        let one = SurfaceDistances::between(full.view(), empty.view(), [1.0; 3]);
        assert_eq!((one.dice_at(99.0), one.robust_hausdorff_mm(0.95)), (Some(0.0), None));
        // A mask that fills its volume has the volume's faces for a surface.
        let filled = SurfaceDistances::between(full.view(), full.view(), [1.0; 3]);
        assert_eq!(filled.dice_at(0.0), Some(1.0));
    }
}
