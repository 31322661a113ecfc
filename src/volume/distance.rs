//! The exact Euclidean distance transform, in millimetres, on anisotropic grids.

use ndarray::{Array3, ArrayView3, Axis, s};

/// Returns the squared distance in mm^2 from every voxel to the nearest true one; infinite where none is true.
///
/// # Source
/// Felzenszwalb and Huttenlocher, "Distance Transforms of Sampled Functions" (2012): one lower envelope of parabolas
/// per line and axis. Sums, products and one division of f64: the same on every platform.
pub fn squared_distance_mm(targets: ArrayView3<bool>, spacing_mm: [f64; 3]) -> Array3<f64> {
    let mut field = targets.mapv(|is_target| if is_target { 0.0 } else { f64::INFINITY });
    for axis in [2, 1, 0] {
        let side = field.len_of(Axis(axis));
        let mut envelope = Envelope::new(side, spacing_mm[axis]);
        for mut line in field.lanes_mut(Axis(axis)) {
            envelope.values.clear();
            envelope.values.extend(line.iter());
            envelope.build();
            envelope.sample(line.iter_mut());
        }
    }
    field
}

/// Returns the voxels at most `radius_mm` from a mask (1 inside), by distance between voxel centres.
///
/// The work is bounded by the mask's own box and the radius, whatever the size of the volume.
pub fn dilated(mask: &Array3<u8>, spacing_mm: [f64; 3], radius_mm: f64) -> Array3<bool> {
    let shape: [usize; 3] = mask.dim().into();
    let mut out = Array3::from_elem(shape, false);
    let (mut low, mut high) = (shape, [0; 3]);
    for ((z, y, x), _) in mask.indexed_iter().filter(|(_, inside)| **inside != 0) {
        for (axis, at) in [z, y, x].into_iter().enumerate() {
            low[axis] = low[axis].min(at);
            high[axis] = high[axis].max(at + 1);
        }
    }
    if low == shape {
        return out;
    }
    for axis in 0..3 {
        let reach = libm::ceil(radius_mm / spacing_mm[axis]) as usize;
        low[axis] = low[axis].saturating_sub(reach);
        high[axis] = high[axis].saturating_add(reach).min(shape[axis]);
    }
    let near = s![low[0]..high[0], low[1]..high[1], low[2]..high[2]];
    let squared = squared_distance_mm(mask.slice(near).mapv(|inside| inside != 0).view(), spacing_mm);
    let limit = squared_limit(radius_mm);
    out.slice_mut(near).assign(&squared.mapv(|squared| squared <= limit));
    out
}

/// Returns the square in mm^2 up to which a distance counts as within a radius: a hair more, so that no rounding loses
/// a voxel that lies on the radius.
pub(super) fn squared_limit(radius_mm: f64) -> f64 {
    radius_mm * radius_mm * (1.0 + 1e-9)
}

/// The lower envelope of the parabolas of one line, reused from line to line.
struct Envelope {
    spacing: f64,
    values: Vec<f64>,
    /// Apexes of the parabolas on the envelope, and where each takes over, in mm.
    apexes: Vec<(usize, f64)>,
}

impl Envelope {
    fn new(side: usize, spacing: f64) -> Self {
        Self {
            spacing,
            values: Vec::with_capacity(side),
            apexes: Vec::with_capacity(side),
        }
    }

    fn build(&mut self) {
        self.apexes.clear();
        for q in 0..self.values.len() {
            // Infinite parabolas never touch the envelope.
            if self.values[q] == f64::INFINITY {
                continue;
            }
            let mut from = f64::NEG_INFINITY;
            while let Some(&(p, takes_over)) = self.apexes.last() {
                from = self.crossing(p, q);
                if from > takes_over {
                    break;
                }
                self.apexes.pop();
                from = f64::NEG_INFINITY;
            }
            self.apexes.push((q, from));
        }
    }

    /// Returns where the parabola of apex `q` falls below that of the earlier apex `p`.
    fn crossing(&self, p: usize, q: usize) -> f64 {
        let (at_p, at_q) = (p as f64 * self.spacing, q as f64 * self.spacing);
        let (height_p, height_q) = (self.values[p] + at_p * at_p, self.values[q] + at_q * at_q);
        (height_q - height_p) / (2.0 * (at_q - at_p))
    }

    fn sample<'a>(&self, line: impl Iterator<Item = &'a mut f64>) {
        if self.apexes.is_empty() {
            return;
        }
        let mut k = 0;
        for (i, value) in line.enumerate() {
            let at = i as f64 * self.spacing;
            while self.apexes.get(k + 1).is_some_and(|(_, from)| *from < at) {
                k += 1;
            }
            let apex = self.apexes[k].0;
            let away = (i as f64 - apex as f64) * self.spacing;
            *value = away * away + self.values[apex];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng};

    #[test]
    fn distances_equal_the_naive_search() {
        let mut rng = Rng::keyed(3, 0, 0, Purpose::Test);
        for spacing in [[1.0, 1.0, 1.0], [5.0, 0.8, 1.5]] {
            let targets = Array3::from_shape_fn((7, 9, 8), |_| rng.chance(0.03));
            let got = squared_distance_mm(targets.view(), spacing);
            for ((z, y, x), distance) in got.indexed_iter() {
                let naive = targets
                    .indexed_iter()
                    .filter(|(_, is_target)| **is_target)
                    .map(|((tz, ty, tx), _)| {
                        let away = [tz as f64 - z as f64, ty as f64 - y as f64, tx as f64 - x as f64];
                        (0..3).map(|axis| (away[axis] * spacing[axis]).powi(2)).sum::<f64>()
                    })
                    .fold(f64::INFINITY, f64::min);
                // Rounding of a handful of f64 operations.
                assert!((distance - naive).abs() < 1e-9, "{z} {y} {x}: {distance} {naive}");
            }
        }
        let none = squared_distance_mm(Array3::from_elem((2, 2, 2), false).view(), [1.0; 3]);
        assert!(none.iter().all(|distance| *distance == f64::INFINITY));
    }
    #[test]
    fn a_mask_grows_by_its_radius_and_no_more() {
        let mut rng = Rng::keyed(4, 0, 0, Purpose::Test);
        let mask = Array3::from_shape_fn((9, 11, 10), |_| u8::from(rng.chance(0.02)));
        for (spacing_mm, radius_mm) in [([1.0; 3], 3.0), ([5.0, 0.8, 1.5], 6.0), ([2.0, 1.0, 1.0], 0.5)] {
            let squared = squared_distance_mm(mask.mapv(|inside| inside != 0).view(), spacing_mm);
            let expected = squared.mapv(|squared| squared <= radius_mm * radius_mm + 1e-6);
            assert_eq!(dilated(&mask, spacing_mm, radius_mm), expected);
        }
        assert!(
            !dilated(&Array3::zeros((3, 3, 3)), [1.0; 3], 9.0)
                .iter()
                .any(|inside| *inside)
        );
    }
}
