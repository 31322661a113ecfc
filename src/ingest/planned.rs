//! A scan on the plan's grid, and the way of labels back to the grid of its file.

use std::path::Path;

use ndarray::{Array3, Array4, ArrayView3, Axis, Zip};

use super::files::{patient_of, read_image};
use super::labels::LabelReader;
use super::nifti;
use super::orient::{Oriented, file_order, orient, oriented_grid, source_hash};
use super::pipeline::{body_box, cropped};
use super::regrid::inverse;
use super::{Entry, IngestConfig, IngestError, Preset};
use crate::digest::Digest;
use crate::store::{CaseKind, SourceGeometry};
use crate::volume::resample::{AxisMap, resample_image, resample_values, resampled_grid};
use crate::volume::{AIR_HU, Annotation, BACKGROUND, Fingerprint, Grid, Plan, Region, Shape};

/// A shift this near to whole voxels is whole: rounding of affines.
const WHOLE_VOXELS: f64 = 1e-6;

/// A scan as ingest would store it.
#[derive(Clone, Debug)]
pub struct PlannedScan {
    /// The image in HU, cropped to the body.
    pub image: Array3<i16>,
    /// Its grid.
    pub grid: Grid,
    /// The file's grid.
    pub source: SourceGeometry,
    /// What a user should know of the file.
    pub remarks: Vec<String>,
}

/// Reads a NIfTI file or a DICOM series onto the plan's grid, as ingest does.
///
/// # Errors
/// [`IngestError`] names the file.
pub fn read_planned(path: &Path, plan: &Plan, options: &IngestConfig) -> Result<PlannedScan, IngestError> {
    let (scan, remarks) = read_image(path, options)?;
    PlannedScan::of(path, orient(scan), plan, remarks)
}

impl PlannedScan {
    fn of(path: &Path, image: Oriented<i16>, plan: &Plan, remarks: Vec<String>) -> Result<Self, IngestError> {
        let (resampled, grid) = onto_plan(path, image.voxels, &image.grid, plan)?;
        let nothing = Array3::zeros(grid.shape);
        let body = body_box(&resampled, &nothing, &grid).unwrap_or_else(|| Region::whole(grid.shape));
        Ok(Self {
            image: cropped(&resampled, body),
            grid: Grid {
                shape: body.size,
                affine: grid.affine.shifted(body.start),
            },
            source: image.source,
            remarks,
        })
    }
}

/// A scan as ingest would store it, and the truth about it at the resolution of its file: indices grow towards Superior, Anterior
/// and Right.
#[derive(Clone, Debug)]
pub struct LabelledScan {
    /// What a model sees.
    pub planned: PlannedScan,
    /// The file's image in HU.
    pub image: Array3<i16>,
    /// True label ids of the plan, beside it.
    pub truth: Array3<u8>,
    /// Where both lie.
    pub grid: Grid,
    /// What the annotators looked for.
    pub annotation: Annotation,
    /// Whether tumours are among it.
    pub kind: CaseKind,
    /// Whose scan it is, as far as its files say.
    pub patient: String,
    /// Hash of the scan's voxels.
    pub source_hash: Digest,
    /// By which near-duplicates are found.
    pub fingerprint: Fingerprint,
}

/// Reads an image and its labels; nothing where the entry has none.
///
/// # Errors
/// [`IngestError`] names the file.
pub fn read_labelled(
    entry: &Entry,
    (preset, plan): (&Preset, &Plan),
    options: &IngestConfig,
) -> Result<Option<LabelledScan>, IngestError> {
    let Some(labels) = &entry.labels else {
        return Ok(None);
    };
    let reader = LabelReader::new(preset, plan, options)?;
    let (scan, mut remarks) = read_image(&entry.image, options)?;
    let image = orient(scan);
    let truth = reader.read(labels, &entry.image, &image, &mut remarks)?.voxels;
    let (kind, annotation) = reader.annotation(entry);
    let (voxels, grid) = (image.voxels.clone(), image.grid);
    Ok(Some(LabelledScan {
        patient: entry.patient.clone().map_or_else(|| patient_of(&entry.image), Ok)?,
        source_hash: source_hash(&voxels),
        fingerprint: Fingerprint::of(voxels.view(), grid.spacing_mm()),
        planned: PlannedScan::of(&entry.image, image, plan, remarks)?,
        image: voxels,
        truth,
        grid,
        annotation,
        kind,
    }))
}

