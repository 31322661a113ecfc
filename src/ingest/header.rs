//! The NIfTI header: the few fields that a CT volume needs, checked, from version 1 or 2.

use std::ops::RangeInclusive;

use nifti::{Endianness, NiftiHeader, NiftiType};

use super::nifti::{MAX_SIDE, MAX_VOXELS};

/// Bytes of a NIfTI-1 header.
pub(super) const NIFTI1_BYTES: usize = 348;
/// Bytes of a NIfTI-2 header.
pub(super) const NIFTI2_BYTES: usize = 540;

/// Farther from the scanner's origin lies no patient.
const MAX_MM: f64 = 1e5;
/// Voxel sizes that are believed.
const VOXEL_MM: RangeInclusive<f64> = 0.01..=100.0;
/// The most volumes of a file of which one is read.
const MAX_VOLUMES: i64 = 1024;
/// How far pixdim and affine may disagree on the size of a voxel, as a share of it.
const SAME_SIZE: f64 = 1e-3;
/// Axes more oblique to each other than this are no CT grid; a gantry tilt of 30 degrees has 0.87.
const MIN_DETERMINANT: f64 = 0.1;

/// A header's fields, in f64 whatever the version.
pub(super) struct Header {
    /// Voxels along (i, j, k).
    pub(super) shape: [usize; 3],
    /// How voxels are stored.
    pub(super) data_type: NiftiType,
    /// Byte order of the voxels.
    pub(super) endianness: Endianness,
    /// Where the voxels start in the file.
    pub(super) voxel_offset: u64,
    /// From (i, j, k) to RAS mm.
    pub(super) affine_xyz: [[f64; 4]; 4],
    /// How many volumes the file holds.
    pub(super) volumes: usize,
    /// Which of them is read, from 0.
    pub(super) volume: usize,
    /// Where the header contradicts itself.
    pub(super) remark: Option<String>,
    slope: f64,
    intercept: f64,
}

/// What decides the affine.
struct Frame {
    sform_code: i32,
    rows: [[f64; 4]; 3],
    qform_code: i32,
    quaternion: [f64; 3],
    offset: [f64; 3],
    pixdim: [f64; 4],
}

impl Header {
    /// Reads a header of 348 or 540 bytes; of a file with several volumes, one must be named.
    pub(super) fn parse(bytes: &[u8], volume: Option<u32>) -> Result<Self, String> {
        if bytes.len() == NIFTI2_BYTES {
            return Self::parse_2(bytes, volume);
        }
        let header = NiftiHeader::from_reader(bytes).map_err(|error| error.to_string())?;
        if &header.magic != nifti::header::MAGIC_CODE_NIP1 {
            return Err(format!(
                "magic: expected a single file \"n+1\", got {:?}",
                String::from_utf8_lossy(&header.magic)
            ));
        }
        let widen = |row: [f32; 4]| row.map(f64::from);
        let (shape, volumes) = shape_of(&header.dim.map(|size| size.cast_signed().into()))?;
        let frame = Frame {
            sform_code: header.sform_code.into(),
            rows: [header.srow_x, header.srow_y, header.srow_z].map(widen),
            qform_code: header.qform_code.into(),
            quaternion: [header.quatern_b, header.quatern_c, header.quatern_d].map(f64::from),
            offset: [header.quatern_x, header.quatern_y, header.quatern_z].map(f64::from),
            pixdim: std::array::from_fn(|i| f64::from(header.pixdim[i])),
        };
        let offset = f64::from(header.vox_offset);
        if !(0.0..1e9).contains(&offset) {
            return Err(format!("vox_offset: expected 352 or more bytes, got {offset}"));
        }
        Ok(Self {
            shape,
            data_type: voxel_type(&header)?,
            endianness: header.endianness,
            voxel_offset: (offset as u64).max(NIFTI1_BYTES as u64 + 4),
            affine_xyz: frame.affine(shape)?,
            volumes,
            volume: chosen(volume, volumes)?,
            remark: frame.remark(),
            slope: header.scl_slope.into(),
            intercept: header.scl_inter.into(),
        })
    }

