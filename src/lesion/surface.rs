//! A lesion's surface as polynomials, evaluated plane by plane and row by row.
//!
//! Along a row only x changes, so the three variables shrink to one: a voxel costs eleven products and sums, two roots
//! and a division of single precision, all of them correctly rounded everywhere and free to run in vectors (P1).

/// Distance to the surface beyond which depths are only bounds, in mm.
pub(super) const FAR_MM: f32 = 6.0;

/// A polynomial in (z, y, x) whose terms all have the same degree, at most 6.
#[derive(Clone, Copy, Debug)]
pub(super) struct Homogeneous {
    degree: usize,
    /// Of z^i y^j x^(degree - i - j) at `[i][j]`.
    coefficients: [[f64; 7]; 7],
}

/// A polynomial in x, lowest power first.
type Row<const N: usize> = [f32; N];

impl Homogeneous {
    pub(super) fn zero(degree: usize) -> Self {
        Self {
            degree,
            coefficients: [[0.0; 7]; 7],
        }
    }

    pub(super) fn constant(value: f64) -> Self {
        let mut out = Self::zero(0);
        out.coefficients[0][0] = value;
        out
    }

    pub(super) fn linear([z, y, x]: [f64; 3]) -> Self {
        let mut out = Self::zero(1);
        out.coefficients[1][0] = z;
        out.coefficients[0][1] = y;
        out.coefficients[0][0] = x;
        out
    }

    /// Adds `factor` times another of the same degree.
    pub(super) fn add(&mut self, other: &Self, factor: f64) {
        for (row, other) in self.coefficients.iter_mut().zip(&other.coefficients) {
            row.iter_mut()
                .zip(other)
                .for_each(|(value, other)| *value += factor * other);
        }
    }

    /// Returns the product with a polynomial; their degrees add up to at most 6.
    pub(super) fn times(&self, other: &Self) -> Self {
        debug_assert!(
            self.degree + other.degree <= 6,
            "a product of degree {}",
            self.degree + other.degree
        );
        let mut out = Self::zero(self.degree + other.degree);
        let terms = |degree: usize| (0..=degree).flat_map(move |i| (0..=degree - i).map(move |j| (i, j)));
        for (k, l) in terms(other.degree) {
            let factor = other.coefficients[k][l];
            for (i, j) in terms(self.degree) {
                out.coefficients[i + k][j + l] += factor * self.coefficients[i][j];
            }
        }
        out
    }

    /// Returns the coefficients of y^j x^(a) at `[j][a]` where z is given.
    fn plane(&self, z: f64) -> [[f64; 7]; 7] {
        let mut out = [[0.0; 7]; 7];
        let mut power = 1.0;
        for i in 0..=self.degree {
            for j in 0..=self.degree - i {
                out[j][self.degree - i - j] = self.coefficients[i][j] * power;
            }
            power *= z;
        }
        out
    }
}

/// Returns the coefficients in x where y is given too.
fn row<const N: usize>(plane: &[[f64; 7]; 7], y: f64) -> [f64; N] {
    let mut out = [0.0; N];
    let mut power = 1.0;
    for coefficients in &plane[..N] {
        out.iter_mut().zip(coefficients).for_each(|(sum, c)| *sum += c * power);
        power *= y;
    }
    out
}

/// A star-shaped body around the origin: its surface lies where |u| = 1 + E(u) / |u|^6 + O(u) / |u|^5, `u` being linear in
/// the offset from the centre.
pub(super) struct Surface {
    /// E, of degree 6, as a function of the offset in units.
    pub(super) even: Homogeneous,
    /// O, of degree 5.
    pub(super) odd: Homogeneous,
    /// |u|^2.
    pub(super) square: Homogeneous,
    /// What an offset of 1 is in mm.
    pub(super) unit_mm: f64,
    /// The least and the greatest relative change of the radius; the deformation is cut off there.
    pub(super) extremes: [f64; 2],
    /// The ellipsoid's shortest semi-axis in mm.
    pub(super) shortest_mm: f64,
}

/// A grid around a surface's centre.
pub(super) struct SurfaceGrid<'a> {
    surface: &'a Surface,
    spacing_mm: [f64; 3],
    /// Voxels from the centre to the border along each axis.
    half: [usize; 3],
    /// Voxel size in units.
    step: [f64; 3],
    /// x of every voxel of a row, in units.
    xs: Vec<f32>,
    /// |u|^2 beyond which a voxel is far outside.
    outer: f64,
}

