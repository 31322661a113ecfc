//! A DICOM series, one file a slice, as a volume.
//!
//! ```text
//! folder -> lengths.rs: does every declared length lie in the file? -> slice.rs: attributes, HU -> sorted, gaps refused
//! ```

mod lengths;
mod slice;

use std::path::{Path, PathBuf};

use ndarray::{Array3, ArrayView2, Axis};

use self::slice::Slice;
use super::header::check_affine;
use super::nifti::{MAX_SIDE, MAX_VOXELS, Scan};

/// How far a slice may lie from where an even series has it, as a share of the step between slices: rounding in files takes
/// hundredths, a missing slice shifts its neighbours by at least half a step.
const STEP_TOLERANCE: f64 = 0.1;
/// How much orientations and spacings may differ within a series: what rounding to six digits in files leaves.
const SAME: f64 = 1e-4;

/// Why a series cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct DicomError {
    /// The file or folder.
    pub path: PathBuf,
    /// The attribute, what was expected and what was found.
    pub what: String,
}

fn refused<T>(path: &Path, what: impl Into<String>) -> Result<T, DicomError> {
    Err(DicomError {
        path: path.into(),
        what: what.into(),
    })
}

/// Returns the slices' files of a folder in the order of their names. Folders, hidden files, `DICOMDIR`, licences, read-me files
/// and texts are left alone; what else is no DICOM is refused, because it may be a damaged slice.
///
/// # Errors
/// [`DicomError`] where the folder cannot be read, holds no or too many slices, or a file of another kind.
pub fn series_files(folder: &Path) -> Result<Vec<PathBuf>, DicomError> {
    let failed = |error: std::io::Error| DicomError {
        path: folder.into(),
        what: format!("cannot read: {error}"),
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() || goes_along(&path) {
            continue;
        }
        if !slice::is_dicom(&path)? {
            return refused(
                &path,
                "not a DICOM file: expected nothing but the slices of one series in its folder",
            );
        }
        files.push(path);
        if files.len() > MAX_SIDE {
            return refused(folder, format!("more than {MAX_SIDE} slices"));
        }
    }
    if files.is_empty() {
        return refused(
            folder,
            "no DICOM files: expected the folder of one series, one file a slice",
        );
    }
    files.sort();
    Ok(files)
}

/// Tells whether a file is what archives put beside slices.
fn goes_along(path: &Path) -> bool {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_lowercase();
    let is_named = ["dicomdir", "license", "licence", "readme", "."]
        .iter()
        .any(|start| name.starts_with(start));
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    is_named || ["txt", "json", "xml", "csv", "html", "md", "pdf"].contains(&extension)
}

/// Reads a series of CT slices in HU.
///
/// Slices are ordered by their position along the normal of their plane. A constant shift between slices, as a tilted gantry
/// leaves it, becomes part of the affine.
///
/// # Errors
/// [`DicomError`] names the file and the attribute: several series, slices that differ in size, spacing or direction,
/// doubles and gaps, compressed pixels, anything but CT.
///
/// # Source
/// DICOM PS3.3, C.7.6.2.1.1: positions and directions are in LPS, the affine is in RAS.
pub fn read_series(folder: &Path) -> Result<Scan<i16>, DicomError> {
    let files = series_files(folder)?;
    let mut slices: Vec<Slice> = Vec::with_capacity(files.len());
    for path in &files {
        let slice = Slice::read(path)?;
        let [rows, columns] = slice.sides;
        if rows * columns * files.len() > MAX_VOXELS {
            return refused(
                folder,
                format!("{} slices of {rows} x {columns}: more than 2^29 voxels", files.len()),
            );
        }
        if let Some(first) = slices.first() {
            same_series(first, &slice)?;
        }
        slices.push(slice);
    }
    let normal = slices[0].normal();
    slices.sort_by(|a, b| dot(a.position_lps, normal).total_cmp(&dot(b.position_lps, normal)));
    let step = even_step(folder, &slices, normal)?;
    let scan = volume(slices, step);
    check_affine(&scan.affine_xyz).or_else(|what| refused(folder, what))?;
    Ok(scan)
}

