//! A placed lesion's soft mask: where it changes the image, and by how much of its full effect.

use std::ops::Range;

use ndarray::{Array3, Axis};

use super::surface::SurfaceGrid;
use super::{LesionForm, Shape};
use crate::volume::{BitMask, Region};

/// Beyond this distance from the lesion the soft mask is exactly 0 (promise P5).
pub const SUPPORT_MM: f64 = 3.0;
/// A host value that no lesion may take, exophytic or not: real tumours and what surrounds them, other organs, air.
pub const BLOCKED: u8 = 2;
/// The least soft value that counts as lesion.
pub const LESION_FROM: u8 = 128;
/// The sharpest edge, in mm from full effect to the boundary: the 10-90 % width is 1.22 times that and stays over 1 mm.
const SHARPEST_EDGE_MM: f64 = 0.85;

/// Where a shape is placed.
#[derive(Clone, Copy, Debug)]
pub struct MaskRequest<'a> {
    /// The shape.
    pub shape: &'a Shape,
    /// Its centre in the case's voxel indices.
    pub centre: [i64; 3],
    /// The box that the mask covers, in the case's voxel indices.
    pub region: Region,
    /// Voxel size along (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
    /// What the box holds: 1 where the lesion may be, 0 elsewhere, [`BLOCKED`] where not even an exophytic one may be.
    pub host: &'a Array3<u8>,
    /// The recipe's form.
    pub form: &'a LesionForm,
}

/// A lesion in its box.
#[derive(Clone, Debug, PartialEq)]
pub struct LesionMask {
    /// Effect in 255ths, shape of the requested box; at least [`LESION_FROM`] in the lesion.
    pub soft: Array3<u8>,
    /// The lesion's voxels.
    pub voxels: usize,
    /// Share of the unclipped lesion's voxels that is left.
    pub kept: f64,
    /// Equivalent-sphere diameter of what is left, in mm.
    pub diameter_mm: f64,
    /// Semi-axes of the undeformed ellipsoid in mm.
    pub radii_mm: [f64; 3],
}

impl LesionMask {
    /// Tells whether the box holds all of it: one that reaches a face is cut off there, at full strength.
    pub fn is_whole(&self) -> bool {
        let is_free = |axis: usize| {
            let last = self.soft.len_of(Axis(axis)).saturating_sub(1);
            [0, last]
                .iter()
                .all(|at| self.soft.index_axis(Axis(axis), *at).iter().all(|soft| *soft == 0))
        };
        (0..3).all(is_free)
    }
}

/// Places a shape: clips it to its host, keeps the largest piece, and softens its edge.
///
/// The work is bounded by the lesion's own box, whatever the size of the region.
///
/// # Panics
/// When `host` has not the size of the region.
pub fn soft_mask(request: &MaskRequest) -> LesionMask {
    let [d, h, w] = request.region.size;
    assert_eq!(request.host.dim(), (d, h, w), "the host covers the region");
    let host = request.host.as_standard_layout();
    // One voxel more than the support, so that slopes can be measured everywhere inside it.
    let reach = request.shape.reach_mm() + SUPPORT_MM;
    let half = request.spacing_mm.map(|mm| (reach / mm).ceil() as usize + 1);
    let own = Region::centred(request.centre, half.map(|voxels| 2 * voxels + 1));
    let part = own.intersect(&request.region);
    let mut clipped = Clipped {
        request,
        start: part.relative_to(request.region.start).start.map(|v| v.max(0) as usize),
        size: part.size,
        soft: vec![0; d * h * w],
        host: host.as_slice().expect("the standard layout is contiguous"),
    };
    let free = clipped.paint(half, part.relative_to(own.start));
    let voxels = clipped.tidy(free);
    let soft = Array3::from_shape_vec(request.region.size, clipped.soft).expect("one value per voxel");
    let volume_mm3 = voxels as f64 * request.spacing_mm.iter().product::<f64>();
    LesionMask {
        soft,
        voxels,
        kept: voxels as f64 / free.max(1) as f64,
        diameter_mm: libm::cbrt(volume_mm3 * 6.0 / std::f64::consts::PI),
        radii_mm: request.shape.radii_mm(),
    }
}

