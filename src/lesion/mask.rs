//! A placed lesion's soft mask: where it changes the image, and by how much of its full effect.

use ndarray::{Array3, s};

use super::shape::FAR_MM;
use super::{LesionForm, Shape};
use crate::volume::{Connectivity, Region, components, dilated};

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

/// Places a shape: clips it to its host, keeps the largest piece, and softens its edge.
///
/// The work is bounded by the lesion's own box, whatever the size of the region.
///
/// # Panics
/// When `host` has not the size of the region.
pub fn soft_mask(request: &MaskRequest) -> LesionMask {
    let [d, h, w] = request.region.size;
    assert_eq!(request.host.dim(), (d, h, w), "the host covers the region");
    let depths = Depths::of(request);
    let free = depths.values.iter().filter(|depth| **depth >= 0.0).count();
    let part = depths.region.intersect(&request.region);
    let mut soft = Array3::zeros(request.region.size);
    let mut voxels = 0;
    if !part.is_empty() && free > 0 {
        let mut local = depths.softened(request, part);
        voxels = keep_largest(&mut local);
        confine(&mut local, request.spacing_mm);
        if voxels < free {
            soften_border(&mut local, request, part);
        }
        let [z, y, x] = part.relative_to(request.region.start).start.map(|v| v as usize);
        let [d, h, w] = part.size;
        soft.slice_mut(s![z..z + d, y..y + h, x..x + w]).assign(&local);
    }
    let volume_mm3 = voxels as f64 * request.spacing_mm.iter().product::<f64>();
    LesionMask {
        soft,
        voxels,
        kept: voxels as f64 / free.max(1) as f64,
        diameter_mm: libm::cbrt(volume_mm3 * 6.0 / std::f64::consts::PI),
        radii_mm: request.shape.radii_mm(),
    }
}

/// Tells whether the lesion may take a host value.
fn is_allowed(host: u8, form: &LesionForm) -> bool {
    host == 1 || (form.exophytic && host == 0)
}

/// Distances to the unclipped lesion's surface over its own box.
struct Depths {
    region: Region,
    values: Vec<f64>,
}

impl Depths {
    fn of(request: &MaskRequest) -> Self {
        // One voxel more than the support, so that slopes can be measured everywhere inside it.
        let reach = request.shape.reach_mm() + SUPPORT_MM;
        let half = request.spacing_mm.map(|mm| (reach / mm).ceil() as usize + 1);
        let size = half.map(|voxels| 2 * voxels + 1);
        let region = Region::centred(request.centre, size);
        let mut values = Vec::with_capacity(region.voxels());
        let offset = |i: usize, axis: usize| (i as f64 - half[axis] as f64) * request.spacing_mm[axis];
        for z in 0..size[0] {
            for y in 0..size[1] {
                let (oz, oy) = (offset(z, 0), offset(y, 1));
                values.extend((0..size[2]).map(|x| request.shape.radial_depth([oz, oy, offset(x, 2)])));
            }
        }
        Self { region, values }
    }

    /// Returns the depth at a voxel as a distance to the surface: along the ray it is too long where the surface is
    /// oblique, which dividing by the slope corrects to first order.
    fn distance(&self, [z, y, x]: [usize; 3], spacing_mm: [f64; 3]) -> f64 {
        let [d, h, w] = self.region.size;
        let at = |z: usize, y: usize, x: usize| self.values[(z * h + y) * w + x];
        let depth = at(z, y, x);
        if !(1..d - 1).contains(&z) || !(1..h - 1).contains(&y) || !(1..w - 1).contains(&x) {
            return depth;
        }
        let slope = [
            (at(z + 1, y, x) - at(z - 1, y, x)) / (2.0 * spacing_mm[0]),
            (at(z, y + 1, x) - at(z, y - 1, x)) / (2.0 * spacing_mm[1]),
            (at(z, y, x + 1) - at(z, y, x - 1)) / (2.0 * spacing_mm[2]),
        ];
        // Never stretched: on coarse grids the measured slope of a small lesion is too flat.
        depth / slope.iter().map(|s| s * s).sum::<f64>().sqrt().max(1.0)
    }