    fn parse_2(bytes: &[u8], volume: Option<u32>) -> Result<Self, String> {
        let fields = Fields {
            bytes,
            is_little: bytes[..4] == (NIFTI2_BYTES as i32).to_le_bytes(),
        };
        if bytes[4..12] != *b"n+2\0\r\n\x1a\n" {
            return Err(format!(
                "magic: expected a single file \"n+2\", got {:02x?}",
                &bytes[4..12]
            ));
        }
        let (shape, volumes) = shape_of(&std::array::from_fn(|i| fields.i64(16 + 8 * i)))?;
        let triple = |at: usize| std::array::from_fn(|i| fields.f64(at + 8 * i));
        let row = |at: usize| std::array::from_fn(|i| fields.f64(at + 8 * i));
        let frame = Frame {
            sform_code: fields.i32(348),
            rows: [row(400), row(432), row(464)],
            qform_code: fields.i32(344),
            quaternion: triple(352),
            offset: triple(376),
            pixdim: row(104),
        };
        let code = i16::from_le_bytes(fields.array(12));
        // The crate's own table of type codes, reached through a NIfTI-1 header.
        let typed = NiftiHeader {
            datatype: code,
            ..NiftiHeader::default()
        };
        let offset = fields.i64(168);
        Ok(Self {
            shape,
            data_type: voxel_type(&typed)?,
            endianness: if fields.is_little {
                Endianness::Little
            } else {
                Endianness::Big
            },
            voxel_offset: u64::try_from(offset)
                .map_err(|_| format!("vox_offset: expected 544 or more bytes, got {offset}"))?
                .max(NIFTI2_BYTES as u64 + 4),
            affine_xyz: frame.affine(shape)?,
            volumes,
            volume: chosen(volume, volumes)?,
            remark: frame.remark(),
            slope: fields.f64(176),
            intercept: fields.f64(184),
        })
    }

    /// Returns slope and intercept; a slope of 0 or NaN means that there are none.
    pub(super) fn scaling(&self) -> (f64, f64) {
        if self.slope == 0.0 || !self.slope.is_finite() || !self.intercept.is_finite() {
            return (1.0, 0.0);
        }
        (self.slope, self.intercept)
    }

    /// Returns the bytes of all voxels; [`shape_of`] has bounded them.
    pub(super) fn voxel_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.data_type.size_of()
    }
}

/// The code of unsigned 8-bit integers.
const UINT8: i16 = 2;

/// Turns a header into one of labels: 8-bit voxels of one volume right after it, without scaling; what says where voxels lie
/// stays as it is, in the file's byte order.
pub(super) fn make_label_header(header: &mut [u8]) {
    let is_2 = header.len() == NIFTI2_BYTES;
    let is_little = header.starts_with(&(header.len() as i32).to_le_bytes());
    let mut put = |at: usize, mut little: Vec<u8>| {
        if !is_little {
            little.reverse();
        }
        header[at..at + little.len()].copy_from_slice(&little);
    };
    if is_2 {
        put(12, UINT8.to_le_bytes().into());
        put(14, 8_i16.to_le_bytes().into());
        put(16, 3_i64.to_le_bytes().into());
        (4..8).for_each(|n| put(16 + 8 * n, 1_i64.to_le_bytes().into()));
        put(168, (NIFTI2_BYTES as i64 + 4).to_le_bytes().into());
        // Slope and intercept, and the range a viewer shows.
        [1.0, 0.0, 0.0, 0.0]
            .iter()
            .zip(0..)
            .for_each(|(value, n): (&f64, usize)| put(176 + 8 * n, value.to_le_bytes().into()));
        put(504, 0_i32.to_le_bytes().into());
    } else {
        put(40, 3_i16.to_le_bytes().into());
        (4..8).for_each(|n| put(40 + 2 * n, 1_i16.to_le_bytes().into()));
        put(68, 0_i16.to_le_bytes().into());
        put(70, UINT8.to_le_bytes().into());
        put(72, 8_i16.to_le_bytes().into());
        put(108, (NIFTI1_BYTES as f32 + 4.0).to_le_bytes().into());
        put(112, 1_f32.to_le_bytes().into());
        put(116, 0_f32.to_le_bytes().into());
        put(124, 0_f32.to_le_bytes().into());
        put(128, 0_f32.to_le_bytes().into());
    }
}

/// Returns a NIfTI-2 header of labels with an sform.
pub(super) fn new_label_header(shape: [usize; 3], affine_xyz: &[[f64; 4]; 4]) -> Vec<u8> {
    let mut header = vec![0; NIFTI2_BYTES];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(NIFTI2_BYTES as i32).to_le_bytes());
    put(4, b"n+2\0\r\n\x1a\n");
    put(104, &1_f64.to_le_bytes());
    for axis in 0..3 {
        put(24 + 8 * axis, &(shape[axis] as i64).to_le_bytes());
        let squares: f64 = (0..3).map(|row| affine_xyz[row][axis] * affine_xyz[row][axis]).sum();
        put(112 + 8 * axis, &libm::sqrt(squares).to_le_bytes());
    }
    // Scanner coordinates, in mm.
    put(348, &1_i32.to_le_bytes());
    put(500, &2_i32.to_le_bytes());
    for (row, values) in affine_xyz.iter().take(3).enumerate() {
        values
            .iter()
            .zip(0..)
            .for_each(|(value, column)| put(400 + 32 * row + 8 * column, &value.to_le_bytes()));
    }
    make_label_header(&mut header);
    header
}

