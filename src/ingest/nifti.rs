//! NIfTI-1 and NIfTI-2 files in and out: any byte order, any integer or float type, plain or gzip.
//!
//! The `nifti` crate reads NIfTI-1 headers, decodes voxels and writes files. It knows no NIfTI-2, takes its sizes from
//! the file without a limit, and keeps affines in single precision; so this module reads the stream itself, under
//! limits, and hands the crate bytes of a checked length.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use ndarray::{Array3, ArrayView3};
use nifti::writer::WriterOptions;
use nifti::{DataElement, Endianness, NiftiHeader, NiftiType};

use super::header::{self, Header, NIFTI1_BYTES, NIFTI2_BYTES};
use super::{IngestConfig, NotFinite};
use crate::store::SourceGeometry;
use crate::volume::{AIR_HU, Grid};

/// The longest side that is read, in voxels: a whole body at 1 mm.
pub const MAX_SIDE: usize = 2048;
/// The most voxels that are read: 512 x 512 x 2048.
pub const MAX_VOXELS: usize = 1 << 29;
/// The most bytes between header and voxels (extensions).
const MAX_EXTENSION_BYTES: u64 = 16 << 20;
/// Memory that is set aside before the file has shown that it holds as much as it declares.
const FIRST_ALLOCATION: usize = 64 << 20;

/// Why a NIfTI file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NiftiFileError {
    /// The operating system refused, or the gzip stream is damaged.
    #[error("{path}: cannot read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file ends before the voxels that its header declares.
    #[error("{path}: truncated: expected {expected} bytes of {part}, got {got}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What was being read.
        part: &'static str,
        /// Bytes that the header declares.
        expected: usize,
        /// Bytes that the file holds.
        got: usize,
    },
    /// A file that is not a volume this program can use.
    #[error("{path}: {what}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The header field or the voxels, what was expected and what was found.
        what: String,
    },
    /// The file cannot be written.
    #[error("{path}: cannot write: {what}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
}

/// A volume as a file holds it: voxels (k, j, i), the file's first axis fastest.
#[derive(Clone, Debug)]
pub struct Scan<T> {
    /// The file's affine from (i, j, k) to RAS mm.
    pub affine_xyz: [[f64; 4]; 4],
    /// The voxels, indexed (k, j, i).
    pub voxels: Array3<T>,
}

/// Reads an image in HU: slope and intercept applied in f64, rounded half to even, clamped to 16 bits.
///
/// # Errors
/// [`NiftiFileError`] names the file; voxels that are not finite are refused with their number.
pub fn read_image(path: &Path) -> Result<Scan<i16>, NiftiFileError> {
    Ok(read_image_as(path, &IngestConfig::default())?.0)
}

/// Reads an image as [`read_image`] does, unusual files as the options say; says what a user should know of it.
///
/// # Errors
/// [`NiftiFileError`] names the file, and what was refused.
pub fn read_image_as(path: &Path, options: &IngestConfig) -> Result<(Scan<i16>, Vec<String>), NiftiFileError> {
    let mut raw = RawVolume::read(path, options.volume)?;
    let mut remarks: Vec<String> = raw.header.remark.take().into_iter().collect();
    let (slope, intercept) = raw.header.scaling();
    if slope == 1.0 && intercept == 0.0 && raw.header.data_type == NiftiType::Int16 {
        // Most CTs: the values are the HU.
        return Ok((raw.decode_i16(path)?, remarks));
    }
    let mut not_finite = 0_usize;
    let scan = raw.decode(path, |value| {
        let hu = slope * value + intercept;
        if !hu.is_finite() {
            not_finite += 1;
            return AIR_HU;
        }
        // `as` saturates, and the clamp says so.
        hu.round_ties_even().clamp(f64::from(i16::MIN), f64::from(i16::MAX)) as i16
    })?;
    if not_finite > 0 {
        let what = format!("{not_finite} voxels are NaN or infinite");
        match options.not_finite {
            NotFinite::Refuse => {
                return Err(invalid(
                    path,
                    what + "; `ingest.not_finite = \"air\"` reads them as air",
                ));
            }
            NotFinite::Air => remarks.push(what + ": read as air"),
        }
    }
    Ok((scan, remarks))
}