/// What the region and the lesion's own box share.
struct Clipped<'a> {
    request: &'a MaskRequest<'a>,
    /// Where it starts in the region, and its size.
    start: [usize; 3],
    size: [usize; 3],
    /// The whole region's effect and host.
    soft: Vec<u8>,
    host: &'a [u8],
}

impl Clipped<'_> {
    /// Returns where row (z, y) lies in the region's arrays.
    fn row(&self, [z, y]: [usize; 2]) -> Range<usize> {
        let [_, height, width] = self.request.region.size;
        let from = ((self.start[0] + z) * height + self.start[1] + y) * width + self.start[2];
        from..from + self.size[2]
    }

    /// Returns where a voxel lies in the region's arrays.
    fn voxel(&self, [z, y, x]: [usize; 3]) -> usize {
        self.row([z, y]).start + x
    }

    /// Writes the effect of the lesion clipped to its host; returns the voxels of the unclipped one.
    ///
    /// `half` counts voxels from the lesion's centre to the border of its own box, in which `part` is what is shared.
    fn paint(&mut self, half: [usize; 3], part: Region) -> usize {
        let surface = self.request.shape.surface();
        let grid = SurfaceGrid::new(&surface, half, self.request.spacing_mm);
        let exophytic = self.request.form.exophytic;
        let edge = self.edge();
        let mut effects = Vec::new();
        let mut free = 0;
        let inside = |at: usize, axis: usize| {
            let at = usize::try_from(at as i64 - part.start[axis]).ok();
            at.filter(|at| *at < part.size[axis])
        };
        grid.scan(|[z, y], from, distances| {
            effects.clear();
            effects.extend(distances.iter().map(|distance| edge.effect(*distance)));
            free += effects
                .iter()
                .map(|effect| u32::from(*effect >= LESION_FROM))
                .sum::<u32>() as usize;
            let (Some(z), Some(y), false) = (inside(z, 0), inside(y, 1), part.is_empty()) else {
                return;
            };
            let first = from as i64 - part.start[2];
            let skipped = usize::try_from(-first).unwrap_or(0);
            let x = usize::try_from(first).unwrap_or(0).min(part.size[2]);
            let row = self.row([z, y]);
            let voxels = self.soft[row.clone()][x..].iter_mut().zip(&self.host[row][x..]);
            for ((soft, host), effect) in voxels.zip(effects.iter().skip(skipped)) {
                *soft = if is_allowed(*host, exophytic) { *effect } else { 0 };
            }
        });
        free
    }

    /// Keeps the largest piece, its support and soft borders; returns the piece's voxels.
    fn tidy(&mut self, free: usize) -> usize {
        let spacing_mm = self.request.spacing_mm;
        let mut lesion = self.at_least(LESION_FROM);
        self.lower(lesion.keep_largest().into_iter(), 0);
        // What is farther than the support from the lesion has no effect.
        let mut stray = self.at_least(1);
        stray.subtract(&lesion.dilated(spacing_mm, SUPPORT_MM));
        self.lower(stray.voxels(), 0);
        let voxels = lesion.count();
        if voxels == free {
            return voxels;
        }
        // Lesion voxels next to forbidden ground lie half a voxel inside their surface.
        let exophytic = self.request.form.exophytic;
        let forbidden = BitMask::at_least(self.size, 1, |at, row| {
            let host = &self.host[self.row(at)];
            row.iter_mut()
                .zip(host)
                .for_each(|(out, host)| *out = u8::from(!is_allowed(*host, exophytic)));
        });
        for (axis, mm) in spacing_mm.into_iter().enumerate() {
            let mut border = forbidden.grown_along(axis);
            border.intersect(&lesion);
            self.lower(border.voxels(), self.edge().effect((mm / 2.0) as f32));
        }
        voxels
    }

    /// Lowers the effect of voxels to at most `most`.
    fn lower(&mut self, voxels: impl Iterator<Item = [usize; 3]>, most: u8) {
        for voxel in voxels {
            let at = self.voxel(voxel);
            self.soft[at] = self.soft[at].min(most);
        }
    }

    /// Returns the voxels whose effect is at least `least`.
    fn at_least(&self, least: u8) -> BitMask {
        BitMask::at_least(self.size, least, |at, row| {
            row.copy_from_slice(&self.soft[self.row(at)])
        })
    }

    fn edge(&self) -> Edge {
        let edge_mm = self.request.form.edge_mm.clamp(SHARPEST_EDGE_MM, SUPPORT_MM);
        Edge {
            per_mm: (0.5 / edge_mm) as f32,
        }
    }
}