    /// Returns the soft mask of the lesion clipped to its host, over `part`.
    fn softened(&self, request: &MaskRequest, part: Region) -> Array3<u8> {
        let edge_mm = request.form.edge_mm.clamp(SHARPEST_EDGE_MM, SUPPORT_MM);
        let own = part.relative_to(self.region.start).start.map(|v| v as usize);
        let there = part.relative_to(request.region.start).start.map(|v| v as usize);
        Array3::from_shape_fn(part.size, |(z, y, x)| {
            if !is_allowed(request.host[[there[0] + z, there[1] + y, there[2] + x]], request.form) {
                return 0;
            }
            let voxel = [own[0] + z, own[1] + y, own[2] + x];
            let [_, h, w] = self.region.size;
            let depth = self.values[(voxel[0] * h + voxel[1]) * w + voxel[2]];
            // The slope only matters near the edge.
            if depth.abs() < FAR_MM {
                effect(self.distance(voxel, request.spacing_mm), edge_mm)
            } else {
                effect(depth, edge_mm)
            }
        })
    }
}

/// Returns the effect in 255ths at a distance from the surface, positive inside: a cubic from 0 to 255 over both sides.
fn effect(distance_mm: f64, edge_mm: f64) -> u8 {
    let t = ((distance_mm / edge_mm + 1.0) / 2.0).clamp(0.0, 1.0);
    (t * t * (3.0 - 2.0 * t) * 255.0).round() as u8
}

/// Sets lesion voxels outside the largest face-connected piece to 0; returns the piece's size.
fn keep_largest(soft: &mut Array3<u8>) -> usize {
    let pieces = components(soft.mapv(|value| value >= LESION_FROM), Connectivity::Faces);
    // The first of equally large pieces, so that the choice is defined.
    let largest = (0..pieces.len()).rev().max_by_key(|piece| pieces[*piece].len());
    for (piece, members) in pieces.iter().enumerate() {
        if Some(piece) != largest {
            members.iter().for_each(|voxel| soft[*voxel] = 0);
        }
    }
    largest.map_or(0, |piece| pieces[piece].len())
}

/// Sets everything farther than [`SUPPORT_MM`] from a lesion voxel to 0.
fn confine(soft: &mut Array3<u8>, spacing_mm: [f64; 3]) {
    let lesion = soft.mapv(|value| u8::from(value >= LESION_FROM));
    let near = dilated(&lesion, spacing_mm, SUPPORT_MM);
    soft.zip_mut_with(&near, |value, near| *value *= u8::from(*near));
}

/// Lowers the effect of lesion voxels next to forbidden ground, which lie half a voxel inside their surface.
fn soften_border(soft: &mut Array3<u8>, request: &MaskRequest, part: Region) {
    let edge_mm = request.form.edge_mm.clamp(SHARPEST_EDGE_MM, SUPPORT_MM);
    let there = part.relative_to(request.region.start).start.map(|v| v as usize);
    let is_forbidden = |[z, y, x]: [usize; 3]| {
        let host = request.host[[there[0] + z, there[1] + y, there[2] + x]];
        !is_allowed(host, request.form)
    };
    for ((z, y, x), value) in soft.indexed_iter_mut().filter(|(_, value)| **value >= LESION_FROM) {
        for axis in 0..3 {
            let voxel = [z, y, x];
            let (before, after) = (voxel[axis].checked_sub(1), voxel[axis] + 1);
            let after = (after < part.size[axis]).then_some(after);
            for beside in [before, after].into_iter().flatten() {
                let mut next = voxel;
                next[axis] = beside;
                if is_forbidden(next) {
                    *value = (*value).min(effect(request.spacing_mm[axis] / 2.0, edge_mm));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lesion::ShapeRequest;
    use crate::rng::{Purpose, Rng};

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
            prop_assert_eq!(keep_largest(&mut mask.soft.clone()), mask.voxels);
        }
    }

    /// Prints what a mask costs; run alone on a quiet machine for figures.
    #[test]
    fn masks_are_cheap() {
        let form = LesionForm::default();
        let host = Array3::ones([96; 3]);
        for diameter in [8.0, 15.0, 30.0, 75.0] {
            let start = std::time::Instant::now();
            let runs = 20;
            for key in 0..runs {
                place(&shape(diameter, &form, key), &host, ([48; 3], [1.5; 3]), &form);
            }
            let each = start.elapsed() / runs as u32;
            eprintln!("{diameter} mm: {each:?} for shape and mask");
            assert!(each < std::time::Duration::from_millis(200), "{each:?}");
        }
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
        assert_eq!(a.voxels, b.voxels);
        assert_eq!(a.soft.slice(ndarray::s![14..46, 14..46, 14..46]), b.soft);
    }
}
