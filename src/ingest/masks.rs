//! Labels as a folder of masks, one file a structure, as TotalSegmentator writes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::IngestConfig;
use super::nifti::{NiftiFileError, Scan, invalid, read_labels_as};

/// How far two masks' affines may differ, in mm: single precision in their headers.
const SAME_MM: f64 = 1e-3;

/// Returns the files of the masks in a folder, by the ids that they stand for.
///
/// # Errors
/// [`NiftiFileError::Invalid`] names the first file that is not there.
pub(super) fn mask_files(folder: &Path, masks: &BTreeMap<String, u8>) -> Result<Vec<(PathBuf, u8)>, NiftiFileError> {
    if masks.is_empty() {
        return Err(invalid(
            folder,
            "a folder of masks, and the preset names none: expected a table [masks] of `file = id`",
        ));
    }
    let find = |(stem, id): (&String, &u8)| {
        let names = [".nii.gz", ".nii"].map(|end| folder.join(format!("{stem}{end}")));
        match names.iter().find(|path| path.is_file()) {
            Some(path) => Ok((path.clone(), *id)),
            None => Err(invalid(
                &names[0],
                "missing: expected a mask of every structure of the preset",
            )),
        }
    };
    masks.iter().map(find).collect()
}

/// Joins a folder's masks to labels: the id of the mask where it is not 0.
///
/// # Errors
/// [`NiftiFileError`] names the mask that is missing, unreadable, on another grid, or not apart from the others.
pub(super) fn read_masks(
    folder: &Path,
    masks: &BTreeMap<String, u8>,
    options: &IngestConfig,
) -> Result<Scan<u8>, NiftiFileError> {
    let mut joined: Option<Scan<u8>> = None;
    for (path, id) in mask_files(folder, masks)? {
        let mut mask = read_labels_as(&path, options)?;
        mask.voxels.mapv_inplace(|value| if value == 0 { 0 } else { id });
        let Some(joined) = &mut joined else {
            joined = Some(mask);
            continue;
        };
        let apart = (joined.affine_xyz.iter().flatten()).zip(mask.affine_xyz.iter().flatten());
        if joined.voxels.dim() != mask.voxels.dim() || apart.into_iter().any(|(a, b)| (a - b).abs() > SAME_MM) {
            return Err(invalid(
                &path,
                "on another grid than the masks before it in the alphabet",
            ));
        }
        let mut twice = 0_usize;
        joined.voxels.zip_mut_with(&mask.voxels, |label, id| {
            twice += usize::from(*label != 0 && *id != 0);
            *label = if *id == 0 { *label } else { *id };
        });
        if twice > 0 {
            return Err(invalid(
                &path,
                format!("{twice} voxels also lie in a mask before it in the alphabet"),
            ));
        }
    }
    Ok(joined.expect("a preset with masks names at least one"))
}