/// Tells whether the lesion may take a host value.
fn is_allowed(host: u8, exophytic: bool) -> bool {
    // Without branches, so that rows are tested in vectors.
    (host == 1) | (exophytic & (host == 0))
}

/// How the effect falls across the surface.
#[derive(Clone, Copy)]
struct Edge {
    /// One over the whole width, in mm.
    per_mm: f32,
}

impl Edge {
    /// Returns the effect in 255ths at a distance from the surface in mm, positive inside: a cubic from 0 to 255.
    fn effect(self, distance_mm: f32) -> u8 {
        // Adding 1.5 x 2^23 leaves no bit for fractions: the sum's lowest byte is the value, rounded to even.
        const ROUNDING: f32 = 12_582_912.0;
        let t = (distance_mm * self.per_mm + 0.5).clamp(0.0, 1.0);
        (t * t * (3.0 - 2.0 * t) * 255.0 + ROUNDING).to_bits() as u8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lesion::ShapeRequest;
    use crate::rng::{Purpose, Rng};
    use crate::volume::{Connectivity, components, dilated};

    fn shape(diameter_mm: f64, form: &LesionForm, key: u64) -> Shape {
        Shape::draw(
            &ShapeRequest { diameter_mm, form },
            &mut Rng::keyed(key, 0, 0, Purpose::Test),
        )
    }

    fn place(
        shape: &Shape,
        host: &Array3<u8>,
        (centre, spacing_mm): ([i64; 3], [f64; 3]),
        form: &LesionForm,
    ) -> LesionMask {
        let (d, h, w) = host.dim();
        let region = Region::whole([d, h, w]);
        soft_mask(&MaskRequest {
            shape,
            centre,
            region,
            spacing_mm,
            host,
            form,
        })
    }

    #[test]
    fn free_lesions_have_the_requested_volume_and_a_soft_edge() {
        let form = LesionForm::default();
        for (key, spacing_mm) in [(1, [1.5; 3]), (2, [2.0; 3]), (3, [5.0, 0.8, 0.8])] {
            let size: [usize; 3] = spacing_mm.map(|mm| (90.0 / mm) as usize);
            let host = Array3::ones(size);
            for diameter in [14.0, 22.0, 45.0] {
                let shape = shape(diameter, &form, key);
                let mask = place(&shape, &host, (size.map(|n| n as i64 / 2), spacing_mm), &form);
                assert_eq!(mask.kept, 1.0);
                let ratio = mask.diameter_mm / diameter;
                assert!((0.94..1.06).contains(&ratio), "{spacing_mm:?} {diameter}: {ratio}");
                let edge = mask.soft.iter().filter(|v| (26..230).contains(*v)).count() as f64;
                let volume = spacing_mm.iter().product::<f64>();
                // Volume between 10 and 90 % over the area of the ball: the mean edge width; a rough surface has more
                // area than a ball, by 1 / sphericity.
                let width = edge * volume / (std::f64::consts::PI * mask.diameter_mm.powi(2));
                assert!((1.0..5.0).contains(&width), "{spacing_mm:?} {diameter}: {width}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn masks_are_confined_connected_and_bounded(
            key in 0u64..1000, diameter in 4.0..40.0f64, cut in 4i64..30, edge_mm in 0.5..3.0f64, coarse in 0usize..3,
        ) {
            let spacing_mm = [[1.5; 3], [2.0; 3], [4.0, 1.0, 1.0]][coarse];
            let form = LesionForm { edge_mm, ..LesionForm::default() };
            let host = Array3::from_shape_fn([30, 34, 32], |(z, y, x)| u8::from((y as i64) < cut && (z + x) % 17 != 3));
            let mask = place(&shape(diameter, &form, key), &host, ([15, 14, 16], spacing_mm), &form);
            let lesion: Vec<_> = mask.soft.indexed_iter().filter(|(_, v)| **v >= LESION_FROM).map(|(i, _)| i).collect();
            prop_assert_eq!(lesion.len(), mask.voxels);
            prop_assert!((0.0..=1.0).contains(&mask.kept));
            for (at, value) in mask.soft.indexed_iter().filter(|(_, v)| **v > 0) {
                prop_assert_eq!(host[at], 1, "{} outside the host", value);
                let nearest = lesion.iter().map(|l| {
                    let along = |a: usize, b: usize, axis: usize| (a as f64 - b as f64) * spacing_mm[axis];
                    along(at.0, l.0, 0).powi(2) + along(at.1, l.1, 1).powi(2) + along(at.2, l.2, 2).powi(2)
                }).fold(f64::INFINITY, f64::min);
                prop_assert!(nearest <= SUPPORT_MM * SUPPORT_MM + 1e-9, "{} mm away", nearest.sqrt());
            }
            let pieces = components(mask.soft.mapv(|value| value >= LESION_FROM), Connectivity::Faces);
            prop_assert!(pieces.len() <= 1, "{} pieces", pieces.len());
        }
    }

    /// The distance to the surface at a voxel in mm by its definition, in double precision.
    fn defined_distance(request: &MaskRequest, at: [i64; 3]) -> f64 {
        const FAR_MM: f64 = 6.0;
        let depth = |at: [i64; 3]| {
            let offset =
                std::array::from_fn(|axis| (at[axis] - request.centre[axis]) as f64 * request.spacing_mm[axis]);
            request.shape.radial_depth(offset).max(-FAR_MM)
        };
        let here = depth(at);
        if here.abs() >= FAR_MM {
            return here;
        }
        let slope = (0..3).map(|axis| {
            let beside = |step: i64| std::array::from_fn(|i| at[i] + if i == axis { step } else { 0 });
            (depth(beside(1)) - depth(beside(-1))) / (2.0 * request.spacing_mm[axis])
        });
        here / slope.map(|slope| slope * slope).sum::<f64>().sqrt().max(1.0)
    }

    fn defined_effect(request: &MaskRequest, distance_mm: f64) -> u8 {
        let edge_mm = request.form.edge_mm.clamp(SHARPEST_EDGE_MM, SUPPORT_MM);
        let t = ((distance_mm / edge_mm + 1.0) / 2.0).clamp(0.0, 1.0);
        (t * t * (3.0 - 2.0 * t) * 255.0).round() as u8
    }

    /// The mask by its definition, a step after the other over the whole region.
    fn defined(request: &MaskRequest) -> Array3<u8> {
        let exophytic = request.form.exophytic;
        let is_open = |at: [usize; 3]| request.host.get(at).map(|host| is_allowed(*host, exophytic));
        let mut soft = Array3::from_shape_fn(request.region.size, |(z, y, x)| match is_open([z, y, x]) {
            Some(true) => defined_effect(request, defined_distance(request, [z, y, x].map(|v| v as i64))),
            _ => 0,
        });
        let pieces = components(soft.mapv(|value| value >= LESION_FROM), Connectivity::Faces);
        let largest = (0..pieces.len()).rev().max_by_key(|piece| pieces[*piece].len());
        let lost = pieces.iter().enumerate().filter(|(piece, _)| Some(*piece) != largest);
        lost.flat_map(|(_, voxels)| voxels).for_each(|voxel| soft[*voxel] = 0);
        let lesion = soft.mapv(|value| u8::from(value >= LESION_FROM));
        let near = dilated(&lesion, request.spacing_mm, SUPPORT_MM);
        for ((z, y, x), value) in soft.indexed_iter_mut() {
            *value *= u8::from(near[[z, y, x]]);
            for (axis, step) in (0..3).flat_map(|axis| [(axis, usize::MAX), (axis, 1)]) {
                let beside = std::array::from_fn(|i| [z, y, x][i].wrapping_add(if i == axis { step } else { 0 }));
                if is_open(beside) == Some(false) && lesion[[z, y, x]] == 1 {
                    *value = (*value).min(defined_effect(request, request.spacing_mm[axis] / 2.0));
                }
            }
        }
        soft
    }

    #[test]
    fn masks_are_what_their_definition_says() {
        let ragged = |(z, y, x): (usize, usize, usize)| u8::from((z * 7 + y * 3 + x) % 40 > 2 && x + y > 36 && x != 28);
        for key in 0..24 {
            let spacing_mm = [[1.5; 3], [3.0, 1.0, 1.0], [1.0, 2.0, 0.9]][key as usize % 3];
            let diameter_mm = [7.0, 16.0, 30.0, 24.0][key as usize % 4];
            let form = LesionForm {
                edge_mm: [0.5, 2.0, 3.0][key as usize / 8],
                exophytic: key % 5 == 0,
                ..LesionForm::default()
            };
            // Cut by planes, with holes and a wall; then free.
            let host = Array3::from_shape_fn([26, 44, 70], |at| if key % 2 == 0 { ragged(at) } else { 1 });
            let shape = shape(diameter_mm, &form, 100 + key);
            let request = MaskRequest {
                shape: &shape,
                centre: [13, 20, 33],
                region: Region::whole([26, 44, 70]),
                spacing_mm,
                host: &host,
                form: &form,
            };
            let (got, wanted) = (soft_mask(&request).soft, defined(&request));
            let lesion = wanted.iter().filter(|value| **value >= LESION_FROM).count();
            assert!(lesion > 10, "{key}: {lesion} voxels");
            for ((at, got), wanted) in got.indexed_iter().zip(&wanted) {
                // Rounding to a whole number, once in single and once in double precision.
                assert!(got.abs_diff(*wanted) <= 1, "{key} {at:?}: {got} {wanted}");
                assert_eq!(
                    *got >= LESION_FROM,
                    *wanted >= LESION_FROM,
                    "{key} {at:?}: {got} {wanted}"
                );
            }
        }
    }

    /// The same bytes on every platform and instruction set (promise P1). A change raises `stream::recipe::REVISION`.
    #[test]
    fn masks_keep_their_bytes() {
        let form = LesionForm::default();
        let host = Array3::from_shape_fn([64; 3], |(z, y, x)| u8::from(x + y > 50 && z < 60));
        let mut crc = crc32fast::Hasher::new();
        for (key, diameter_mm) in [(1, 8.0), (2, 15.0), (3, 35.0), (4, 70.0)] {
            let mask = place(&shape(diameter_mm, &form, key), &host, ([32; 3], [1.5; 3]), &form);
            crc.update(mask.soft.as_slice().unwrap());
        }
        assert_eq!(crc.finalize(), 3_421_634_093);
    }

    #[test]
    fn a_lesion_that_its_box_cuts_is_not_whole() {
        let form = LesionForm::default();
        let host = Array3::ones([48; 3]);
        let is_whole = |diameter_mm: f64, z: i64| {
            place(&shape(diameter_mm, &form, 3), &host, ([z, 24, 24], [1.5; 3]), &form).is_whole()
        };
        assert!(is_whole(20.0, 24) && !is_whole(20.0, 4) && !is_whole(20.0, 45) && !is_whole(80.0, 24));
    }

    #[test]
    fn exophytic_lesions_leave_their_organ_but_never_take_blocked_ground() {
        let form = LesionForm {
            exophytic: true,
            ..LesionForm::default()
        };
        let host = Array3::from_shape_fn([40; 3], |(_, y, x)| if x < 8 { BLOCKED } else { u8::from(y < 20) });
        let mask = place(&shape(24.0, &form, 5), &host, ([20, 19, 12], [1.5; 3]), &form);
        let at = |wanted: u8| {
            mask.soft
                .indexed_iter()
                .filter(|(i, v)| **v > 0 && host[*i] == wanted)
                .count()
        };
        assert!(at(0) > 0 && at(1) > 0 && at(BLOCKED) == 0);
        assert!(mask.kept < 1.0);
    }

    #[test]
    fn a_lesion_does_not_depend_on_the_region_that_holds_it() {
        let form = LesionForm::default();
        let shape = shape(18.0, &form, 9);
        let request = |start: i64, side: usize, host| MaskRequest {
            shape: &shape,
            centre: [30; 3],
            region: Region {
                start: [start; 3],
                size: [side; 3],
            },
            spacing_mm: [1.5; 3],
            host,
            form: &form,
        };
        let (wide, tight) = (Array3::ones([60; 3]), Array3::ones([32; 3]));
        let (a, b) = (soft_mask(&request(0, 60, &wide)), soft_mask(&request(14, 32, &tight)));
        for start in [-40, 60] {
            let missed = soft_mask(&request(start, 32, &tight));
            assert_eq!((missed.voxels, missed.kept), (0, 0.0));
            assert!(missed.soft.iter().all(|value| *value == 0));
        }
        assert_eq!(a.voxels, b.voxels);
        assert_eq!(a.soft.slice(ndarray::s![14..46, 14..46, 14..46]), b.soft);
    }
}