/// Resamples an oriented image to the plan's spacing, air no darker than air.
pub(super) fn onto_plan(
    path: &Path,
    mut voxels: Array3<i16>,
    from: &Grid,
    plan: &Plan,
) -> Result<(Array3<i16>, Grid), IngestError> {
    // Scanners pad with -3024, -2048 or -2000: air, before it bleeds into its neighbours by interpolation.
    voxels.mapv_inplace(|hu| hu.max(AIR_HU));
    let grid = resampled_grid(from, plan.spacing_mm);
    if grid.shape.iter().any(|side| *side > nifti::MAX_SIDE) || grid.voxels() > nifti::MAX_VOXELS {
        return Err(IngestError::TooLarge {
            path: path.into(),
            shape: grid.shape,
            spacing_mm: plan.spacing_mm,
        });
    }
    Ok((resample_image(&voxels, from, &grid), grid))
}

/// Brings class probabilities from a grid of the plan back to their file's and takes the likeliest class of every voxel, the
/// lowest id where several are; beyond the grid is background.
///
/// Probabilities are interpolated, not labels: a border may run between two voxels of the plan's grid. Where the file's
/// voxels are much larger they are averaged, as ingest averages images.
///
/// # Shape
/// `[C, D, H, W]` on `grid` -> the file's (k, j, i).
pub fn labels_on_source(probabilities: &Array4<f32>, grid: &Grid, source: &SourceGeometry) -> Array3<u8> {
    file_order(labels_on_grid(probabilities, grid, &oriented_grid(source)), source)
}

/// The same on a grid whose axes are the plan's: a file's, before its voxels are put into its own order.
///
/// # Shape
/// `[C, D, H, W]` on `grid` -> `[D, H, W]` on `file`.
pub fn labels_on_grid(probabilities: &Array4<f32>, grid: &Grid, file: &Grid) -> Array3<u8> {
    let maps = axis_maps(grid, file);
    let mut labels = Array3::from_elem(file.shape, BACKGROUND);
    let mut best = Array3::from_elem(file.shape, f32::NEG_INFINITY);
    for (class, values) in (0_u8..).zip(probabilities.outer_iter()) {
        let values = resample_values(values.as_standard_layout().into_owned(), maps);
        Zip::from(&mut labels)
            .and(&mut best)
            .and(&values)
            .for_each(|label, best, value| {
                if value > best {
                    (*label, *best) = (class, *value);
                }
            });
    }
    clear_outside(&mut labels, maps, grid.shape);
    labels
}

/// Returns for every axis where the voxels of a file lie on a grid with the same axes.
fn axis_maps(grid: &Grid, file: &Grid) -> [AxisMap; 3] {
    // The outer corner of the file's first voxel, in voxels of the grid from its own outer corner.
    let corner = inverse(&grid.affine).to_mm(file.affine.to_mm([-0.5; 3]));
    let (old, new) = (grid.spacing_mm(), file.spacing_mm());
    std::array::from_fn(|axis| {
        let shift = corner[axis] + 0.5;
        let whole = shift.round();
        AxisMap {
            count: file.shape[axis],
            ratio: new[axis] / old[axis],
            shift: if (shift - whole).abs() < WHOLE_VOXELS {
                whole
            } else {
                shift
            },
        }
    })
}