/// What is known of a row before its voxels are.
struct RowTerms {
    even: Row<7>,
    odd: Row<6>,
    square: Row<3>,
    /// Squared distance of the row from the x axis, in units.
    across: f32,
}

impl<'a> SurfaceGrid<'a> {
    /// # Units
    /// `spacing_mm` is (z, y, x) in mm; `half` counts voxels.
    pub(super) fn new(surface: &'a Surface, half: [usize; 3], spacing_mm: [f64; 3]) -> Self {
        let step = spacing_mm.map(|mm| mm / surface.unit_mm);
        let margin = f64::from(FAR_MM) / surface.shortest_mm;
        let outer = 1.0 + surface.extremes[1] + margin;
        Self {
            surface,
            spacing_mm,
            half,
            step,
            xs: (0..=2 * half[2])
                .map(|i| ((i as f64 - half[2] as f64) * step[2]) as f32)
                .collect(),
            outer: outer * outer,
        }
    }

    /// Calls `visit` with the (z, y) of every row that may come near the surface, its first such x, and the distances to
    /// the surface from there on, in mm, positive inside. The grid's outermost voxels are left out.
    ///
    /// Depths along the ray are too long where the surface is oblique, which dividing by their slope corrects to first
    /// order; far from the surface they are left as they are.
    pub(super) fn scan(&self, mut visit: impl FnMut([usize; 2], usize, &[f32])) {
        let [depth, height, width] = self.half.map(|half| 2 * half + 1);
        // A slope needs the planes before and after: three are held at a time.
        let mut depths = [(); 3].map(|()| vec![-FAR_MM; height * width]);
        let mut spans = [(); 3].map(|()| vec![[0; 2]; height]);
        let mut distances = Vec::with_capacity(width);
        for z in 0..depth {
            self.fill(z, &mut depths[2], &mut spans[2]);
            let [before, here, after] = &depths;
            for (y, span) in spans[1].iter().enumerate().take(height - 1).skip(1) {
                let [from, to] = [span[0].max(1), span[1].min(width - 1)];
                if z < 2 || from >= to {
                    continue;
                }
                let at = y * width + from;
                let beside = [
                    [&before[at..], &after[at..]],
                    [&here[at - width..], &here[at + width..]],
                    [&here[at - 1..], &here[at + 1..]],
                ];
                self.correct(&here[at..at + to - from], beside, &mut distances);
                visit([z - 1, y], from, &distances);
            }
            depths.rotate_left(1);
            spans.rotate_left(1);
        }
    }

    /// Turns depths along the ray into distances, given the depths of the voxels before and after along each axis.
    fn correct(&self, depths: &[f32], beside: [[&[f32]; 2]; 3], distances: &mut Vec<f32>) {
        let [per_z, per_y, per_x] = self.spacing_mm.map(|mm| (0.5 / mm) as f32);
        distances.clear();
        distances.extend_from_slice(depths);
        let [z, y, x] = beside.map(|[before, after]| before.iter().zip(after));
        for (distance, ((z, y), x)) in distances.iter_mut().zip(z.zip(y).zip(x)) {
            let slope = [(z.1 - z.0) * per_z, (y.1 - y.0) * per_y, (x.1 - x.0) * per_x];
            let steep = slope[0] * slope[0] + slope[1] * slope[1] + slope[2] * slope[2];
            // Never stretched: on coarse grids the measured slope of a small lesion is too flat.
            let is_oblique = (steep > 1.0) & (distance.abs() < FAR_MM);
            let divisor = if is_oblique { steep } else { 1.0 };
            *distance /= divisor.sqrt();
        }
    }

    /// Writes the depths of plane `z`: about the distance to the surface along the ray from the centre in mm, positive
    /// inside, and no less than -[`FAR_MM`]. Writes for every row where they may be more, from and below.
    ///
    /// # Shape
    /// `depths` holds the plane, `spans` its rows.
    fn fill(&self, z: usize, depths: &mut [f32], spans: &mut [[usize; 2]]) {
        let offset = |at: usize, axis: usize| (at as f64 - self.half[axis] as f64) * self.step[axis];
        let z_units = offset(z, 0);
        let [even, odd, square] =
            [&self.surface.even, &self.surface.odd, &self.surface.square].map(|polynomial| polynomial.plane(z_units));
        depths.fill(-FAR_MM);
        let rows = depths.chunks_exact_mut(self.xs.len()).zip(spans);
        for (y, (depths, span)) in rows.enumerate() {
            let y_units = offset(y, 1);
            let square: [f64; 3] = row(&square, y_units);
            *span = self.span(square);
            let [from, to] = *span;
            if from == to {
                continue;
            }
            let terms = RowTerms {
                even: row::<7>(&even, y_units).map(|c| c as f32),
                odd: row::<6>(&odd, y_units).map(|c| c as f32),
                square: square.map(|c| c as f32),
                across: (z_units * z_units + y_units * y_units) as f32,
            };
            self.fill_row(&terms, &self.xs[from..to], &mut depths[from..to]);
        }
        if z == self.half[0] {
            // No ray leads to the centre itself.
            let deep = self.surface.shortest_mm * (1.0 + self.surface.extremes[0]);
            depths[self.half[1] * self.xs.len() + self.half[2]] = deep as f32;
        }
    }

