//! Small rotations, zooms and elastic deformations: the augmentation that interpolates.
//!
//! Every voxel of the patch is looked up at a place in a larger box, read with it, so that corners show the patient and not
//! a border. Images and soft masks are interpolated linearly, labels take the nearest voxel; a lesion's label then follows
//! from the interpolated mask. Where a voxel's eight neighbours all lie off the mask, image and source are equal (promise P5).

use ndarray::Array3;

use super::Augmentation;
use crate::rng::Rng;
use crate::volume::{AIR_HU, Affine, Shape};

/// Distance between the control points of an elastic deformation, in mm.
const CONTROL_MM: f64 = 32.0;
/// The largest displacement of a control point as a share of their distance: below 1/2.48, space never folds.
///
/// # Source
/// Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic B-spline functions, Graphical Models 62 (2000).
const INJECTIVE: f64 = 0.4;

/// One draw of a warp for patches of one shape.
#[derive(Clone, Debug)]
pub struct Warp {
    patch: Shape,
    /// From offsets about the patch's centre to offsets in the old grid, both in voxels (z, y, x).
    matrix: [[f64; 3]; 3],
    /// Displacement of each voxel along (z, y, x), in voxels.
    elastic: Option<[Array3<f32>; 3]>,
    /// How far the box that is read reaches beyond the patch on every side.
    margin: Shape,
}

impl Warp {
    /// Draws a warp, or nothing where chance or the settings say so.
    pub fn draw(settings: &Augmentation, patch: Shape, spacing_mm: [f64; 3], rng: &mut Rng) -> Option<Self> {
        // Drawn in any case: settings that change one choice leave the others alone.
        let warped = rng.chance(settings.warp);
        let angles: [f64; 3] = std::array::from_fn(|_| rng.range(-1.0, 1.0) * settings.rotation_deg.to_radians());
        let zoom = libm::exp(rng.range(-1.0, 1.0) * libm::log(settings.zoom));
        if !warped {
            return None;
        }
        let matrix = matrix(angles, zoom, spacing_mm);
        let control = (settings.elastic_mm > 0.0).then(|| Control::draw(settings.elastic_mm, patch, spacing_mm, rng));
        let reach = control.as_ref().map_or([0.0; 3], Control::reach);
        Some(Self {
            patch,
            matrix,
            margin: margin(patch, &matrix, reach),
            elastic: control.map(|control| control.field(patch, spacing_mm)),
        })
    }

    /// Returns the voxels of the largest box that settings let a warp read: of all rotations to the ends and half-way, at the
    /// strongest zoom, with the longest elastic reach. Where voxels are long along one axis it is much larger than the patch.
    pub fn most_read(settings: &Augmentation, patch: Shape, spacing_mm: [f64; 3]) -> u64 {
        let ends = [-1.0, -0.5, 0.0, 0.5, 1.0].map(|share| share * settings.rotation_deg.to_radians());
        let is_elastic = settings.elastic_mm > 0.0;
        let reach = spacing_mm.map(|mm| if is_elastic { INJECTIVE * CONTROL_MM / mm } else { 0.0 });
        let voxels = |angles: [f64; 3]| {
            let margin = margin(patch, &matrix(angles, 1.0 / settings.zoom, spacing_mm), reach);
            let sides = patch.iter().zip(margin);
            sides.map(|(side, margin)| (side + 2 * margin) as u64).product::<u64>()
        };
        let pairs = ends.iter().flat_map(|z| ends.iter().map(move |y| [*z, *y]));
        let all = pairs.flat_map(|[z, y]| ends.map(|x| [z, y, x]));
        all.map(voxels).max().unwrap_or(0)
    }

    /// Returns how many voxels beyond the patch must be read on every side.
    pub fn margin(&self) -> Shape {
        self.margin
    }

    /// Interpolates HU linearly; `array` is the patch with its margin.
    pub fn image(&self, array: &Array3<i16>) -> Array3<i16> {
        self.linear(array, AIR_HU)
    }

