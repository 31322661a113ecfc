//! What happens to a scan on its way through the world.

use freetumor::rng::{Purpose, Rng};
use freetumor::volume::resample::{resample_image, resampled_grid};
use freetumor::volume::{Affine, Fingerprint, Grid};
use ndarray::{Array3, Axis, s};

/// Voxels (z, y, x) and their size.
#[derive(Clone)]
pub struct Scan {
    pub voxels: Array3<i16>,
    pub spacing_mm: [f64; 3],
}

/// A scan that was saved differently.
pub struct Change {
    pub name: &'static str,
    pub scan: Scan,
}

impl Scan {
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.voxels.view(), self.spacing_mm)
    }

    fn map(&self, change: impl FnMut(i16) -> i16) -> Self {
        Self {
            voxels: self.voxels.mapv(change),
            ..*self
        }
    }

    fn flipped(&self, axes: &[usize]) -> Self {
        let mut voxels = self.voxels.clone();
        axes.iter().for_each(|axis| voxels.invert_axis(Axis(*axis)));
        Self {
            voxels: voxels.as_standard_layout().into_owned(),
            ..*self
        }
    }

    /// Exchanges axes, as a header without orientation does.
    fn turned(&self, order: [usize; 3]) -> Self {
        Self {
            voxels: self
                .voxels
                .clone()
                .permuted_axes(order)
                .as_standard_layout()
                .into_owned(),
            spacing_mm: order.map(|axis| self.spacing_mm[axis]),
        }
    }

    fn without_spacing(self) -> Self {
        Self {
            spacing_mm: [1.0; 3],
            ..self
        }
    }

    /// Keeps the planes between two shares of the height.
    pub fn part(&self, from: f64, to: f64) -> Self {
        let depth = self.voxels.dim().0 as f64;
        let (from, to) = ((from * depth) as usize, (to * depth) as usize);
        Self {
            voxels: self.voxels.slice(s![from..to, .., ..]).to_owned(),
            ..*self
        }
    }

    fn resampled(&self, spacing_mm: [f64; 3]) -> Self {
        let from = Grid {
            shape: self.voxels.dim().into(),
            affine: Affine::axis_aligned(self.spacing_mm, [0.0; 3]),
        };
        Self {
            voxels: resample_image(&self.voxels, &from, &resampled_grid(&from, spacing_mm)),
            spacing_mm,
        }
    }

    /// Cuts away the rows and columns beside the body.
    fn cropped(&self) -> Self {
        let (depth, rows, columns) = self.voxels.dim();
        let mut counts = [vec![0; rows], vec![0; columns]];
        for ((_, y, x), hu) in self.voxels.indexed_iter() {
            counts[0][y] += usize::from(*hu > -200);
            counts[1][x] += usize::from(*hu > -200);
        }
        let [rows, columns] = counts.map(|counts| {
            let holds = |count: &usize| *count > 3 * depth;
            let first = counts.iter().position(holds).unwrap_or(0).saturating_sub(2);
            let last = counts.iter().rposition(holds).unwrap_or(counts.len() - 1);
            first..(last + 3).min(counts.len())
        });
        Self {
            voxels: self.voxels.slice(s![.., rows, columns]).to_owned(),
            ..*self
        }
    }

    /// Adds noise of up to `step` HU and keeps multiples of `step`, as lossy compression does.
    fn rounded(&self, step: i16) -> Self {
        let mut rng = Rng::keyed(u64::from(step.unsigned_abs()), 0, 0, Purpose::Test);
        self.map(|hu| {
            let noise = rng.below(2 * step as usize + 1) as i16 - step;
            (hu + noise + step / 2).div_euclid(step) * step
        })
    }
}

/// Returns what a scan may have become, every kind of it once.
pub fn changes(scan: &Scan) -> Vec<Change> {
    let clip = |low: i16, high: i16| scan.map(|hu| hu.clamp(low, high));
    let all = scan.resampled([1.5; 3]).cropped().part(0.25, 0.75).flipped(&[0]);
    let changes = [
        ("header only, axis flipped: z", scan.flipped(&[0])),
        ("header only, axis flipped: x", scan.flipped(&[2])),
        ("header only, axes flipped: z, y", scan.flipped(&[0, 1])),
        ("axes exchanged, their spacings along", scan.turned([2, 1, 0])),
        (
            "axes exchanged, spacing lost to 1 mm",
            scan.turned([2, 0, 1]).without_spacing(),
        ),
        ("spacing lost to 1 mm", scan.clone().without_spacing()),
        (
            "spacing lost to 1 mm, upper half",
            scan.part(0.5, 1.0).without_spacing(),
        ),
        ("cropped to the body in plane", scan.cropped()),
        ("lower half", scan.part(0.0, 0.5)),
        ("upper half", scan.part(0.5, 1.0)),
        ("middle 40 %", scan.part(0.25, 0.65)),
        ("clipped to -175..250 HU", clip(-175, 250)),
        ("clipped to -160..240 HU", clip(-160, 240)),
        ("clipped to -100..240 HU", clip(-100, 240)),
        ("+1024, at least 0", scan.map(|hu| hu.saturating_add(1024).max(0))),
        ("clipped to -175..250 HU, +1024", clip(-175, 250).map(|hu| hu + 1024)),
        ("resampled to 1 mm", scan.resampled([1.0; 3])),
        ("resampled to 1.5 mm", scan.resampled([1.5; 3])),
        ("resampled to 2 mm", scan.resampled([2.0; 3])),
        ("resampled to 3 mm", scan.resampled([3.0; 3])),
        ("resampled to 5 x 0.8 x 0.8 mm", scan.resampled([5.0, 0.8, 0.8])),
        ("rounded to 8 HU with noise", scan.rounded(8)),
        ("rounded to 30 HU with noise", scan.rounded(30)),
        (
            "1.5 mm, cropped, half, upside down, clipped",
            all.map(|hu| hu.clamp(-175, 250)),
        ),
    ];
    changes.into_iter().map(|(name, scan)| Change { name, scan }).collect()
}
