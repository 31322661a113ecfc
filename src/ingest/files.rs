//! The files that an image is made of: one NIfTI file, or a folder with the slices of a DICOM series.

use std::path::{Path, PathBuf};

use super::{IngestConfig, IngestError, dicom, nifti};
use crate::digest::Digest;

/// Reads a NIfTI file, or the DICOM series of a folder; says what a user should know of it.
pub(super) fn read_image(path: &Path, options: &IngestConfig) -> Result<(nifti::Scan<i16>, Vec<String>), IngestError> {
    if path.is_dir() {
        return Ok((dicom::read_series(path)?, Vec::new()));
    }
    Ok(nifti::read_image_as(path, options)?)
}

/// Returns the files that an image is made of.
pub(super) fn image_files(path: &Path) -> Result<Vec<PathBuf>, IngestError> {
    if path.is_dir() {
        return Ok(dicom::series_files(path)?);
    }
    Ok(vec![path.into()])
}

/// Hashes files one after the other.
pub(super) fn hash_of(files: &[PathBuf]) -> Result<Digest, IngestError> {
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let file = std::fs::File::open(path);
        file.and_then(|file| hasher.update_reader(file).map(drop))
            .map_err(|source| nifti::NiftiFileError::Read {
                path: path.clone(),
                source,
            })?;
    }
    Ok(hasher.finalize().into())
}