    /// Interpolates a soft mask linearly; `array` is the patch with its margin.
    pub fn soft(&self, array: &Array3<u8>) -> Array3<u8> {
        self.linear(array, 0)
    }

    /// Takes the nearest label; `array` is the patch with its margin.
    pub fn labels(&self, array: &Array3<u8>) -> Array3<u8> {
        let shape: Shape = array.dim().into();
        Array3::from_shape_fn(self.patch, |(z, y, x)| {
            let at = self.at([z, y, x]).map(|v| (v + 0.5).floor());
            if (0..3).all(|axis| at[axis] >= 0.0 && at[axis] < shape[axis] as f32) {
                array[at.map(|v| v as usize)]
            } else {
                0
            }
        })
    }

    /// Returns the affine of the warped patch: that of rotation and zoom; an elastic displacement has none.
    pub fn affine(&self, affine: &Affine) -> Affine {
        let middle = self.patch.map(|side| (side as f64 - 1.0) / 2.0);
        let mut to_old = [[0.0; 4]; 4];
        to_old[3][3] = 1.0;
        for (row, line) in to_old.iter_mut().take(3).enumerate() {
            line[..3].copy_from_slice(&self.matrix[row]);
            let turned: f64 = (0..3).map(|column| self.matrix[row][column] * middle[column]).sum();
            line[3] = middle[row] - turned;
        }
        affine.compose(&Affine(to_old))
    }

    /// Returns where a voxel of the patch is looked up, in voxels of the box that was read.
    fn at(&self, voxel: Shape) -> [f32; 3] {
        std::array::from_fn(|row| {
            let middle = |axis: usize| (self.patch[axis] as f64 - 1.0) / 2.0;
            let turned: f64 = (0..3)
                .map(|column| self.matrix[row][column] * (voxel[column] as f64 - middle(column)))
                .sum();
            let moved = self.elastic.as_ref().map_or(0.0, |field| field[row][voxel]);
            (self.margin[row] as f64 + middle(row) + turned) as f32 + moved
        })
    }

    fn linear<T: Copy + Into<f32> + FromRounded>(&self, array: &Array3<T>, outside: T) -> Array3<T> {
        let shape: Shape = array.dim().into();
        let array = array.as_standard_layout();
        let values = array.as_slice().expect("it is in standard layout");
        let value = |z: i64, y: i64, x: i64| {
            let inside = [z, y, x]
                .into_iter()
                .zip(shape)
                .all(|(at, side)| (0..side as i64).contains(&at));
            let at = |[z, y, x]: [usize; 3]| (z * shape[1] + y) * shape[2] + x;
            if inside {
                values[at([z, y, x].map(|v| v as usize))]
            } else {
                outside
            }
        };
        Array3::from_shape_fn(self.patch, |(z, y, x)| {
            let at = self.at([z, y, x]);
            let [z, y, x] = at.map(|v| v.floor() as i64);
            let [fz, fy, fx] = at.map(|v| v - v.floor());
            let mix = |a: f32, b: f32, share: f32| a + (b - a) * share;
            let row = |z: i64, y: i64| mix(value(z, y, x).into(), value(z, y, x + 1).into(), fx);
            let plane = |z: i64| mix(row(z, y), row(z, y + 1), fy);
            T::from_rounded(mix(plane(z), plane(z + 1), fz))
        })
    }
}

/// What interpolation rounds to.
trait FromRounded {
    /// Rounds half to even; a mean of values lies within their range.
    fn from_rounded(value: f32) -> Self;
}

impl FromRounded for i16 {
    fn from_rounded(value: f32) -> Self {
        value.round_ties_even() as Self
    }
}

impl FromRounded for u8 {
    fn from_rounded(value: f32) -> Self {
        value.round_ties_even() as Self
    }
}

