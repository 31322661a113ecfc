//! One file of a series: attributes checked, pixels as HU.

use std::io::Read;
use std::path::{Path, PathBuf};

use dicom_dictionary_std::{tags, uids};
use dicom_object::{FileMetaTable, InMemDicomObject, Tag};
use dicom_transfer_syntax_registry::entries;

use super::lengths::{self, Encoding, PREFIX_BYTES};
use super::{DicomError, MAX_SIDE, refused};

/// The most bytes of a slice's file: 2048 x 2048 voxels of 16 bits, and as much again.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// A slice of a series.
pub(super) struct Slice {
    pub(super) path: PathBuf,
    /// SeriesInstanceUID.
    pub(super) series: String,
    /// Rows, columns.
    pub(super) sides: [usize; 2],
    /// PixelSpacing: from row to row, from column to column.
    pub(super) spacing_mm: [f64; 2],
    /// ImageOrientationPatient: unit vectors along a row (column index grows) and along a column (row index grows).
    pub(super) directions_lps: [[f64; 3]; 2],
    /// ImagePositionPatient: the centre of the first voxel.
    pub(super) position_lps: [f64; 3],
    /// The voxels, row by row.
    pub(super) hu: Vec<i16>,
}

/// Tells whether a path is a file that begins as DICOM files do.
pub(super) fn is_dicom(path: &Path) -> Result<bool, DicomError> {
    let failed = |error: std::io::Error| DicomError {
        path: path.into(),
        what: format!("cannot read: {error}"),
    };
    let mut head = [0; PREFIX_BYTES];
    let mut file = std::fs::File::open(path).map_err(failed)?;
    match file.read_exact(&mut head) {
        Ok(()) => Ok(head.ends_with(b"DICM")),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Returns the PatientID of a file, where it is there and not empty.
pub(super) fn patient_id(path: &Path) -> Result<Option<String>, DicomError> {
    let object = open(path).or_else(|what| refused(path, what))?;
    let element = object.element_opt(tags::PATIENT_ID).ok().flatten();
    let text = element.and_then(|element| element.to_str().ok());
    let id = text.map(|text| text.trim_matches([' ', '\0']).to_string());
    Ok(id.filter(|id| !id.is_empty()))
}

impl Slice {
    /// Reads a file.
    pub(super) fn read(path: &Path) -> Result<Self, DicomError> {
        let object = open(path).map_err(|what| DicomError {
            path: path.into(),
            what,
        })?;
        Attributes { object: &object }
            .slice(path)
            .or_else(|what| refused(path, what))
    }

    /// Returns the normal of the slice's plane: the direction in which a right-handed volume's slices follow each other.
    pub(super) fn normal(&self) -> [f64; 3] {
        let [a, b] = self.directions_lps;
        std::array::from_fn(|axis| {
            let (next, after) = ((axis + 1) % 3, (axis + 2) % 3);
            a[next] * b[after] - a[after] * b[next]
        })
    }
}

/// Reads a file whole, and parses it after its lengths have been checked.
fn open(path: &Path) -> Result<InMemDicomObject, String> {
    let failed = |error: std::io::Error| format!("cannot read: {error}");
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("more than {MAX_FILE_BYTES} bytes for one slice"));
    }
    let data = lengths::end_of_meta(&bytes)?;
    let meta = FileMetaTable::from_reader(&bytes[PREFIX_BYTES - 4..data]).map_err(|error| error.to_string())?;
    let (encoding, syntax) = match meta.transfer_syntax() {
        uids::EXPLICIT_VR_LITTLE_ENDIAN => (Encoding::Explicit, entries::EXPLICIT_VR_LITTLE_ENDIAN.erased()),
        uids::IMPLICIT_VR_LITTLE_ENDIAN => (Encoding::Implicit, entries::IMPLICIT_VR_LITTLE_ENDIAN.erased()),
        other => {
            return Err(format!(
                "transfer syntax {other}: expected uncompressed little-endian pixels; decompress the files first, for example \
                 with gdcmconv --raw"
            ));
        }
    };
    lengths::check(&bytes, data, encoding)?;
    // From where the check began, whatever the header says of its own length.
    InMemDicomObject::read_dataset_with_ts(&bytes[data..], &syntax).map_err(|error| error.to_string())
}

/// The attributes of one file, by their keywords.
struct Attributes<'a> {
    object: &'a InMemDicomObject,
}