    /// Returns the voxels of a row that are not far outside, from and below.
    fn span(&self, [c, b, a]: [f64; 3]) -> [usize; 2] {
        let discriminant = b * b - 4.0 * a * (c - self.outer);
        if discriminant <= 0.0 {
            return [0, 0];
        }
        let root = discriminant.sqrt();
        let voxel = |x: f64| x / self.step[2] + self.half[2] as f64;
        let [from, to] = [voxel((-b - root) / (2.0 * a)), voxel((-b + root) / (2.0 * a))];
        let from = (from.max(0.0) as usize).min(self.xs.len());
        [from, (to.max(0.0) as usize + 2).clamp(from, self.xs.len())]
    }

    fn fill_row(&self, terms: &RowTerms, xs: &[f32], depths: &mut [f32]) {
        let [low, high] = self.surface.extremes.map(|change| change as f32);
        let unit_mm = self.surface.unit_mm as f32;
        let (e, o, s, across) = (terms.even, terms.odd, terms.square, terms.across);
        for (depth, x) in depths.iter_mut().zip(xs) {
            let x = *x;
            let squared = (s[2] * x + s[1]) * x + s[0];
            let even = (((((e[6] * x + e[5]) * x + e[4]) * x + e[3]) * x + e[2]) * x + e[1]) * x + e[0];
            let odd = ((((o[5] * x + o[4]) * x + o[3]) * x + o[2]) * x + o[1]) * x + o[0];
            let per_squared = 1.0 / squared;
            let k = squared.sqrt();
            let per_k = k * per_squared;
            let change = (even * per_k + odd) * (per_squared * per_squared * per_k);
            let change = if change > low { change } else { low };
            let change = if change < high { change } else { high };
            let ray = ((x * x + across) * per_squared).sqrt();
            let along = (1.0 + change - k) * ray * unit_mm;
            *depth = if along > -FAR_MM { along } else { -FAR_MM };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lesion::{LesionForm, Shape, ShapeRequest};
    use crate::rng::{Purpose, Rng};

    #[test]
    fn polynomials_are_the_shape_voxel_by_voxel() {
        let form = LesionForm {
            elongation: 3.0,
            ..LesionForm::default()
        };
        for (key, diameter_mm, spacing_mm) in [(1, 6.0, [1.5; 3]), (2, 30.0, [2.0, 1.0, 3.0]), (3, 90.0, [5.0; 3])] {
            let request = ShapeRequest {
                diameter_mm,
                form: &form,
            };
            let shape = Shape::draw(&request, &mut Rng::keyed(key, 0, 0, Purpose::Test));
            let surface = shape.surface();
            let half = spacing_mm.map(|mm| ((shape.reach_mm() + 7.0) / mm) as usize);
            let grid = SurfaceGrid::new(&surface, half, spacing_mm);
            let width = 2 * half[2] + 1;
            let mut depths = vec![0.0; (2 * half[1] + 1) * width];
            let mut spans = vec![[0; 2]; 2 * half[1] + 1];
            let mut near = 0;
            for z in 0..=2 * half[0] {
                grid.fill(z, &mut depths, &mut spans);
                for (i, depth) in depths.iter().enumerate() {
                    let at = [z, i / width, i % width];
                    let offset_mm =
                        std::array::from_fn(|axis| (at[axis] as f64 - half[axis] as f64) * spacing_mm[axis]);
                    let wanted = shape.radial_depth(offset_mm).max(-f64::from(FAR_MM));
                    // Single precision keeps some six digits of the sum of 49 terms, which cancel in part.
                    let tolerance = 1e-5 * (diameter_mm + wanted.abs());
                    assert!(
                        (f64::from(*depth) - wanted).abs() < tolerance,
                        "{at:?}: {depth} {wanted}"
                    );
                    near += usize::from(wanted.abs() < 2.0);
                }
            }
            assert!(near > 100, "{near} voxels near the surface");
        }
    }
}