/// Returns what takes offsets in a warped patch to offsets in the old grid, both in voxels.
fn matrix(angles: [f64; 3], zoom: f64, spacing_mm: [f64; 3]) -> [[f64; 3]; 3] {
    let turn = rotation(angles);
    std::array::from_fn(|row| {
        std::array::from_fn(|column| turn[row][column] / zoom * spacing_mm[column] / spacing_mm[row])
    })
}

/// Returns the rotation about z, then y, then x, in (z, y, x) coordinates.
fn rotation([about_z, about_y, about_x]: [f64; 3]) -> [[f64; 3]; 3] {
    let turn = |angle: f64, [a, b]: [usize; 2]| {
        let (sine, cosine) = libm::sincos(angle);
        let mut matrix = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
        (matrix[a][a], matrix[a][b]) = (cosine, -sine);
        (matrix[b][a], matrix[b][b]) = (sine, cosine);
        matrix
    };
    let product = |a: [[f64; 3]; 3], b: [[f64; 3]; 3]| -> [[f64; 3]; 3] {
        std::array::from_fn(|row| std::array::from_fn(|column| (0..3).map(|k| a[row][k] * b[k][column]).sum()))
    };
    product(
        turn(about_x, [0, 1]),
        product(turn(about_y, [0, 2]), turn(about_z, [1, 2])),
    )
}

fn margin(patch: Shape, matrix: &[[f64; 3]; 3], reach: [f64; 3]) -> Shape {
    let half = patch.map(|side| (side as f64 - 1.0) / 2.0);
    std::array::from_fn(|row| {
        let extent: f64 = (0..3).map(|column| matrix[row][column].abs() * half[column]).sum();
        // One more for the neighbour that linear interpolation reads.
        libm::ceil((extent - half[row]).max(0.0) + reach[row]) as usize + 1
    })
}

/// The control points of an elastic deformation.
struct Control {
    /// Displacements along (z, y, x), in voxels.
    points: [Array3<f32>; 3],
}

impl Control {
    fn draw(elastic_mm: f64, patch: Shape, spacing_mm: [f64; 3], rng: &mut Rng) -> Self {
        // A cubic spline needs one point before and two behind the stretch between two points.
        let count = |axis: usize| libm::floor((patch[axis] as f64 - 1.0) * spacing_mm[axis] / CONTROL_MM) as usize + 4;
        let shape: Shape = [count(0), count(1), count(2)];
        let points = spacing_mm.map(|mm| {
            let values = rng.normals(shape.iter().product());
            let limit = INJECTIVE * CONTROL_MM;
            let moved = values
                .into_iter()
                .map(|v| ((f64::from(v) * elastic_mm).clamp(-limit, limit) / mm) as f32);
            Array3::from_shape_vec(shape, moved.collect()).expect("one value per point")
        });
        Self { points }
    }

    /// Returns the largest displacement along each axis, in voxels: a spline never leaves the hull of its points.
    fn reach(&self) -> [f64; 3] {
        self.points
            .each_ref()
            .map(|axis| axis.iter().fold(0.0, |most: f64, v| most.max(f64::from(v.abs()))))
    }

    /// Evaluates the spline at every voxel, one axis after the other.
    fn field(self, patch: Shape, spacing_mm: [f64; 3]) -> [Array3<f32>; 3] {
        self.points.map(|mut values| {
            for axis in 0..3 {
                values = spline_axis(&values, axis, patch[axis], spacing_mm[axis] / CONTROL_MM);
            }
            values
        })
    }
}

