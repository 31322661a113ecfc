//! What the phantom is painted on: a tissue and a label per voxel, and a smoothly bent coordinate system.

use super::field::{Frame, Point, smooth_field};
use crate::rng::Rng;

/// What a voxel consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Tissue {
    Air,
    Skin,
    Fat,
    Muscle,
    /// Fat of the abdominal cavity that no organ has claimed yet.
    Cavity,
    /// Fat of the cavity that stays fat: around kidneys and in hila.
    OrganFat,
    Lung,
    Cortical,
    Trabecular,
    Disc,
    Canal,
    Liver,
    LiverPortal,
    LiverVein,
    Pancreas,
    Duct,
    Cortex,
    Medulla,
    Spleen,
    Wall,
    Fluid,
    Stool,
    Gas,
    Vein,
    Artery,
    Bile,
    Cyst,
    /// A benign nodule.
    Nodule,
}

impl Tissue {
    /// Tells whether a tumour spares it.
    pub(super) fn is_benign(self) -> bool {
        matches!(self, Self::Cyst | Self::Nodule)
    }
}

/// How many tissues there are.
pub(super) const TISSUES: usize = Tissue::Nodule as usize + 1;

/// The phantom under construction.
pub(super) struct Canvas {
    pub(super) frame: Frame,
    pub(super) tissue: Vec<Tissue>,
    pub(super) labels: Vec<u8>,
    /// Size of the patient relative to the nominal one.
    pub(super) scale: f32,
    bend: [Vec<f32>; 3],
}

impl Canvas {
    /// Starts with air and draws how this patient's anatomy is bent.
    pub(super) fn new(frame: Frame, scale: f32, rng: &mut Rng) -> Self {
        // Amplitude and width of the bending, in mm: enough to change every organ's form, too little to fold space.
        const AMPLITUDE_MM: f32 = 5.5;
        const WIDTH_MM: f32 = 42.0;
        let bend = [(); 3].map(|()| {
            let mut field = smooth_field(&frame, WIDTH_MM, rng);
            field.iter_mut().for_each(|v| *v *= AMPLITUDE_MM);
            field
        });
        Self {
            frame,
            tissue: vec![Tissue::Air; frame.voxels()],
            labels: vec![0; frame.voxels()],
            scale,
            bend,
        }
    }

    /// Calls `f` with every voxel of a box in nominal mm and its bent nominal position.
    pub(super) fn visit(&mut self, (low, high): (Point, Point), mut f: impl FnMut(&mut Tissue, &mut u8, Point)) {
        // Bending moves voxels by up to four of its standard deviations.
        let margin = 14.0;
        let grow = |mm: Point, by: f32| mm.map(|v| v * self.scale + by);
        let (frame, scale, bend) = (self.frame, self.scale, &self.bend);
        let (tissue, labels) = (&mut self.tissue, &mut self.labels);
        frame.visit(grow(low, -margin), grow(high, margin), |i, p| {
            let bent = std::array::from_fn(|axis| (p[axis] + bend[axis][i]) / scale);
            f(&mut tissue[i], &mut labels[i], bent);
        });
    }

    /// Sets every voxel's tissue from its nominal position, bent less than the organs are.
    pub(super) fn paint_whole(&mut self, tissue: impl Fn(Point) -> Tissue) {
        // Organs are soft, the wall is not: at full bending the skin shows dents.
        const STIFF: f32 = 0.35;
        let (frame, scale, bend, there) = (self.frame, self.scale, &self.bend, &mut self.tissue);
        frame.visit([-1e5; 3], [1e5; 3], |i, p| {
            there[i] = tissue(std::array::from_fn(|axis| (p[axis] + STIFF * bend[axis][i]) / scale));
        });
    }

    /// Paints a solid into the free part of the cavity.
    pub(super) fn paint(&mut self, bounds: (Point, Point), tissue: Tissue, inside: impl Fn(Point) -> bool) {
        self.visit(bounds, |there, _, p| {
            if *there == Tissue::Cavity && inside(p) {
                *there = tissue;
            }
        });
    }

    /// Grows a solid in the free part of the cavity until it has `volume_ml`, keeps the piece around its deepest voxel,
    /// and returns that piece's voxels with their depth.
    ///
    /// `depth` is about the distance to the nominal surface in mm, positive inside; the surface is moved out or in by
    /// up to `give_mm` to reach the volume.
    pub(super) fn grow(
        &self,
        bounds: (Point, Point),
        volume_ml: f32,
        give_mm: f32,
        depth: impl Fn(Point) -> f32,
    ) -> Vec<(usize, f32)> {
        let margin = 14.0 + give_mm;
        let mut found = Vec::new();
        let low = bounds.0.map(|v| v * self.scale - margin);
        let high = bounds.1.map(|v| v * self.scale + margin);
        self.frame.visit(low, high, |i, p| {
            if self.tissue[i] == Tissue::Cavity {
                let bent = std::array::from_fn(|axis| (p[axis] + self.bend[axis][i]) / self.scale);
                let d = depth(bent);
                if d > -give_mm {
                    found.push((i, d));
                }
            }
        });
        let wanted = ((volume_ml * 1000.0 / self.frame.voxel_mm3()) as usize).min(found.len());
        if wanted < found.len() {
            found.select_nth_unstable_by(wanted, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            found.truncate(wanted);
        }
        self.piece_of_deepest(found)
    }

    /// Returns the nominal position of a voxel after bending.
    pub(super) fn nominal(&self, i: usize) -> Point {
        let p = self.frame.position(self.frame.voxel(i));
        std::array::from_fn(|axis| (p[axis] + self.bend[axis][i]) / self.scale)
    }

    /// Keeps what is face-connected to the deepest voxel.
    fn piece_of_deepest(&self, mut found: Vec<(usize, f32)>) -> Vec<(usize, f32)> {
        found.sort_unstable_by_key(|(i, _)| *i);
        let Some(deepest) = found
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.1.total_cmp(&b.1.1))
            .map(|(k, _)| k)
        else {
            return found;
        };
        // Only the box's voxels matter; a lookup over the grid is cheaper than a search in the sorted list.
        let first = found[0].0;
        let mut place = vec![u32::MAX; found[found.len() - 1].0 - first + 1];
        for (k, (i, _)) in found.iter().enumerate() {
            place[i - first] = k as u32;
        }
        let mut queue = vec![deepest];
        place[found[deepest].0 - first] = u32::MAX;
        let mut piece = Vec::with_capacity(found.len());
        while let Some(k) = queue.pop() {
            piece.push(found[k]);
            self.frame.neighbours(found[k].0, |_, next| {
                if let Some(slot) = next.checked_sub(first).and_then(|at| place.get_mut(at))
                    && *slot != u32::MAX
                {
                    queue.push(*slot as usize);
                    *slot = u32::MAX;
                }
            });
        }
        piece.sort_unstable_by_key(|(i, _)| *i);
        piece
    }
}
