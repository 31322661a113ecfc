//! What a stream yields: a patch with its labels and its provenance (promise P4).

use ndarray::Array3;
use serde::{Deserialize, Serialize};

use super::encoded::Encoded;
use crate::sampler::Pool;
use crate::volume::{Affine, ClassSet, ContrastBin, Region, SizeClass};

/// How a patch came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing was synthesized: the patch is of the labelled-real pool.
    Real,
    /// A synthesized lesion passed the gate, or the gate is off.
    Accepted,
    /// No attempt passed; the host is served untouched.
    HealthyAfterK,
    /// No attempt passed; the best is served.
    BestAfterK,
    /// No attempt passed; a labelled-real patch is served.
    RealAfterK,
    /// The organ has no place for the requested lesion; the host is served untouched.
    Unplaceable,
}

/// The gate's scores of one lesion, each in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateScores {
    /// Share of the lesion that the critic calls tumour of its organ.
    pub recall: f64,
    /// Share of the critic's new tumour voxels around the lesion that lie on it.
    pub precision: f64,
    /// Share of the lesion's place that the critic called tumour before.
    pub before: f64,
    /// Thresholds that applied.
    pub recall_threshold: f64,
    /// Thresholds that applied.
    pub precision_threshold: f64,
    /// How real the discriminator had to find it; nothing where the recipe did not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub realism_threshold: Option<f64>,
}

/// One synthesized lesion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LesionMeta {
    /// The number in `lesion_instance`, from 1.
    pub instance: u8,
    /// The organ's name.
    pub organ: String,
    /// Centre in the case's voxels (z, y, x), before augmentation.
    pub centre: [i64; 3],
    /// The requested size class; of a copied tumour its own.
    pub size: SizeClass,
    /// The requested contrast bin; of a copied tumour its own.
    pub contrast: ContrastBin,
    /// Equivalent-sphere diameter in mm after clipping.
    pub diameter_mm: f64,
    /// Semi-axes before deformation and clipping, in mm.
    pub radii_mm: [f64; 3],
    /// Requested contrast in HU: of a generator with `contrast_over = "lesion"` that of the lesion's mean, of others where the mask is full, so that
    /// their mean falls short by what the soft edge takes. The published generator is not told.
    pub requested_hu: f64,
    /// Mean inside minus mean of the healthy organ within 10 mm, in HU.
    pub realised_hu: f64,
    /// Absent where the gate is off.
    pub gate: Option<GateScores>,
    /// Mean over the lesion of how probably real rather than painted the discriminator finds it; absent without a discriminator.
    pub discriminator: Option<f64>,
}

/// Where a patch comes from and how it came about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PatchMeta {
    /// The patch's position in the stream.
    pub index: u64,
    /// The case's id.
    pub case: String,
    /// The index's pool.
    pub pool: Pool,
    /// The index's organ.
    pub organ: String,
    /// The crop in the case's voxels, before augmentation.
    pub region: Region,
    /// From the patch's (z, y, x) indices to RAS mm, after augmentation.
    pub affine: Affine,
    /// How it came about.
    pub outcome: Outcome,
    /// Attempts made; 0 where nothing was to be synthesized.
    pub attempts: u32,
    /// Attempts with a recognised lesion whose place the critic had called tumour before (`host_suspect`).
    pub host_suspect: u32,
    /// Voxels that `unlabelled_negatives` turned into *ignore*, before augmentation.
    pub ignored_voxels: u32,
    /// Who made the case's labels: empty for annotators, `pseudo:` and a model's hash for a model.
    pub labels_by: String,
    /// Whether a gate score was so near its threshold that another numerics class might decide otherwise.
    pub borderline: bool,
    /// The lesions in the patch.
    pub lesions: Vec<LesionMeta>,
    /// Why the patch could not be made; its tensors are then zeros.
    pub failed: Option<String>,
    /// What was asked of a host, for those who count; not sent.
    #[serde(skip)]
    pub asked: Option<Asked>,
}

/// What was asked of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The size class.
    pub size: SizeClass,
    /// The contrast bin.
    pub contrast: ContrastBin,
    /// Lesions that the gate refused.
    pub refused: u32,
}

/// A patch of a stream, on integers; windowing and compression happen at encode.
#[derive(Clone, Debug)]
pub struct StreamedPatch {
    /// Provenance.
    pub meta: PatchMeta,
    /// HU, `[D, H, W]`.
    pub image: Array3<i16>,
    /// Label ids, 255 where the voxel cannot be decided, `[D, H, W]`.
    pub label: Array3<u8>,
    /// The untouched host under the same augmentation, in HU.
    pub source: Array3<i16>,
    /// The lesions' soft mask in 1/255; the label is tumour exactly where it is at least 128.
    pub soft_mask: Array3<u8>,
    /// The lesion a voxel belongs to, from 1.
    pub lesion_instance: Array3<u8>,
    /// What is known of voxels that are sent as 255, where a case was annotated for some classes only.
    pub undecided: Option<Undecided>,
    /// Its tensors, where somebody who sent it left them for another who holds it.
    pub encoded: Encoded,
}

/// Where nobody looked for a class, a voxel may be one of several: frames say 255, trainings in this process may know more.
#[derive(Clone, Debug)]
pub struct Undecided {
    /// Labels of the voxels, those from [`Undecided::FIRST`] on being places in `sets`, `[D, H, W]`.
    pub(super) codes: Array3<u8>,
    /// Sets of classes.
    pub(super) sets: Vec<ClassSet>,
}

impl Undecided {
    /// The code of the first set: classes have smaller ids.
    pub(super) const FIRST: u8 = 64;
}

impl StreamedPatch {
    /// Returns the classes that each voxel may have, `[D, H, W]`; those of `all` where nothing is known.
    pub fn admissible(&self, all: ClassSet) -> Array3<ClassSet> {
        let (codes, sets) = match &self.undecided {
            Some(Undecided { codes, sets }) => (codes, sets.as_slice()),
            None => (&self.label, [].as_slice()),
        };
        codes.mapv(|code| match code.checked_sub(Undecided::FIRST) {
            None => ClassSet::of(code),
            Some(place) => sets.get(usize::from(place)).copied().unwrap_or(all),
        })
    }
}
