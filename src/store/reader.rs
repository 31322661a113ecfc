//! One open case file: a checked header and chunks read through a memory map. The only `unsafe` of the store.
//!
//! **A mapped file can shrink.** Touching a mapped page past the end of its file raises SIGBUS, which kills the process.
//! So mapped bytes are never dereferenced here: after a check of the file's length they are copied by the kernel
//! (`process_vm_readv` from this process to itself), which answers EFAULT where a load would fault. That closes the race
//! between check and use as well. Where the call is missing or forbidden (another system, a seccomp profile), the same
//! bytes are read with `pread`, which cannot fault either. Bytes that change under the map fail their CRC-32, which is
//! computed over the copy that is used.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use ndarray::{Array3, s};

use super::codec;
use super::format::{self, Block, CHUNK_SIDE, CaseHeader, MAX_SIDE, PREAMBLE_BYTES};
use super::{Candidate, CaseRecord, Crop, StoreError};
use crate::volume::{AIR_HU, Region};

/// Boxes that start farther away than any volume reaches are refused, so that their ends cannot overflow.
const FAR: i64 = 1 << 40;

/// A file and its map.
struct MappedFile {
    path: PathBuf,
    file: fs_err::File,
    map: Mmap,
}

impl MappedFile {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let file = fs_err::File::open(path)?;
        if file.metadata()?.len() < PREAMBLE_BYTES as u64 {
            return Err(StoreError::damaged(path, "shorter than a preamble"));
        }
        // SAFETY: the map is read-only and no reference into it is ever made: `copy` hands its address to the kernel,
        // which copies or refuses. So neither a change nor a truncation of the file by another process can break the
        // rules of Rust's references or raise SIGBUS. `file` stays open beside the map.
        let map = unsafe { Mmap::map(file.file()) }?;
        Ok(Self {
            path: path.into(),
            file,
            map,
        })
    }

    /// Copies `length` bytes at `offset`, or says that the file has become too short.
    fn copy(&self, offset: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        let cut = |now: u64| {
            StoreError::damaged(
                &self.path,
                format!("{length} bytes at {offset} lie past its present end at {now}: truncated while open"),
            )
        };
        let end = offset.checked_add(length as u64);
        let now = self.file.metadata()?.len();
        if end.is_none_or(|end| end > now.min(self.map.len() as u64)) {
            return Err(cut(now));
        }
        let mut bytes = vec![0; length];
        match self.copy_mapped(offset, &mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Err(cut(self.file.metadata()?.len())),
            Err(_) => {
                self.file.file().read_exact_at(&mut bytes, offset).map_err(|error| {
                    std::io::Error::new(error.kind(), format!("{}: cannot read: {error}", self.path.display()))
                })?;
                Ok(bytes)
            }
        }
    }

    /// Lets the kernel copy mapped bytes; EFAULT where their pages are gone.
    #[cfg(target_os = "linux")]
    fn copy_mapped(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let local = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let remote = libc::iovec {
            iov_base: self.map.as_ptr().wrapping_add(offset as usize).cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: `local` is an exclusive buffer of `iov_len` bytes that outlives the call; the kernel itself checks the
        // remote range, which `copy` has bounded by the map's length.
        let copied = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        match usize::try_from(copied) {
            Ok(copied) if copied == bytes.len() => Ok(()),
            // The kernel stops early where a later page is gone.
            Ok(_) => Err(std::io::Error::from_raw_os_error(libc::EFAULT)),
            Err(_) => Err(std::io::Error::last_os_error()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn copy_mapped(&self, _offset: u64, _bytes: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// An open case file whose header has been checked.
pub(super) struct CaseFile {
    mapped: MappedFile,
    header: CaseHeader,
    payload_offset: u64,
}

impl CaseFile {
    /// Opens a case file and checks its header and every extent in it.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let mapped = MappedFile::open(path)?;
        let file_bytes = mapped.map.len() as u64;
        let damaged = |what: String| StoreError::damaged(path, what);
        let raw: [u8; PREAMBLE_BYTES] = mapped
            .copy(0, PREAMBLE_BYTES)?
            .try_into()
            .expect("as many bytes as were asked for");
        let preamble = format::decode_preamble(&raw, file_bytes).map_err(damaged)?;
        let body = mapped.copy(PREAMBLE_BYTES as u64, preamble.header_bytes)?;
        let header = format::decode_header(&raw, &preamble, &body, file_bytes).map_err(damaged)?;
        super::check_id(&header.record.id)?;
        Ok(Self {
            mapped,
            header,
            payload_offset: preamble.payload_offset,
        })
    }

    /// Returns what the header says of the case.
    pub(super) fn record(&self) -> &CaseRecord {
        &self.header.record
    }

    /// Reads a box; only the chunks that it meets are touched.
    pub(super) fn read(&self, region: Region) -> Result<Crop, StoreError> {
        let shape = self.header.record.grid.shape;
        if region.size.iter().any(|side| *side > 2 * MAX_SIDE) || region.start.iter().any(|v| v.abs() > FAR) {
            let what = format!("the box {region:?} is too large or too far away to be read");
            return Err(StoreError::invalid(&self.mapped.path, what));
        }
        let mut crop = Crop {
            region,
            image: Array3::from_elem(region.size, AIR_HU),
            labels: Array3::zeros(region.size),
        };
        let part = region.intersect(&Region::whole(shape));
        if part.is_empty() {
            return Ok(crop);
        }
        let first = part.start.map(|v| v as usize / CHUNK_SIDE);
        let last = part.end().map(|v| (v as usize - 1) / CHUNK_SIDE);
        let counts = format::chunk_counts(shape);
        for z in first[0]..=last[0] {
            for y in first[1]..=last[1] {
                for x in first[2]..=last[2] {
                    self.paste((z * counts[1] + y) * counts[2] + x, &mut crop)?;
                }
            }
        }
        Ok(crop)
    }

    /// Copies what a chunk shares with a crop into it.
    fn paste(&self, number: usize, crop: &mut Crop) -> Result<(), StoreError> {
        let chunk = format::chunk_region(self.header.record.grid.shape, number);
        let shared = chunk.intersect(&crop.region);
        let image = self.bytes(&self.header.image[number], chunk.voxels(), 2, "image chunk", number)?;
        let labels = self.bytes(&self.header.labels[number], chunk.voxels(), 1, "label chunk", number)?;
        let hu = image.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]]));
        copy_box(hu.collect(), chunk, shared, crop.region, &mut crop.image);
        copy_box(labels, chunk, shared, crop.region, &mut crop.labels);
        Ok(())
    }

    /// Copies, checks and unpacks one block.
    fn bytes(
        &self,
        block: &Block,
        elements: usize,
        element_bytes: usize,
        what: &str,
        number: usize,
    ) -> Result<Vec<u8>, StoreError> {
        let packed = self
            .mapped
            .copy(self.payload_offset + block.offset, block.length as usize)?;
        let damaged = |why: String| StoreError::damaged(&self.mapped.path, format!("{what} {number}: {why}"));
        if crc32fast::hash(&packed) != block.crc {
            return Err(damaged("the checksum does not match".into()));
        }
        codec::unpack(block.codec, packed, elements, element_bytes).map_err(damaged)
    }

    /// Reads an organ's placement candidates, deepest first; none where the case lacks the organ.
    pub(super) fn candidates(&self, organ_id: u8) -> Result<Vec<Candidate>, StoreError> {
        let bytes = self.bytes(
            &self.header.candidates,
            self.header.candidate_bytes as usize,
            1,
            "candidate block",
            0,
        )?;
        let (all, _): (Vec<(u8, Vec<Candidate>)>, usize) = bincode::decode_from_slice(&bytes, format::header_config())
            .map_err(|error| StoreError::damaged(&self.mapped.path, format!("candidate block: {error}")))?;
        let shape = self.header.record.grid.shape;
        let is_inside = |place: &Candidate| (0..3).all(|axis| usize::from(place.voxel[axis]) < shape[axis]);
        if !all.iter().all(|(_, places)| places.iter().all(is_inside)) {
            return Err(StoreError::damaged(
                &self.mapped.path,
                "candidate block: a voxel outside the volume",
            ));
        }
        let mine = all.into_iter().find(|(id, _)| *id == organ_id);
        Ok(mine.map_or_else(Vec::new, |(_, candidates)| candidates))
    }

    /// Checks every block of the file.
    pub(super) fn verify(&self) -> Result<(), StoreError> {
        let shape = self.header.record.grid.shape;
        for (number, (image, labels)) in self.header.image.iter().zip(&self.header.labels).enumerate() {
            let voxels = format::chunk_region(shape, number).voxels();
            self.bytes(image, voxels, 2, "image chunk", number)?;
            self.bytes(labels, voxels, 1, "label chunk", number)?;
        }
        self.candidates(0).map(drop)
    }
}

