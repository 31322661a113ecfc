//! Synthetic abdominal CT volumes with labels: the demo's data and the tests' patients, made from a seed.
//!
//! Anatomy is a set of bent solids painted in order, each taking what the earlier ones left free; intensities follow the
//! contrast phase; a scanner blurs, adds correlated noise and shifts. Tumours are grown voxel by voxel and share no code
//! with [`crate::lesion`], so that recognising them is a fair test of synthesis. `docs/phantom.md` has the figures.

mod benign;
mod body;
mod canvas;
mod field;
mod form;
mod intensity;
mod organs;
mod settings;
mod tumours;
mod write;

pub use settings::{ContrastLaw, LesionLaw, PhantomSettings, RimLaw};
pub use write::{case_id, write_cohort, write_store};

use ndarray::Array3;

use crate::rng::{Purpose, Rng};
use crate::volume::{Affine, Grid};
use canvas::{Canvas, Tissue};
use field::Frame;
use intensity::Intensities;

const LIVER: u8 = 1;
const PANCREAS: u8 = 3;
const KIDNEY: u8 = 5;

impl Tissue {
    /// Returns the parenchyma that a voxel's tissue belongs to.
    fn host(self) -> Self {
        match self {
            Self::LiverPortal | Self::LiverVein => Self::Liver,
            Self::Duct => Self::Pancreas,
            Self::Medulla | Self::OrganFat | Self::Cavity => Self::Cortex,
            other => other,
        }
    }
}

/// The scanner a volume was made on: they differ in sharpness, noise and calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scanner {
    /// Sharp and noisy.
    A,
    /// Smooth.
    B,
    /// Between A and B.
    C,
    /// Very smooth, as from thick slices.
    D,
    /// Noisy across, smooth along the body; in no cohort, so that a model can be tested on a scanner that it never saw.
    E,
}

/// The contrast phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Portal venous: organs and vessels enhanced.
    Portal,
    /// Without contrast agent: vessels slightly darker than the liver.
    NonContrast,
}

/// A patient's tumours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tumours {
    /// There are none.
    None,
    /// They are there, and labelled as the tissue around them: nobody looked for them.
    Hidden,
    /// They are there, and labelled.
    Labelled,
}

/// What determines a volume; equal specifications give equal volumes on every machine and any number of threads.
#[derive(Clone, Debug, PartialEq)]
pub struct PhantomSpec {
    /// The cohort's seed.
    pub seed: u64,
    /// The patient's number in the cohort.
    pub index: u64,
    /// The scanner.
    pub scanner: Scanner,
    /// The contrast phase.
    pub phase: Phase,
    /// Whether the patient has tumours, and whether anybody labelled them.
    pub tumours: Tumours,
    /// Voxel size along (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
}

/// A tumour of a phantom.
#[derive(Clone, Debug, PartialEq)]
pub struct PhantomTumour {
    /// Its label id.
    pub label: u8,
    /// Its voxels.
    pub voxels: usize,
    /// One of its voxels (z, y, x).
    pub voxel: [usize; 3],
    /// Equivalent-sphere diameter in mm.
    pub diameter_mm: f64,
    /// Mean inside minus mean of its organ's other voxels within 10 mm of its bounding box, in HU of the finished image.
    pub contrast_hu: f64,
}

/// A volume with its truth.
#[derive(Clone, Debug, PartialEq)]
pub struct PhantomVolume {
    /// Intensities in HU, shape (z, y, x).
    pub image: Array3<i16>,
    /// Label ids of the default plan, shape (z, y, x).
    pub labels: Array3<u8>,
    /// Where the voxels lie.
    pub grid: Grid,
    /// The tumours.
    pub tumours: Vec<PhantomTumour>,
}

/// The first number of a cohort's healthy patients: cohorts of one seed share patients, whatever their sizes.
const FIRST_HEALTHY: usize = 10_000;

/// Returns the specifications of a cohort: labelled patients with tumours on scanners A and B, then patients without
/// tumours on scanners C and D; contrast phases are mixed.
pub fn cohort(seed: u64, labelled: usize, unlabelled: usize) -> Vec<PhantomSpec> {
    PhantomSettings::default().cohort(seed, labelled, unlabelled)
}

impl PhantomSettings {
    /// Returns the specifications of a cohort, as [`cohort`] does.
    pub fn cohort(&self, seed: u64, labelled: usize, unlabelled: usize) -> Vec<PhantomSpec> {
        let patient = |number: usize, tumours: Tumours| PhantomSpec {
            seed,
            index: match tumours {
                Tumours::Labelled => number,
                Tumours::None | Tumours::Hidden => FIRST_HEALTHY + number,
            } as u64,
            scanner: match (tumours, number % 2) {
                (Tumours::Labelled, 0) => Scanner::A,
                (Tumours::Labelled, _) => Scanner::B,
                (_, 0) => Scanner::C,
                (..) => Scanner::D,
            },
            // In step with neither scanner, where every third is plain.
            phase: self.phase(number),
            tumours,
            spacing_mm: [2.0; 3],
        };
        let sick = (0..labelled).map(|number| patient(number, Tumours::Labelled));
        sick.chain((0..unlabelled).map(|number| patient(number, Tumours::None)))
            .collect()
    }
}