/// Reads label ids: integers 0 to 255 in any numeric type.
///
/// # Errors
/// [`NiftiFileError`] names the file and the first value that is no label id.
pub fn read_labels(path: &Path) -> Result<Scan<u8>, NiftiFileError> {
    read_labels_as(path, &IngestConfig::default())
}

/// Reads label ids as [`read_labels`] does, of a file with several volumes the one that the options name.
///
/// # Errors
/// As [`read_labels`].
pub fn read_labels_as(path: &Path, options: &IngestConfig) -> Result<Scan<u8>, NiftiFileError> {
    let raw = RawVolume::read(path, options.volume)?;
    let (slope, intercept) = raw.header.scaling();
    let mut refused = None;
    let scan = raw.decode(path, |value| {
        let id = slope * value + intercept;
        if id.fract() == 0.0 && (0.0..=255.0).contains(&id) {
            return id as u8;
        }
        refused.get_or_insert(id);
        0
    })?;
    match refused {
        Some(value) => Err(invalid(path, format!("expected label ids 0 to 255, got {value}"))),
        None => Ok(scan),
    }
}

/// Writes an image (z, y, x) as NIfTI-1, compressed where the name ends in `.gz`; the affine is kept in single precision.
///
/// # Errors
/// [`NiftiFileError::Write`] names the file.
pub fn write_image(path: &Path, image: ArrayView3<i16>, grid: &Grid) -> Result<(), NiftiFileError> {
    let header = reference_header(grid);
    let writer = WriterOptions::new(path).reference_header(&header);
    written(path, writer.write_nifti(&image.permuted_axes([2, 1, 0])))
}

/// Writes labels (z, y, x) like [`write_image`].
///
/// # Errors
/// [`NiftiFileError::Write`] names the file.
pub fn write_labels(path: &Path, labels: ArrayView3<u8>, grid: &Grid) -> Result<(), NiftiFileError> {
    let header = reference_header(grid);
    let writer = WriterOptions::new(path).reference_header(&header);
    written(path, writer.write_nifti(&labels.permuted_axes([2, 1, 0])))
}

fn written(path: &Path, outcome: nifti::Result<()>) -> Result<(), NiftiFileError> {
    outcome.map_err(|error| NiftiFileError::Write {
        path: path.into(),
        what: error.to_string(),
    })
}

/// Returns a header that carries a grid's affine; the crate adds shape and type.
fn reference_header(grid: &Grid) -> NiftiHeader {
    let m = &grid.affine.0;
    // Columns of our affine are (z, y, x); the file's are (i, j, k) = (x, y, z).
    let row = |r: usize| [m[r][2] as f32, m[r][1] as f32, m[r][0] as f32, m[r][3] as f32];
    let [sz, sy, sx] = grid.spacing_mm().map(|mm| mm as f32);
    NiftiHeader {
        srow_x: row(0),
        srow_y: row(1),
        srow_z: row(2),
        sform_code: 1,
        qform_code: 0,
        xyzt_units: 2,
        pixdim: [1.0, sx, sy, sz, 1.0, 1.0, 1.0, 1.0],
        ..NiftiHeader::default()
    }
}

pub(super) fn invalid(path: &Path, what: impl Into<String>) -> NiftiFileError {
    NiftiFileError::Invalid {
        path: path.into(),
        what: what.into(),
    }
}