/// Evaluates uniform cubic B-splines along one axis, at every multiple of `step` between the second point and the last but
/// two.
fn spline_axis(points: &Array3<f32>, axis: usize, count: usize, step: f64) -> Array3<f32> {
    let mut shape: Shape = points.dim().into();
    shape[axis] = count;
    let weights: Vec<(usize, [f32; 4])> = (0..count)
        .map(|i| {
            let at = i as f64 * step;
            let t = at - libm::floor(at);
            let [t2, t3] = [t * t, t * t * t];
            let basis = [
                1.0 - 3.0 * t + 3.0 * t2 - t3,
                4.0 - 6.0 * t2 + 3.0 * t3,
                1.0 + 3.0 * t + 3.0 * t2 - 3.0 * t3,
                t3,
            ];
            (libm::floor(at) as usize, basis.map(|weight| (weight / 6.0) as f32))
        })
        .collect();
    Array3::from_shape_fn(shape, |(z, y, x)| {
        let mut at = [z, y, x];
        let (first, basis) = weights[at[axis]];
        basis.iter().enumerate().fold(0.0, |sum, (k, weight)| {
            at[axis] = first + k;
            sum + weight * points[at]
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;
    use crate::volume::Region;

    const SPACING_MM: [f64; 3] = [2.0, 1.0, 1.5];
    const PATCH: Shape = [16, 24, 20];

    fn warp(rotation_deg: f64, zoom: f64, elastic_mm: f64, seed: u64) -> Warp {
        let settings = Augmentation {
            warp: 1.0,
            rotation_deg,
            zoom,
            elastic_mm,
            ..Augmentation::off()
        };
        Warp::draw(&settings, PATCH, SPACING_MM, &mut Rng::keyed(seed, 0, 0, Purpose::Test)).unwrap()
    }

    /// The box that a warp reads, with its affine: the patch's voxel 0 lies at `margin`.
    fn source(warp: &Warp) -> (Shape, Affine) {
        let shape = std::array::from_fn(|axis| PATCH[axis] + 2 * warp.margin()[axis]);
        let patch = Affine::axis_aligned(SPACING_MM, [5.0, -3.0, 8.0]);
        (shape, patch.shifted(warp.margin().map(|v| -(v as i64))))
    }

    #[test]
    fn nothing_turned_is_nothing_changed() {
        let warp = warp(0.0, 1.0, 0.0, 1);
        let (shape, _) = source(&warp);
        assert_eq!(warp.margin(), [1; 3]);
        let image = Array3::from_shape_fn(shape, |(z, y, x)| (z * 31 + y * 7 + x) as i16);
        let inner = image.slice(ndarray::s![1..17, 1..25, 1..21]);
        assert_eq!(warp.image(&image), inner);
        assert_eq!(warp.labels(&image.mapv(|v| v as u8)), inner.mapv(|v| v as u8));
        let off = Augmentation {
            warp: 0.0,
            ..Augmentation::default()
        };
        assert!(Warp::draw(&off, PATCH, SPACING_MM, &mut Rng::keyed(1, 0, 0, Purpose::Test)).is_none());
    }

    /// A field that is linear in patient mm shows where every voxel came from: the affine says the same.
    #[test]
    fn the_affine_tells_where_every_voxel_came_from() {
        for seed in 0..20 {
            let warp = warp(30.0, 1.4, 0.0, seed);
            let (shape, grown) = source(&warp);
            let field = |[r, a, s]: [f64; 3]| 10.0 * r - 7.0 * a + 4.0 * s;
            let image = Array3::from_shape_fn(shape, |(z, y, x)| {
                field(grown.to_mm([z, y, x].map(|v| v as f64))).round() as i16
            });
            let patch = warp.affine(&Affine::axis_aligned(SPACING_MM, [5.0, -3.0, 8.0]));
            for ((z, y, x), hu) in warp.image(&image).indexed_iter() {
                let want = field(patch.to_mm([z, y, x].map(|v| v as f64)));
                // Rounded before and after; positions have 16 bits behind the point.
                assert!((f64::from(*hu) - want).abs() < 1.1, "{seed}: {hu} {want}");
            }
            // Lengths: a voxel's edge is the spacing over the zoom, along every axis by the same factor.
            let scale: Vec<f64> = patch
                .spacing_mm()
                .iter()
                .zip(SPACING_MM)
                .map(|(new, old)| new / old)
                .collect();
            assert!(
                scale
                    .iter()
                    .all(|s| (s - scale[0]).abs() < 1e-9 && (1.0 / 1.4..=1.4).contains(s))
            );
        }
    }

    #[test]
    fn no_warp_reads_more_than_the_largest_box() {
        let settings = Augmentation {
            warp: 1.0,
            rotation_deg: 30.0,
            zoom: 1.4,
            elastic_mm: 4.0,
            ..Augmentation::default()
        };
        for spacing_mm in [[1.5; 3], [5.0, 0.8, 0.8]] {
            let most = Warp::most_read(&settings, PATCH, spacing_mm);
            let read = (0..300).map(|seed| {
                let mut rng = Rng::keyed(seed, 0, 0, Purpose::Test);
                let warp = Warp::draw(&settings, PATCH, spacing_mm, &mut rng).unwrap();
                let sides = PATCH.iter().zip(warp.margin());
                sides.map(|(side, margin)| (side + 2 * margin) as u64).product::<u64>()
            });
            let largest = read.max().unwrap();
            // Chance comes near it: the bound is no idle one.
            assert!(largest <= most && largest * 4 > most, "{largest} {most}");
        }
    }

    #[test]
    fn an_elastic_warp_never_folds_and_stays_within_its_margin() {
        for seed in 0..5 {
            let warp = warp(10.0, 1.1, 6.0, seed);
            let (shape, _) = source(&warp);
            let place = Array3::from_shape_fn(PATCH, |(z, y, x)| warp.at([z, y, x]));
            for at in &place {
                assert!(
                    (0..3).all(|axis| at[axis] >= 0.0 && at[axis] <= (shape[axis] - 1) as f32),
                    "{at:?}"
                );
            }
            for ((z, y, x), here) in place.indexed_iter() {
                if z + 1 == PATCH[0] || y + 1 == PATCH[1] || x + 1 == PATCH[2] {
                    continue;
                }
                let step = [[z + 1, y, x], [z, y + 1, x], [z, y, x + 1]].map(|next| {
                    let next = place[next];
                    std::array::from_fn::<f32, 3, _>(|axis| next[axis] - here[axis])
                });
                let [a, b, c] = step;
                let volume = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
                    + a[2] * (b[0] * c[1] - b[1] * c[0]);
                assert!(volume > 0.05, "{seed} {z} {y} {x}: {volume}");
            }
        }
    }

    #[test]
    fn image_mask_and_labels_move_together() {
        let warp = warp(25.0, 1.3, 4.0, 7);
        let (shape, _) = source(&warp);
        let middle = shape.map(|side| side as f64 / 2.0);
        let ball = Array3::from_shape_fn(shape, |(z, y, x)| {
            let at = [z, y, x];
            let squared: f64 = (0..3)
                .map(|a| ((at[a] as f64 - middle[a]) * SPACING_MM[a]).powi(2))
                .sum();
            u8::from(squared < 64.0)
        });
        let labels = warp.labels(&ball);
        let soft = warp.soft(&ball.mapv(|inside| 255 * inside));
        let image = warp.image(&ball.mapv(|inside| if inside == 1 { 1000 } else { 0 }));
        let inside = labels.iter().filter(|label| **label == 1).count();
        let differ = |other: &dyn Fn(usize) -> bool| (0..labels.len()).filter(|i| other(*i)).count();
        let flat = |i: usize| (labels.as_slice().unwrap()[i] == 1, soft.as_slice().unwrap()[i] >= 128);
        // Nearest and half-way thresholds part only where a voxel lies across the border.
        assert!(differ(&|i| flat(i).0 != flat(i).1) * 12 < inside);
        assert_eq!(
            differ(&|i| (soft.as_slice().unwrap()[i] >= 128) != (image.as_slice().unwrap()[i] >= 500)),
            0
        );
        assert!(Region::whole(PATCH).voxels() > inside && inside > 200);
    }
}