/// Makes a volume with the default settings.
pub fn generate(spec: &PhantomSpec) -> PhantomVolume {
    generate_with(&PhantomSettings::default(), spec)
}

/// Makes a volume. Specifications that differ in `tumours` alone give twins: one patient, with and without, and the labels true or not.
pub fn generate_with(settings: &PhantomSettings, spec: &PhantomSpec) -> PhantomVolume {
    let rng = |purpose| Rng::keyed(spec.seed, spec.index, 0, purpose);
    let mut anatomy = rng(Purpose::Phantom);
    let scale = (1.0 + 0.05 * anatomy.normal()).clamp(0.9, 1.1) as f32;
    let frame = frame_for(spec, scale, &mut anatomy);
    let mut canvas = Canvas::new(frame, scale, &mut anatomy);
    body::paint_body(&mut canvas, &mut anatomy);
    organs::paint_organs(&mut canvas, &mut anatomy);
    body::paint_gut(&mut canvas, &mut anatomy);
    benign::paint_cysts(&mut canvas, &mut anatomy);
    let intensities = Intensities::draw(spec.phase, &mut anatomy);
    let mut hu = intensities.paint(&canvas, &mut anatomy);
    benign::paint_patches(&canvas, &mut hu, &mut anatomy);
    let known = (&intensities, spec.phase);
    tumours::paint_nodules(&mut canvas, &mut hu, known, settings, &mut rng(Purpose::PhantomNodule));
    let mut grown = Vec::new();
    if spec.tumours != Tumours::None {
        grown = tumours::paint_tumours(&mut canvas, &mut hu, known, settings, &mut rng(Purpose::PhantomTumour));
    }
    let image = intensity::scan(&canvas, hu, spec.scanner, &mut rng(Purpose::Scanner));
    let tumours = grown.iter().map(|tumour| describe(&canvas, &image, tumour)).collect();
    let shaped = "one value per voxel of the frame";
    let spacing_mm = spec.spacing_mm;
    let origin_mm = [2, 1, 0].map(|axis| f64::from(frame.mm(axis, 0)));
    PhantomVolume {
        image: Array3::from_shape_vec(frame.shape, image).expect(shaped),
        labels: Array3::from_shape_vec(frame.shape, canvas.labels).expect(shaped),
        grid: Grid {
            shape: frame.shape,
            affine: Affine::axis_aligned(spacing_mm, origin_mm),
        },
        tumours,
    }
}

/// Draws a field of view around the patient.
fn frame_for(spec: &PhantomSpec, scale: f32, rng: &mut Rng) -> Frame {
    let margin_mm = rng.range(30.0, 48.0) as f32;
    let extent_mm = [
        192.0 * scale * rng.range(0.97, 1.05) as f32,
        2.0 * body::TRUNK_MM[0] * scale + margin_mm,
        2.0 * body::TRUNK_MM[1] * scale + margin_mm,
    ];
    let spacing_mm = spec.spacing_mm.map(|mm| mm as f32);
    Frame {
        shape: std::array::from_fn(|axis| (extent_mm[axis] / spacing_mm[axis]).round() as usize),
        spacing_mm,
    }
}

/// Measures a tumour in the finished image.
fn describe(canvas: &Canvas, image: &[i16], tumour: &tumours::Grown) -> PhantomTumour {
    const AROUND_MM: f32 = 10.0;
    let frame = &canvas.frame;
    let positions = tumour.voxels.iter().map(|i| frame.position(frame.voxel(*i)));
    let (low, high) = positions.fold(([f32::MAX; 3], [f32::MIN; 3]), |(low, high), p| {
        (
            std::array::from_fn(|axis| low[axis].min(p[axis] - AROUND_MM)),
            std::array::from_fn(|axis| high[axis].max(p[axis] + AROUND_MM)),
        )
    });
    let (mut outside, mut around) = (0.0, 0.0);
    frame.visit(low, high, |i, _| {
        if canvas.labels[i] == tumour.label - 1 {
            outside += f64::from(image[i]);
            around += 1.0;
        }
    });
    let voxels = tumour.voxels.len();
    let inside: f64 = tumour.voxels.iter().map(|i| f64::from(image[*i])).sum();
    let volume_mm3 = voxels as f64 * f64::from(frame.voxel_mm3());
    PhantomTumour {
        label: tumour.label,
        voxels,
        voxel: frame.voxel(tumour.voxels[voxels / 2]),
        diameter_mm: libm::cbrt(volume_mm3 * 6.0 / std::f64::consts::PI),
        contrast_hu: inside / voxels as f64 - outside / f64::max(around, 1.0),
    }
}

#[cfg(test)]
mod tests;