/// Returns the PatientID of a series' first file, if it has one. It may be a name: nothing may keep or print it.
///
/// # Errors
/// [`DicomError`] names the file.
pub fn patient_id(folder: &Path) -> Result<Option<String>, DicomError> {
    let files = series_files(folder)?;
    slice::patient_id(&files[0])
}

/// Checks that two slices belong to one volume.
fn same_series(first: &Slice, slice: &Slice) -> Result<(), DicomError> {
    let differ = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        refused(
            &slice.path,
            format!("{what}: {b:?}, but {a:?} in {}: not one series", first.path.display()),
        )
    };
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= SAME);
    if first.series != slice.series {
        return differ("SeriesInstanceUID", &first.series, &slice.series);
    }
    if first.sides != slice.sides {
        return differ("Rows, Columns", &first.sides, &slice.sides);
    }
    if !near(&first.spacing_mm, &slice.spacing_mm) {
        return differ("PixelSpacing", &first.spacing_mm, &slice.spacing_mm);
    }
    if !near(&first.directions_lps.concat(), &slice.directions_lps.concat()) {
        return differ("ImageOrientationPatient", &first.directions_lps, &slice.directions_lps);
    }
    Ok(())
}

/// Returns the step from slice to slice in mm (LPS), where it is the same throughout.
fn even_step(folder: &Path, slices: &[Slice], normal: [f64; 3]) -> Result<[f64; 3], DicomError> {
    let [first, .., last] = slices else {
        return refused(folder, "one slice: expected a volume of at least two");
    };
    let steps = (slices.len() - 1) as f64;
    let step: [f64; 3] = std::array::from_fn(|axis| (last.position_lps[axis] - first.position_lps[axis]) / steps);
    let gap = |pair: &[Slice]| dot(pair[1].position_lps, normal) - dot(pair[0].position_lps, normal);
    let refuse = |pair: &[Slice], what: String| {
        let names = format!("{} and {}", pair[0].path.display(), pair[1].path.display());
        refused(folder, format!("{names} lie {:.3} mm apart{what}", gap(pair)))
    };
    if let Some(pair) = slices.windows(2).find(|pair| gap(pair) <= SAME) {
        return refuse(pair, ": two series, or a slice twice".into());
    }
    let is_even = slices.iter().zip(0..).all(|(slice, number)| {
        let off = |axis: usize| slice.position_lps[axis] - (first.position_lps[axis] + f64::from(number) * step[axis]);
        (0..3).all(|axis| off(axis).abs() <= STEP_TOLERANCE * dot(step, normal))
    });
    if !is_even {
        let widest = slices.windows(2).max_by(|a, b| gap(a).total_cmp(&gap(b)));
        let average = format!(
            ", {:.3} mm on average: slices are missing or shifted",
            dot(step, normal)
        );
        return refuse(widest.expect("at least two slices"), average);
    }
    Ok(step)
}

/// Puts sorted slices on one another; the affine is from (i, j, k) to RAS mm.
fn volume(slices: Vec<Slice>, step_lps: [f64; 3]) -> Scan<i16> {
    let [rows, columns] = slices[0].sides;
    let origin = slices[0].position_lps;
    let [along_columns, along_rows] = slices[0].directions_lps;
    let [row_mm, column_mm] = slices[0].spacing_mm;
    // L and P point the other way than R and A.
    let sign = [-1.0, -1.0, 1.0];
    let mut affine_xyz = [[0.0; 4]; 4];
    for axis in 0..3 {
        affine_xyz[axis] = [
            along_columns[axis] * column_mm,
            along_rows[axis] * row_mm,
            step_lps[axis],
            origin[axis],
        ]
        .map(|mm| sign[axis] * mm);
    }
    affine_xyz[3][3] = 1.0;
    let mut voxels = Array3::zeros([slices.len(), rows, columns]);
    for (mut plane, slice) in voxels.axis_iter_mut(Axis(0)).zip(slices) {
        plane.assign(&ArrayView2::from_shape([rows, columns], &slice.hu).expect("as many values as voxels"));
    }
    Scan { affine_xyz, voxels }
}

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    (0..3).map(|axis| a[axis] * b[axis]).sum()
}
