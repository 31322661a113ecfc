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

/// Returns whose scan a DICOM series is, under a name that says nothing: 16 hexadecimal digits of the BLAKE3 of its PatientID.
/// Empty for NIfTI, and where the series does not say.
pub(super) fn patient_of(path: &Path) -> Result<String, IngestError> {
    if !path.is_dir() {
        return Ok(String::new());
    }
    let id = dicom::patient_id(path)?.unwrap_or_default();
    if id.is_empty() {
        return Ok(id);
    }
    let mut name = Digest::of(id.as_bytes()).to_string();
    name.truncate(16);
    Ok(name)
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