/// Copies the voxels of `shared` from a chunk at `from` into an array at `to`.
fn copy_box<T: Copy>(values: Vec<T>, from: Region, shared: Region, to: Region, out: &mut Array3<T>) {
    let chunk = Array3::from_shape_vec(from.size, values).expect("unpack returns one value per voxel");
    let [d, h, w] = shared.size;
    let [z, y, x] = shared.relative_to(from.start).start.map(|v| v as usize);
    let [oz, oy, ox] = shared.relative_to(to.start).start.map(|v| v as usize);
    out.slice_mut(s![oz..oz + d, oy..oy + h, ox..ox + w])
        .assign(&chunk.slice(s![z..z + d, y..y + h, x..x + w]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_gone_is_an_error_and_not_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("case");
        std::fs::write(&path, vec![7; 3 * 4096]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert_eq!(mapped.copy(5000, 3).unwrap(), [7; 3]);
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(4096)
            .unwrap();
        // Past the check of the length: what happens where the file shrinks between check and copy.
        let mut bytes = [0; 4];
        if cfg!(target_os = "linux") {
            let error = mapped.copy_mapped(9000, &mut bytes).unwrap_err();
            assert!(
                matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EPERM | libc::ENOSYS)),
                "{error}"
            );
        }
        let error = mapped.copy(9000, 4).unwrap_err().to_string();
        assert!(
            error.contains("case") && error.contains("truncated while open"),
            "{error}"
        );
    }
}