impl Attributes<'_> {
    fn slice(&self, path: &Path) -> Result<Slice, String> {
        let is = |name: &str, tag: Tag, expected: &str| match self.text(name, tag)? {
            found if found == expected => Ok(()),
            found => Err(format!("{name}: expected {expected}, got {found:?}")),
        };
        is("Modality", tags::MODALITY, "CT")?;
        is(
            "PhotometricInterpretation",
            tags::PHOTOMETRIC_INTERPRETATION,
            "MONOCHROME2",
        )?;
        if self
            .object
            .element_opt(tags::NUMBER_OF_FRAMES)
            .map_err(|error| error.to_string())?
            .is_some()
            && self.number("NumberOfFrames", tags::NUMBER_OF_FRAMES)? != 1.0
        {
            return Err("NumberOfFrames: expected one frame a file; split enhanced files first".into());
        }
        let sides = [
            self.integer("Rows", tags::ROWS, 1..=MAX_SIDE)?,
            self.integer("Columns", tags::COLUMNS, 1..=MAX_SIDE)?,
        ];
        let spacing_mm = self.numbers("PixelSpacing", tags::PIXEL_SPACING)?;
        if !spacing_mm.iter().all(|mm| (0.01..=100.0).contains(mm)) {
            return Err(format!("PixelSpacing: expected 0.01 to 100 mm, got {spacing_mm:?}"));
        }
        let [a, b, c, d, e, f] = self.numbers("ImageOrientationPatient", tags::IMAGE_ORIENTATION_PATIENT)?;
        let directions_lps = [[a, b, c], [d, e, f]];
        let lengths = directions_lps.map(|v| super::dot(v, v));
        if lengths.iter().any(|square| (square - 1.0).abs() > 1e-2)
            || super::dot(directions_lps[0], directions_lps[1]).abs() > 1e-2
        {
            return Err(format!(
                "ImageOrientationPatient: expected two unit vectors at right angles, got {directions_lps:?}"
            ));
        }
        Ok(Slice {
            path: path.into(),
            series: self.text("SeriesInstanceUID", tags::SERIES_INSTANCE_UID)?,
            sides,
            spacing_mm,
            directions_lps,
            position_lps: self.numbers("ImagePositionPatient", tags::IMAGE_POSITION_PATIENT)?,
            hu: self.hu(sides[0] * sides[1])?,
        })
    }

    /// Returns the pixels in HU: RescaleSlope and RescaleIntercept applied in f64, rounded half to even, clamped to 16 bits.
    fn hu(&self, voxels: usize) -> Result<Vec<i16>, String> {
        self.integer("SamplesPerPixel", tags::SAMPLES_PER_PIXEL, 1..=1)?;
        self.integer("BitsAllocated", tags::BITS_ALLOCATED, 16..=16)?;
        let stored = self.integer("BitsStored", tags::BITS_STORED, 1..=16)?;
        self.integer("HighBit", tags::HIGH_BIT, stored - 1..=stored - 1)?;
        let is_signed = self.integer("PixelRepresentation", tags::PIXEL_REPRESENTATION, 0..=1)? == 1;
        let slope = self.number("RescaleSlope", tags::RESCALE_SLOPE)?;
        let intercept = self.number("RescaleIntercept", tags::RESCALE_INTERCEPT)?;
        if slope == 0.0 {
            return Err("RescaleSlope: expected a factor other than 0".into());
        }
        let element = self
            .object
            .element(tags::PIXEL_DATA)
            .map_err(|_| "PixelData: missing".to_string())?;
        let bytes = element.to_bytes().map_err(|error| format!("PixelData: {error}"))?;
        if bytes.len() < 2 * voxels || bytes.len() > 2 * voxels + 1 {
            return Err(format!("PixelData: expected {} bytes, got {}", 2 * voxels, bytes.len()));
        }
        // Bits above those stored may hold anything: shifted out, and the sign drawn in.
        let unused = 16 - stored as u32;
        let value = |pair: &[u8]| {
            let raw = u16::from_le_bytes([pair[0], pair[1]]) << unused;
            let value = if is_signed {
                i32::from(raw as i16 >> unused)
            } else {
                i32::from(raw >> unused)
            };
            (slope * f64::from(value) + intercept)
                .round_ties_even()
                .clamp(f64::from(i16::MIN), f64::from(i16::MAX)) as i16
        };
        Ok(bytes.chunks_exact(2).take(voxels).map(value).collect())
    }

    fn text(&self, name: &str, tag: Tag) -> Result<String, String> {
        let element = self.object.element(tag).map_err(|_| format!("{name}: missing"))?;
        let text = element.to_str().map_err(|error| format!("{name}: {error}"))?;
        Ok(text.trim_end_matches(['\0', ' ']).to_string())
    }

    fn numbers<const N: usize>(&self, name: &str, tag: Tag) -> Result<[f64; N], String> {
        let element = self.object.element(tag).map_err(|_| format!("{name}: missing"))?;
        let numbers = element.to_multi_float64().map_err(|error| format!("{name}: {error}"))?;
        let found: [f64; N] = numbers
            .try_into()
            .map_err(|found: Vec<f64>| format!("{name}: expected {N} numbers, got {}", found.len()))?;
        if found.iter().all(|number| number.is_finite()) {
            return Ok(found);
        }
        Err(format!("{name}: expected finite numbers, got {found:?}"))
    }

    fn number(&self, name: &str, tag: Tag) -> Result<f64, String> {
        self.numbers(name, tag).map(|[number]| number)
    }

    fn integer(&self, name: &str, tag: Tag, range: std::ops::RangeInclusive<usize>) -> Result<usize, String> {
        let number = self.number(name, tag)?;
        let found = (number.fract() == 0.0 && number >= 0.0).then_some(number as usize);
        match found.filter(|found| range.contains(found)) {
            Some(found) => Ok(found),
            None => Err(format!(
                "{name}: expected {} to {}, got {number}",
                range.start(),
                range.end()
            )),
        }
    }
}