/// Accepts integer and float types.
fn voxel_type(header: &NiftiHeader) -> Result<NiftiType, String> {
    use NiftiType as N;
    let refused = |got: String| format!("datatype: expected an integer or float type, got {got}");
    match header.data_type().map_err(|_| refused(header.datatype.to_string()))? {
        known @ (N::Uint8 | N::Int8 | N::Uint16 | N::Int16 | N::Uint32 | N::Int32 | N::Uint64 | N::Int64) => Ok(known),
        known @ (N::Float32 | N::Float64) => Ok(known),
        other => Err(refused(format!("{other:?}"))),
    }
}

/// The bytes of a NIfTI-2 header in the file's byte order.
struct Fields<'a> {
    bytes: &'a [u8],
    is_little: bool,
}

impl Fields<'_> {
    /// Returns a field's bytes, least significant first.
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field: [u8; N] = self.bytes[at..at + N].try_into().expect("N bytes of a slice of N");
        if !self.is_little {
            field.reverse();
        }
        field
    }

    fn i32(&self, at: usize) -> i32 {
        i32::from_le_bytes(self.array(at))
    }

    fn i64(&self, at: usize) -> i64 {
        i64::from_le_bytes(self.array(at))
    }

    fn f64(&self, at: usize) -> f64 {
        f64::from_le_bytes(self.array(at))
    }
}

/// Returns which of a file's volumes is read.
fn chosen(volume: Option<u32>, volumes: usize) -> Result<usize, String> {
    match volume.map(|volume| volume as usize) {
        _ if volumes == 1 => Ok(0),
        Some(volume) if volume < volumes => Ok(volume),
        Some(volume) => Err(format!("ingest.volume: expected below {volumes}, got {volume}")),
        None => Err(format!(
            "dim: expected one volume, got a series of {volumes}; `ingest.volume` chooses one, from 0"
        )),
    }
}

/// Returns voxels along (i, j, k), and how many such volumes the further dimensions make.
fn shape_of(dim: &[i64; 8]) -> Result<([usize; 3], usize), String> {
    if !(1..=7).contains(&dim[0]) {
        return Err(format!("dim[0]: expected 3 dimensions, got {}", dim[0]));
    }
    let used = &dim[1..=dim[0] as usize];
    if used.len() < 3 || used[..3].contains(&1) {
        return Err(format!(
            "dim: expected a volume, got a 2-D image or a single slice {used:?}"
        ));
    }
    let volumes = used[3..].iter().try_fold(1_i64, |product, side| {
        let is_size = (1..=MAX_VOLUMES).contains(side);
        is_size
            .then(|| product * side)
            .filter(|product| *product <= MAX_VOLUMES)
    });
    let Some(volumes) = volumes else {
        return Err(format!("dim: expected 1 to {MAX_VOLUMES} volumes, got {used:?}"));
    };
    if !used[..3].iter().all(|side| (2..=MAX_SIDE as i64).contains(side)) {
        return Err(format!("dim: expected 2 to {MAX_SIDE} voxels a side, got {used:?}"));
    }
    let shape: [usize; 3] = std::array::from_fn(|axis| used[axis] as usize);
    if shape.iter().product::<usize>() > MAX_VOXELS {
        return Err(format!("dim: expected at most {MAX_VOXELS} voxels, got {used:?}"));
    }
    Ok((shape, volumes as usize))
}

/// Checks that an affine places voxels of a size that scanners make, not all in one plane, within reach of its origin.
pub(super) fn check_affine(affine: &[[f64; 4]; 4]) -> Result<(), String> {
    if !affine.iter().flatten().all(|value| value.abs() <= MAX_MM) {
        return Err(format!(
            "affine: expected finite values within {MAX_MM} mm, got {affine:?}"
        ));
    }
    let lengths: [f64; 3] =
        std::array::from_fn(|column| libm::sqrt((0..3).map(|row| affine[row][column] * affine[row][column]).sum()));
    if !lengths.iter().all(|length| VOXEL_MM.contains(length)) {
        return Err(format!("affine: expected voxels of {VOXEL_MM:?} mm, got {lengths:?}"));
    }
    // The determinant of unit axes is 1 where they are perpendicular and 0 where they lie in a plane.
    if determinant(affine).abs() < MIN_DETERMINANT * lengths.iter().product::<f64>() {
        return Err(format!("affine: expected three independent axes, got {affine:?}"));
    }
    Ok(())
}

impl Frame {
    /// Returns the affine: sform before qform before pixdim.
    fn affine(&self, shape: [usize; 3]) -> Result<[[f64; 4]; 4], String> {
        let [x, y, z] = if self.sform_code > 0 {
            self.rows
        } else if self.qform_code > 0 {
            self.quaternion_rows()?
        } else {
            self.pixdim_rows(shape)
        };
        let affine = [x, y, z, [0.0, 0.0, 0.0, 1.0]];
        check_affine(&affine)?;
        Ok(affine)
    }

