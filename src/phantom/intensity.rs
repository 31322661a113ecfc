//! What the phantom's tissues measure in HU, before and after the scanner.

use super::canvas::{Canvas, TISSUES, Tissue};
use super::field::{blur, smooth_field, white_noise};
use super::{Phase, Scanner};
use crate::rng::Rng;
use crate::volume::AIR_HU;

/// One patient's mean HU per tissue in one contrast phase.
pub(super) struct Intensities([f32; TISSUES]);

impl Intensities {
    /// Draws a patient.
    pub(super) fn draw(phase: Phase, rng: &mut Rng) -> Self {
        let mut table = [0.0; TISSUES];
        let mut set = |tissue: Tissue, low: f64, high: f64| table[tissue as usize] = rng.range(low, high) as f32;
        set(Tissue::Air, -1000.0, -995.0);
        set(Tissue::Skin, 20.0, 50.0);
        set(Tissue::Fat, -112.0, -100.0);
        set(Tissue::Cavity, -108.0, -92.0);
        set(Tissue::OrganFat, -105.0, -90.0);
        set(Tissue::Lung, -870.0, -780.0);
        set(Tissue::Cortical, 380.0, 620.0);
        set(Tissue::Disc, 70.0, 110.0);
        set(Tissue::Canal, 20.0, 40.0);
        set(Tissue::Fluid, 2.0, 28.0);
        set(Tissue::Stool, -60.0, 60.0);
        set(Tissue::Gas, -960.0, -880.0);
        set(Tissue::Bile, 2.0, 18.0);
        set(Tissue::Cyst, -2.0, 16.0);
        let enhanced: [(Tissue, [f64; 4]); 13] = [
            (Tissue::Muscle, [55.0, 70.0, 42.0, 58.0]),
            (Tissue::Trabecular, [140.0, 230.0, 120.0, 210.0]),
            (Tissue::Liver, [100.0, 120.0, 50.0, 65.0]),
            (Tissue::LiverPortal, [145.0, 178.0, 38.0, 45.0]),
            (Tissue::LiverVein, [140.0, 170.0, 38.0, 45.0]),
            (Tissue::Pancreas, [90.0, 110.0, -10.0, 45.0]),
            (Tissue::Duct, [25.0, 55.0, -10.0, 15.0]),
            (Tissue::Cortex, [168.0, 200.0, 24.0, 35.0]),
            (Tissue::Medulla, [126.0, 158.0, 18.0, 29.0]),
            (Tissue::Spleen, [110.0, 130.0, 40.0, 55.0]),
            (Tissue::Wall, [65.0, 100.0, 30.0, 45.0]),
            (Tissue::Vein, [145.0, 178.0, 36.0, 45.0]),
            (Tissue::Artery, [140.0, 172.0, 36.0, 45.0]),
        ];
        for (tissue, [portal_low, portal_high, plain_low, plain_high]) in enhanced {
            match phase {
                Phase::Portal => set(tissue, portal_low, portal_high),
                Phase::NonContrast => set(tissue, plain_low, plain_high),
            }
        }
        Self(table)
    }

    /// Returns the mean of a tissue.
    pub(super) fn of(&self, tissue: Tissue) -> f32 {
        self.0[tissue as usize]
    }

    /// Returns the mottled HU of every voxel.
    pub(super) fn paint(&self, canvas: &Canvas, rng: &mut Rng) -> Vec<f32> {
        let coarse = smooth_field(&canvas.frame, 26.0, rng);
        let fine = smooth_field(&canvas.frame, 7.0, rng);
        let mottle = rng.range(3.0, 7.0) as f32;
        let amplitude: [f32; TISSUES] = std::array::from_fn(|tissue| match tissue {
            t if t == Tissue::Air as usize || t == Tissue::Cyst as usize => 0.0,
            t if t == Tissue::Stool as usize => 40.0,
            t if t == Tissue::Trabecular as usize => 25.0,
            t if t == Tissue::Pancreas as usize => mottle * 1.6,
            t if t == Tissue::Fat as usize || t == Tissue::Cavity as usize => 5.0,
            _ => mottle,
        });
        let voxels = canvas.tissue.iter().zip(coarse.iter().zip(&fine));
        voxels
            .map(|(tissue, (coarse, fine))| {
                let tissue = *tissue as usize;
                self.0[tissue] + amplitude[tissue] * (0.75 * coarse + 0.65 * fine)
            })
            .collect()
    }
}

/// How a scanner renders: blur in mm along (z, y = x), noise in HU, its correlation in mm along (z, y = x), and its
/// calibration error in HU.
struct Rendering {
    blur_mm: [f32; 2],
    noise_hu: f32,
    correlation_mm: [f32; 2],
    offset_hu: f32,
}

impl Rendering {
    fn of(scanner: Scanner) -> Self {
        let (blur_mm, noise_hu, correlation_mm, offset_hu) = match scanner {
            Scanner::A => ([0.9, 0.8], 19.0, [0.6, 0.6], 2.0),
            Scanner::B => ([1.6, 1.5], 10.0, [1.5, 1.5], -3.0),
            Scanner::C => ([1.3, 1.1], 14.0, [1.2, 0.9], 5.0),
            // A 3 mm reconstruction resampled to finer slices.
            Scanner::D => ([2.4, 1.7], 9.0, [2.4, 1.8], -6.0),
            Scanner::E => ([2.0, 1.0], 16.0, [2.0, 0.7], 9.0),
        };
        Self {
            blur_mm,
            noise_hu,
            correlation_mm,
            offset_hu,
        }
    }
}

/// Turns ideal HU into what a scanner delivers: blurred, noisy, slightly off, integer.
pub(super) fn scan(canvas: &Canvas, mut ideal: Vec<f32>, scanner: Scanner, rng: &mut Rng) -> Vec<i16> {
    let rendering = Rendering::of(scanner);
    let frame = &canvas.frame;
    let vary = rng.range(0.85, 1.15) as f32;
    let in_voxels = |[z, plane]: [f32; 2]| {
        let [sz, sy, sx] = frame.spacing_mm;
        [z * vary / sz, plane * vary / sy, plane * vary / sx]
    };
    blur(&mut ideal, frame.shape, in_voxels(rendering.blur_mm));
    let mut noise = white_noise(frame.voxels(), rng);
    let remaining = blur(&mut noise, frame.shape, in_voxels(rendering.correlation_mm));
    let gain = rendering.noise_hu * rng.range(0.85, 1.15) as f32 / remaining;
    let offset = rendering.offset_hu + rng.range(-2.0, 2.0) as f32;
    ideal
        .iter()
        .zip(&noise)
        .map(|(hu, noise)| (hu + gain * noise + offset).clamp(f32::from(AIR_HU), 3071.0).round() as i16)
        .collect()
}