/// Sets to background what lies beyond the grid, where [`resample_values`] goes on with the last value.
fn clear_outside(labels: &mut Array3<u8>, maps: [AxisMap; 3], side: Shape) {
    for (axis, map) in maps.into_iter().enumerate() {
        for (i, mut plane) in labels.axis_iter_mut(Axis(axis)).enumerate() {
            let at = (i as f64 + 0.5) * map.ratio + map.shift;
            if !(0.0..=side[axis] as f64).contains(&at) {
                plane.fill(BACKGROUND);
            }
        }
    }
}

/// Writes labels (k, j, i) on the grid of a file: a NIfTI file's header is taken over bit for bit where it says where voxels
/// lie; without one the affine is written in double precision, as NIfTI-2.
///
/// # Errors
/// [`IngestError`] names the file that cannot be read or written.
pub fn write_on_source(
    path: &Path,
    labels: ArrayView3<u8>,
    source: &SourceGeometry,
    file: Option<&Path>,
) -> Result<(), IngestError> {
    let header = match file.filter(|file| !file.is_dir()) {
        Some(file) => nifti::label_header_like(file)?,
        None => nifti::label_header(source),
    };
    Ok(nifti::write_with_header(path, labels, &header)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file whose axes run to Posterior, Inferior and Left, oblique.
    fn source() -> SourceGeometry {
        let (sine, cosine) = libm::sincos(0.1);
        SourceGeometry {
            shape_xyz: [20, 12, 24],
            affine_xyz: [
                [0.0, 0.0, -2.0, 30.0],
                [-1.5 * cosine, 2.4 * sine, 0.0, 20.0],
                [-1.5 * sine, -2.4 * cosine, 0.0, -5.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            orientation: "PIL".into(),
        }
    }

    #[test]
    fn labels_land_where_they_were() {
        let source = source();
        let file = oriented_grid(&source);
        let grid = resampled_grid(&file, [2.0; 3]);
        // A crop of the plan's grid, and a half-space of the patient in it: probabilities linear across its border.
        let start = [3, 2, 1];
        let crop = Grid {
            shape: std::array::from_fn(|axis| grid.shape[axis] - 2 * start[axis] as usize),
            affine: grid.affine.shifted(start),
        };
        let normal = [0.3, 0.8, -0.5];
        let centre = crop.affine.to_mm(crop.shape.map(|side| side as f64 / 2.0));
        let height = |mm: [f64; 3]| (0..3).map(|axis| normal[axis] * (mm[axis] - centre[axis])).sum::<f64>();
        let probabilities = Array4::from_shape_fn((2, crop.shape[0], crop.shape[1], crop.shape[2]), |(c, z, y, x)| {
            let share = 0.5 + 0.001 * height(crop.affine.to_mm([z as f64, y as f64, x as f64]));
            (if c == 1 { share } else { 1.0 - share }) as f32
        });
        let labels = labels_on_source(&probabilities, &crop, &source);
        assert_eq!(labels.dim(), (24, 12, 20));
        let to_crop = inverse(&crop.affine);
        let (mut checked, mut set) = (0, 0);
        for ((k, j, i), label) in labels.indexed_iter() {
            let m = &source.affine_xyz;
            let mm: [f64; 3] = std::array::from_fn(|row| {
                m[row][0] * i as f64 + m[row][1] * j as f64 + m[row][2] * k as f64 + m[row][3]
            });
            let at = to_crop.to_mm(mm);
            let is_inside = (0..3).all(|axis| at[axis] >= 0.0 && at[axis] <= (crop.shape[axis] - 1) as f64);
            let is_outside = (0..3).any(|axis| at[axis] < -0.51 || at[axis] > crop.shape[axis] as f64 - 0.49);
            assert!(!is_outside || *label == 0, "{k} {j} {i}");
            // Linear interpolation is exact for a linear field, up to single precision around 0.5.
            if is_inside && height(mm).abs() > 1e-2 {
                assert_eq!(*label == 1, height(mm) > 0.0, "{k} {j} {i}");
                checked += 1;
                set += u32::from(*label);
            }
        }
        assert!(checked > 800 && (200..checked - 200).contains(&set), "{checked} {set}");
    }
}
