//! The labels of a data set: read, brought onto their image's grid, translated to the plan's ids.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ndarray::Array3;

use super::orient::{Oriented, orient};
use super::preset::ResolvedPreset;
use super::regrid::regrid_labels;
use super::{Entry, IngestConfig, IngestError, LabelGrid, Preset, Section, built_in, masks, nifti};
use crate::store::CaseKind;
use crate::volume::{Annotation, Grid, Plan};

/// How far label and image voxels may lie apart, in mm.
const GRID_TOLERANCE_MM: f64 = 1e-3;
/// Labels as they were read.
pub(super) struct Labels {
    /// Ids of the plan, on the image's grid.
    pub voxels: Array3<u8>,
    /// The ids that the file has.
    pub ids: BTreeSet<u8>,
}

/// Reads a data set's labels.
pub(super) struct LabelReader<'a> {
    /// What its ids mean.
    pub preset: &'a Preset,
    /// What becomes of unusual files.
    pub options: &'a IngestConfig,
    /// The preset in the plan's ids.
    pub resolved: ResolvedPreset,
}

impl<'a> LabelReader<'a> {
    pub fn new(preset: &'a Preset, plan: &Plan, options: &'a IngestConfig) -> Result<Self, IngestError> {
        Ok(Self {
            resolved: preset.resolve(plan)?,
            preset,
            options,
        })
    }

    /// Returns the files that labels are made of.
    pub fn files(&self, path: &Path) -> Result<Vec<PathBuf>, IngestError> {
        if path.is_dir() {
            let files = masks::mask_files(path, &self.preset.masks)?;
            return Ok(files.into_iter().map(|(path, _)| path).collect());
        }
        Ok(vec![path.into()])
    }

    /// Reads labels, brings them onto the image's grid or refuses those on another, and translates them to the plan's ids.
    pub fn read(
        &self,
        path: &Path,
        image_path: &Path,
        image: &Oriented<i16>,
        warnings: &mut Vec<String>,
    ) -> Result<Labels, IngestError> {
        let mut labels = orient(if path.is_dir() {
            masks::read_masks(path, &self.preset.masks, self.options)?
        } else {
            nifti::read_labels_as(path, self.options)?
        });
        if let Some(what) = grid_difference(&image.grid, &labels.grid) {
            let (voxels, warning) = self
                .regridded(&labels, image, what)
                .map_err(|what| IngestError::OtherGrid {
                    labels: path.into(),
                    image: image_path.into(),
                    what,
                })?;
            labels.voxels = voxels;
            warnings.push(warning);
        }
        let mut seen = [false; 256];
        labels.voxels.iter().for_each(|id| seen[usize::from(*id)] = true);
        let found: BTreeSet<u8> = (0..=255).filter(|id| seen[usize::from(*id)]).collect();
        let table = &self.resolved.table;
        if let Some(id) = found.iter().find(|id| table[usize::from(**id)].is_none()) {
            return Err(IngestError::UnknownLabel {
                path: path.into(),
                id: *id,
                preset: self.preset.name.clone(),
                known: self.resolved.known_ids(),
                candidates: built_in::candidates(&found),
            });
        }
        labels
            .voxels
            .mapv_inplace(|id| table[usize::from(id)].expect("checked just above"));
        Ok(Labels {
            voxels: labels.voxels,
            ids: found,
        })
    }

    /// Brings labels onto the image's grid, where that is asked for and they meet; returns a warning with them.
    fn regridded(
        &self,
        labels: &Oriented<u8>,
        image: &Oriented<i16>,
        difference: String,
    ) -> Result<(Array3<u8>, String), String> {
        if self.options.label_grid == LabelGrid::Refuse {
            return Err(difference);
        }
        let regridded = regrid_labels(labels, &image.grid);
        let (labelled, outside) = (regridded.labelled, regridded.outside);
        if labelled > 0 && outside == labelled {
            return Err(format!("all {labelled} labelled voxels lie outside the image"));
        }
        let warning = format!(
            "labels of {:?} voxels resampled to the image's {:?} (z, y, x): {:.2} % of {labelled} labelled voxels lie outside",
            labels.grid.shape,
            image.grid.shape,
            100.0 * outside as f64 / labelled.max(1) as f64,
        );
        Ok((regridded.voxels, warning))
    }

    /// Returns what is known about a case's labels: nothing without a label file, no tumours in `unlabeled`.
    pub fn annotation(&self, entry: &Entry) -> (CaseKind, Annotation) {
        let mut annotation = self.resolved.annotation.clone();
        if entry.labels.is_none() {
            annotation.classes.clear();
            annotation.assumed_tumour_free = false;
            return (CaseKind::Unlabelled, annotation);
        }
        if entry.section == Section::Unlabeled {
            // As the published pools do; provenance keeps it apart from what was annotated.
            annotation.classes.retain(|class| !class.ends_with("_tumour"));
            annotation.assumed_tumour_free = true;
            return (CaseKind::Unlabelled, annotation);
        }
        (self.resolved.kind, annotation)
    }
}

/// Says how two grids differ: shapes, or the farthest corner by more than the tolerance.
fn grid_difference(image: &Grid, labels: &Grid) -> Option<String> {
    if image.shape != labels.shape {
        return Some(format!("shape {:?} (z, y, x) against {:?}", labels.shape, image.shape));
    }
    let far = image.shape.map(|side| (side - 1) as f64);
    let apart = (0..8).map(|corner| {
        let at = std::array::from_fn(|axis| if corner >> axis & 1 == 1 { far[axis] } else { 0.0 });
        let (a, b) = (image.affine.to_mm(at), labels.affine.to_mm(at));
        (0..3).map(|axis| (a[axis] - b[axis]).abs()).fold(0.0, f64::max)
    });
    let farthest = apart.fold(0.0, f64::max);
    (farthest > GRID_TOLERANCE_MM).then(|| format!("a corner lies {farthest:.4} mm away, at most {GRID_TOLERANCE_MM}"))
}