    /// Says where pixdim gives voxels another size than the sform, which counts.
    fn remark(&self) -> Option<String> {
        let of_sform: [f64; 3] =
            std::array::from_fn(|column| libm::sqrt(self.rows.iter().map(|row| row[column] * row[column]).sum()));
        let of_pixdim: [f64; 3] = std::array::from_fn(|axis| self.pixdim[axis + 1].abs());
        let agree = |axis: usize| (of_sform[axis] - of_pixdim[axis]).abs() <= SAME_SIZE * of_sform[axis];
        let shown = |sizes: [f64; 3]| sizes.map(|mm| format!("{mm:.4}")).join(" x ");
        (self.sform_code > 0 && !(0..3).all(agree)).then(|| {
            format!(
                "voxels of {} mm by pixdim and of {} mm by the sform: the sform counts",
                shown(of_pixdim),
                shown(of_sform)
            )
        })
    }

    fn quaternion_rows(&self) -> Result<[[f64; 4]; 3], String> {
        let [b, c, d] = self.quaternion;
        let rest = 1.0 - (b * b + c * c + d * d);
        // Rounding of single precision may take the sum slightly above 1.
        if rest < -1e-5 || rest.is_nan() {
            return Err(format!("quatern: expected a unit quaternion, got ({b}, {c}, {d})"));
        }
        let a = libm::sqrt(rest.max(0.0));
        let rotation = [
            [
                a * a + b * b - c * c - d * d,
                2.0 * (b * c - a * d),
                2.0 * (b * d + a * c),
            ],
            [
                2.0 * (b * c + a * d),
                a * a + c * c - b * b - d * d,
                2.0 * (c * d - a * b),
            ],
            [
                2.0 * (b * d - a * c),
                2.0 * (c * d + a * b),
                a * a + d * d - b * b - c * c,
            ],
        ];
        let handed = if self.pixdim[0] < 0.0 { -1.0 } else { 1.0 };
        let scale = [self.pixdim[1], self.pixdim[2], handed * self.pixdim[3]];
        Ok(std::array::from_fn(|row| {
            let m = rotation[row];
            [m[0] * scale[0], m[1] * scale[1], m[2] * scale[2], self.offset[row]]
        }))
    }

    /// Departure: the standard's "method 1" has neither sign nor offset; nibabel, which most CT in NIfTI has passed
    /// through, takes the first axis to grow to the left and centres the volume. We follow nibabel.
    fn pixdim_rows(&self, shape: [usize; 3]) -> [[f64; 4]; 3] {
        let scale = [-self.pixdim[1], self.pixdim[2], self.pixdim[3]];
        std::array::from_fn(|row| {
            let mut line = [0.0; 4];
            line[row] = scale[row];
            line[3] = -scale[row] * (shape[row] as f64 - 1.0) / 2.0;
            line
        })
    }
}

/// Returns the determinant of an affine's linear part.
fn determinant(m: &[[f64; 4]; 4]) -> f64 {
    m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1]) - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_volumes_within_limits_are_accepted() {
        assert_eq!(shape_of(&[4, 5, 6, 7, 1, 0, 0, 0]).unwrap(), ([5, 6, 7], 1));
        assert_eq!(shape_of(&[5, 5, 6, 7, 2, 3, 0, 0]).unwrap(), ([5, 6, 7], 6));
        assert!(shape_of(&[2, 5, 6, 1, 1, 1, 1, 1]).unwrap_err().contains("2-D"));
        assert!(
            shape_of(&[3, 5, 6, 1, 1, 1, 1, 1])
                .unwrap_err()
                .contains("single slice")
        );
        assert!(chosen(None, 2).unwrap_err().contains("a series of 2"));
        assert!(chosen(Some(2), 2).unwrap_err().contains("expected below 2, got 2"));
        assert_eq!((chosen(Some(1), 2), chosen(Some(7), 1)), (Ok(1), Ok(0)));
        for volumes in [0, -1, 1025] {
            assert!(shape_of(&[4, 5, 6, 7, volumes, 1, 1, 1]).unwrap_err().contains("1024"));
        }
        assert!(shape_of(&[3, 5, 6, 70_000, 1, 1, 1, 1]).unwrap_err().contains("2048"));
        assert!(
            shape_of(&[3, 2048, 2048, 2048, 1, 1, 1, 1])
                .unwrap_err()
                .contains("voxels")
        );
        assert!(shape_of(&[-1, 5, 6, 7, 1, 1, 1, 1]).is_err());
        assert!(shape_of(&[3, -5, 6, 7, 1, 1, 1, 1]).is_err());
    }
}