/// Opens a file, decompressed where it is gzip.
fn open(path: &Path) -> Result<Box<dyn Read>, NiftiFileError> {
    let unreadable = |source: std::io::Error| NiftiFileError::Read {
        path: path.into(),
        source,
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut file = BufReader::with_capacity(1 << 16, file);
    // The content decides, not the name: a `.nii` that is gzip is common.
    let is_gzip = file.fill_buf().map_err(unreadable)?.starts_with(&[0x1f, 0x8b]);
    Ok(if is_gzip {
        Box::new(MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    })
}

/// Reads the 348 or 540 bytes of a header, not yet checked but for their number.
fn read_header(path: &Path, stream: &mut dyn Read) -> Result<Vec<u8>, NiftiFileError> {
    let mut start = read_up_to(path, stream, 4)?;
    let size = start
        .as_slice()
        .try_into()
        .map(i32::from_le_bytes)
        .map_err(|_| invalid(path, "not a NIfTI file: shorter than a header"))?;
    let header_bytes = [NIFTI1_BYTES, NIFTI2_BYTES]
        .into_iter()
        .find(|bytes| [size, size.swap_bytes()].contains(&(*bytes as i32)))
        .ok_or_else(|| {
            invalid(
                path,
                format!("not a NIfTI file: sizeof_hdr: expected 348 or 540, got {size}"),
            )
        })?;
    start.extend(read_exactly(path, stream, header_bytes - 4, "header")?);
    Ok(start)
}

/// Returns a file's header for labels on the same voxels: type, scaling and extensions change, nothing that says where they
/// lie.
///
/// # Errors
/// [`NiftiFileError`] names the file.
pub fn label_header_like(path: &Path) -> Result<Vec<u8>, NiftiFileError> {
    let mut header = read_header(path, &mut open(path)?)?;
    header::make_label_header(&mut header);
    Ok(header)
}

/// Returns a NIfTI-2 header for labels on a grid, its affine in double precision.
pub fn label_header(source: &SourceGeometry) -> Vec<u8> {
    header::new_label_header(source.shape_xyz, &source.affine_xyz)
}

/// Writes labels (k, j, i) after a header, compressed where the name ends in `.gz`; the file appears when it is whole.
///
/// # Errors
/// [`NiftiFileError::Write`] names the file.
pub fn write_with_header(path: &Path, labels: ArrayView3<u8>, header: &[u8]) -> Result<(), NiftiFileError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let part = path.with_file_name(name);
    let write = || {
        let file = std::io::BufWriter::new(std::fs::File::create(&part)?);
        if path.extension().is_some_and(|extension| extension == "gz") {
            let mut encoder = GzEncoder::new(file, Compression::default());
            write_all(&mut encoder, labels, header)?;
            encoder.finish()?.flush()?;
        } else {
            let mut file = file;
            write_all(&mut file, labels, header)?;
            file.flush()?;
        }
        std::fs::rename(&part, path)
    };
    write().map_err(|error: std::io::Error| {
        // Half a file under a name that nobody asked for is of no use; what went wrong is told below.
        drop(std::fs::remove_file(&part));
        NiftiFileError::Write {
            path: path.into(),
            what: error.to_string(),
        }
    })
}

fn write_all(out: &mut dyn Write, labels: ArrayView3<u8>, header: &[u8]) -> std::io::Result<()> {
    out.write_all(header)?;
    // No extensions.
    out.write_all(&[0; 4])?;
    out.write_all(labels.as_standard_layout().as_slice().unwrap_or_default())
}

/// A checked header and as many voxel bytes as it declares.
struct RawVolume {
    header: Header,
    bytes: Vec<u8>,
}

impl RawVolume {
    fn read(path: &Path, volume: Option<u32>) -> Result<Self, NiftiFileError> {
        let mut stream = open(path)?;
        let start = read_header(path, &mut stream)?;
        let header_bytes = start.len();
        let header = Header::parse(&start, volume).map_err(|what| invalid(path, what))?;
        let gap = header.voxel_offset.saturating_sub(header_bytes as u64);
        if gap > MAX_EXTENSION_BYTES {
            return Err(invalid(
                path,
                format!("vox_offset: at most {MAX_EXTENSION_BYTES} bytes of extensions, got {gap}"),
            ));
        }
        read_exactly(path, &mut stream, gap as usize, "extensions")?;
        skip(path, &mut stream, header.volume, &header)?;
        let bytes = read_exactly(path, &mut stream, header.voxel_bytes(), "voxels")?;
        skip(path, &mut stream, header.volumes - 1 - header.volume, &header)?;
        // Reading on to the end also makes the gzip decoder check its CRC.
        let extra = read_up_to(path, &mut stream, 1)?;
        if !extra.is_empty() {
            return Err(invalid(
                path,
                format!(
                    "holds more than the {} bytes of voxels that its header declares",
                    bytes.len()
                ),
            ));
        }
        Ok(Self { header, bytes })
    }

    /// Decodes 16-bit integers as they are.
    fn decode_i16(self, path: &Path) -> Result<Scan<i16>, NiftiFileError> {
        let [i, j, k] = self.header.shape;
        let values =
            i16::from_raw_vec(self.bytes, self.header.endianness).map_err(|error| invalid(path, error.to_string()))?;
        let voxels = Array3::from_shape_vec([k, j, i], values).map_err(|error| invalid(path, error.to_string()))?;
        Ok(Scan {
            affine_xyz: self.header.affine_xyz,
            voxels,
        })
    }

    /// Decodes every voxel to f64, exact for all types but 64-bit integers beyond 2^53, and converts it.
    fn decode<T>(self, path: &Path, convert: impl FnMut(f64) -> T) -> Result<Scan<T>, NiftiFileError> {
        let Self { header, bytes } = self;
        let [i, j, k] = header.shape;
        let order = header.endianness;
        use NiftiType as N;
        let values = match header.data_type {
            N::Uint8 => typed::<u8, T>(bytes, order, convert, f64::from),
            N::Int8 => typed::<i8, T>(bytes, order, convert, f64::from),
            N::Uint16 => typed::<u16, T>(bytes, order, convert, f64::from),
            N::Int16 => typed::<i16, T>(bytes, order, convert, f64::from),
            N::Uint32 => typed::<u32, T>(bytes, order, convert, f64::from),
            N::Int32 => typed::<i32, T>(bytes, order, convert, f64::from),
            N::Uint64 => typed::<u64, T>(bytes, order, convert, |value| value as f64),
            N::Int64 => typed::<i64, T>(bytes, order, convert, |value| value as f64),
            N::Float32 => typed::<f32, T>(bytes, order, convert, f64::from),
            N::Float64 => typed::<f64, T>(bytes, order, convert, |value| value),
            other => unreachable!("the header has refused {other:?}"),
        }
        .map_err(|error| invalid(path, error.to_string()))?;
        let voxels = Array3::from_shape_vec([k, j, i], values).map_err(|error| invalid(path, error.to_string()))?;
        Ok(Scan {
            affine_xyz: header.affine_xyz,
            voxels,
        })
    }
}

fn typed<E: DataElement + Copy, T>(
    bytes: Vec<u8>,
    order: Endianness,
    mut convert: impl FnMut(f64) -> T,
    widen: impl Fn(E) -> f64,
) -> nifti::Result<Vec<T>> {
    let values = E::from_raw_vec(bytes, order)?;
    Ok(values.into_iter().map(|value| convert(widen(value))).collect())
}

/// Reads at most `limit` bytes.
fn read_up_to(path: &Path, stream: &mut dyn Read, limit: usize) -> Result<Vec<u8>, NiftiFileError> {
    let mut bytes = Vec::with_capacity(limit.min(FIRST_ALLOCATION));
    match stream.take(limit as u64).read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        // A gzip stream that is cut off ends like this; what came so far tells the caller where.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && bytes.len() < limit => Ok(bytes),
        Err(source) => Err(NiftiFileError::Read {
            path: path.into(),
            source,
        }),
    }
}

/// Reads over whole volumes, keeping nothing.
fn skip(path: &Path, stream: &mut dyn Read, volumes: usize, header: &Header) -> Result<(), NiftiFileError> {
    let expected = volumes * header.voxel_bytes();
    let copied = std::io::copy(&mut stream.take(expected as u64), &mut std::io::sink());
    match copied {
        Ok(got) if got == expected as u64 => Ok(()),
        Ok(got) => Err(NiftiFileError::Truncated {
            path: path.into(),
            part: "other volumes",
            expected,
            got: got as usize,
        }),
        Err(source) => Err(NiftiFileError::Read {
            path: path.into(),
            source,
        }),
    }
}

fn read_exactly(
    path: &Path,
    stream: &mut dyn Read,
    expected: usize,
    part: &'static str,
) -> Result<Vec<u8>, NiftiFileError> {
    let bytes = read_up_to(path, stream, expected)?;
    if bytes.len() == expected {
        return Ok(bytes);
    }
    Err(NiftiFileError::Truncated {
        path: path.into(),
        part,
        expected,
        got: bytes.len(),
    })
}
