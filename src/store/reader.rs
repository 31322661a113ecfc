//! One open case file: a checked header, and chunks that are copied out of a map, checked, and unpacked.
//!
//! **Damage is never served** (promise P6). Every read copies a chunk's stored bytes into memory of this thread, computes
//! the CRC-32 of that copy, and unpacks the copy. Checking once per chunk and process would be no proof: the map shows
//! what the file holds now, so bytes that were checked may change, by another process or by a page that is dropped and
//! read again from a failing disk. The copy stays in the first-level cache and the check runs at 50 GB/s: it costs 1 to 13
//! percent of a read, less than any bookkeeping of what has been checked. What was unpacked from a checked copy may be kept
//! (`cache.rs`): that is memory of this process.

use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ndarray::Array3;
use rayon::prelude::*;

use super::cache::{ChunkCache, Unpacked};
use super::decode::decode;
use super::format::{self, CaseHeader, Chunk, MAX_SIDE, PREAMBLE_BYTES};
use super::map::MappedFile;
use super::{Candidate, CaseRecord, Crop, StoreError, codec, residuals};
use crate::volume::{AIR_HU, Region};

/// Boxes that start farther away than any volume reaches are refused, so that their ends cannot overflow.
const FAR: i64 = 1 << 40;
/// Boxes of at least as many voxels are read by several threads: whole volumes, not patches, of which several are under
/// way at once.
const PARALLEL_FROM: usize = 1 << 22;

/// An open case file whose header has been checked.
pub(super) struct CaseFile {
    mapped: MappedFile,
    header: CaseHeader,
    payload_offset: u64,
    /// For each row of chunks along x, whether the kernel was told to read it: once, as a warm file needs no advice.
    advised: Vec<AtomicBool>,
    /// Placement candidates, read when they are first asked for.
    candidates: OnceLock<Places>,
    kept: Option<Kept>,
}

/// Where unpacked chunks of the file are kept.
struct Kept {
    cache: Arc<ChunkCache>,
    /// The case's position in the store.
    case: usize,
    /// For each chunk, whether it was read before.
    read: Vec<AtomicBool>,
}

/// The candidates of every organ of a case.
type Places = Vec<(u8, Vec<Candidate>)>;

/// The buffers of a box that is being read, and which box they show.
struct Target<'a> {
    region: Region,
    image: &'a mut [i16],
    labels: &'a mut [u8],
}

/// What a thread needs to read chunks; kept, because it is larger than a chunk.
#[derive(Default)]
struct Scratch {
    stored: Vec<u8>,
    hu: Vec<i16>,
    labels: Vec<u8>,
    work: residuals::Workspace,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl CaseFile {
    /// Opens a case file and checks its header and every extent in it.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let mapped = MappedFile::open(path, PREAMBLE_BYTES as u64)?;
        let damaged = |what: String| StoreError::damaged(path, what);
        let mut raw = [0; PREAMBLE_BYTES];
        mapped.copy(0, &mut raw)?;
        let preamble = format::decode_preamble(&raw, mapped.len()).map_err(damaged)?;
        let mut body = vec![0; preamble.header_bytes];
        mapped.copy(PREAMBLE_BYTES as u64, &mut body)?;
        let header = format::decode_header(&raw, &preamble, &body, mapped.len()).map_err(damaged)?;
        super::check_id(&header.record.id)?;
        let [depth, rows, _] = header.tiling.counts();
        Ok(Self {
            mapped,
            header,
            payload_offset: preamble.payload_offset,
            advised: (0..depth * rows).map(|_| AtomicBool::new(false)).collect(),
            candidates: OnceLock::new(),
            kept: None,
        })
    }

    /// Keeps packed chunks that are read again in a cache, as those of the store's case at that position.
    pub(super) fn with_cache(self, cache: Arc<ChunkCache>, case: usize) -> Self {
        let read = self.header.chunks.iter().map(|_| AtomicBool::new(false)).collect();
        Self {
            kept: Some(Kept { cache, case, read }),
            ..self
        }
    }

    /// Returns what the header says of the case.
    pub(super) fn record(&self) -> &CaseRecord {
        &self.header.record
    }

    /// Returns the bytes of memory that the open file takes, once its candidates have been read.
    pub(super) fn memory_bytes(&self) -> usize {
        let candidates = self.header.candidate_bytes as usize;
        // A flag of `Kept` beside each entry of the table.
        self.header.chunks.len() * (size_of::<Chunk>() + 1) + candidates + self.advised.len() + size_of::<Self>()
    }

    /// Reads a box; only the chunks that it meets are touched.
    pub(super) fn read(&self, region: Region) -> Result<Crop, StoreError> {
        self.check_box(region)?;
        let (mut image, mut labels) = (vec![0; region.voxels()], vec![0; region.voxels()]);
        self.read_into(region, &mut image, &mut labels)?;
        let shaped = "one element per voxel of the box";
        Ok(Crop {
            region,
            image: Array3::from_shape_vec(region.size, image).expect(shaped),
            labels: Array3::from_shape_vec(region.size, labels).expect(shaped),
        })
    }

    fn check_box(&self, region: Region) -> Result<(), StoreError> {
        if region.size.iter().any(|side| *side > 2 * MAX_SIDE) || region.start.iter().any(|v| v.abs() > FAR) {
            let what = format!("the box {region:?} is too large or too far away to be read");
            return Err(StoreError::invalid(self.mapped.path(), what));
        }
        Ok(())
    }

    /// Reads a box into buffers of one element per voxel.
    pub(super) fn read_into(&self, region: Region, image: &mut [i16], labels: &mut [u8]) -> Result<(), StoreError> {
        self.check_box(region)?;
        let part = region.intersect(&Region::whole(self.header.tiling.shape));
        if part != region {
            image.fill(AIR_HU);
        }
        // Chunks that are background throughout, most of them, are then done.
        labels.fill(0);
        if part.is_empty() {
            return Ok(());
        }
        if region.voxels() < PARALLEL_FROM {
            return self.read_planes(Target { region, image, labels });
        }
        let side = usize::from(self.header.tiling.sides[0]);
        let plane = region.size[1] * region.size[2];
        // Slabs that end where chunks do, so that no chunk is unpacked twice.
        let mut slabs = Vec::new();
        let (mut image, mut labels, mut z) = (image, labels, region.start[0]);
        while z < region.end()[0] {
            let depth = (side - z.rem_euclid(side as i64) as usize).min((region.end()[0] - z) as usize);
            let (front, back) = image.split_at_mut(depth * plane);
            let (front_labels, back_labels) = labels.split_at_mut(depth * plane);
            slabs.push(Target {
                region: Region {
                    start: [z, region.start[1], region.start[2]],
                    size: [depth, region.size[1], region.size[2]],
                },
                image: front,
                labels: front_labels,
            });
            (image, labels, z) = (back, back_labels, z + depth as i64);
        }
        slabs.into_par_iter().try_for_each(|slab| self.read_planes(slab))
    }

    /// Reads a box on this thread.
    fn read_planes(&self, mut target: Target) -> Result<(), StoreError> {
        let tiling = &self.header.tiling;
        let part = target.region.intersect(&Region::whole(tiling.shape));
        if part.is_empty() {
            return Ok(());
        }
        let sides = tiling.sides.map(usize::from);
        let first: [usize; 3] = std::array::from_fn(|axis| part.start[axis] as usize / sides[axis]);
        let last: [usize; 3] = std::array::from_fn(|axis| (part.end()[axis] as usize - 1) / sides[axis]);
        self.advise([first, last]);
        SCRATCH.with_borrow_mut(|scratch| {
            for z in first[0]..=last[0] {
                for y in first[1]..=last[1] {
                    for x in first[2]..=last[2] {
                        self.paste_kept([z, y, x], &mut target, scratch)?;
                    }
                }
            }
            Ok(())
        })
    }

    fn number(&self, [z, y, x]: [usize; 3]) -> usize {
        let [_, rows, columns] = self.header.tiling.counts();
        (z * rows + y) * columns + x
    }

    fn chunk(&self, place: [usize; 3]) -> &Chunk {
        &self.header.chunks[self.number(place)]
    }

    /// Asks the kernel to read the rows of chunks between two corners that were not asked for before.
    fn advise(&self, [first, last]: [[usize; 3]; 2]) {
        let [_, rows, columns] = self.header.tiling.counts();
        for (z, y) in (first[0]..=last[0]).flat_map(|z| (first[1]..=last[1]).map(move |y| (z, y))) {
            if self.advised[z * rows + y].swap(true, Ordering::Relaxed) {
                continue;
            }
            let (from, to) = (self.chunk([z, y, 0]), self.chunk([z, y, columns - 1]));
            // The writer puts a row in one piece; where another did not, the advice is merely useless.
            let length = (to.offset + to.length() as u64).saturating_sub(from.offset);
            self.mapped
                .will_need(self.payload_offset + from.offset, length as usize);
        }
    }

    /// Copies a chunk's stored bytes to `stored` and checks them.
    fn fetch(&self, place: [usize; 3], stored: &mut Vec<u8>) -> Result<&Chunk, StoreError> {
        let chunk = self.chunk(place);
        stored.resize(chunk.length(), 0);
        self.mapped.copy(self.payload_offset + chunk.offset, stored)?;
        if crc32fast::hash(stored) != chunk.crc {
            return Err(self.damaged(place, "the checksum does not match"));
        }
        Ok(chunk)
    }

    fn damaged(&self, place: [usize; 3], what: &str) -> StoreError {
        StoreError::damaged(self.mapped.path(), format!("chunk {place:?}: {what}"))
    }

    /// Copies what a chunk shares with the target into it, from what is kept of it where that is so.
    fn paste_kept(&self, place: [usize; 3], target: &mut Target, scratch: &mut Scratch) -> Result<(), StoreError> {
        let Some(kept) = self.kept.as_ref().filter(|_| self.chunk(place).is_packed()) else {
            return self.paste(place, target, scratch);
        };
        let number = self.number(place);
        let region = self.header.tiling.region(place);
        let window = Window::new(region, target.region);
        if let Some(unpacked) = kept.cache.get(kept.case, number) {
            window.paste(&unpacked, target);
            return Ok(());
        }
        if !kept.read[number].swap(true, Ordering::Relaxed) {
            return self.paste(place, target, scratch);
        }
        let unpacked = self.unpack(place, region, scratch)?;
        window.paste(&unpacked, target);
        kept.cache.put(kept.case, number, unpacked);
        Ok(())
    }

    /// Unpacks a whole chunk.
    fn unpack(&self, place: [usize; 3], region: Region, scratch: &mut Scratch) -> Result<Unpacked, StoreError> {
        let (mut hu, mut labels) = (vec![0; region.voxels()], vec![0; region.voxels()]);
        let mut whole = Target {
            region,
            image: &mut hu,
            labels: &mut labels,
        };
        self.paste(place, &mut whole, scratch)?;
        let is_labelled = labels.iter().any(|label| *label != 0);
        Ok(Unpacked {
            hu: hu.into(),
            labels: is_labelled.then(|| labels.into()),
        })
    }

    /// Copies what a chunk shares with the target into it. The target's labels are background before.
    fn paste(&self, place: [usize; 3], target: &mut Target, scratch: &mut Scratch) -> Result<(), StoreError> {
        let Scratch {
            stored,
            hu,
            labels,
            work,
        } = scratch;
        let chunk = self.fetch(place, stored)?;
        let (image_bytes, label_bytes) = stored.split_at(chunk.image_length as usize);
        let region = self.header.tiling.region(place);
        let window = Window::new(region, target.region);
        match chunk.image_codec {
            codec::CONSTANT => {
                let value = i16::from_le_bytes([image_bytes[0], image_bytes[1]]);
                window.rows(target.image, |_, to| to.fill(value));
            }
            codec::RAW => window.rows(target.image, |from, to| {
                let bytes = &image_bytes[2 * from..2 * (from + to.len())];
                for (to, pair) in to.iter_mut().zip(bytes.chunks_exact(2)) {
                    *to = i16::from_le_bytes([pair[0], pair[1]]);
                }
            }),
            _ => {
                // Planes after the last that is wanted are not unpacked.
                hu.resize(window.planes_needed() * region.size[1] * region.size[2], 0);
                residuals::unpack(image_bytes, region.size, hu, work).map_err(|what| self.damaged(place, &what))?;
                window.rows(target.image, |from, to| copy_row(to, &hu[from..from + to.len()]));
            }
        }
        match (chunk.labels_codec, label_bytes) {
            (codec::CONSTANT, [0]) => {}
            (codec::CONSTANT, _) => window.rows(target.labels, |_, to| to.fill(label_bytes[0])),
            (codec::RAW, _) => window.rows(target.labels, |from, to| {
                copy_row(to, &label_bytes[from..from + to.len()]);
            }),
            _ => {
                labels.resize(region.voxels(), 0);
                codec::unpack_bytes(chunk.labels_codec, label_bytes, labels)
                    .map_err(|what| self.damaged(place, &what))?;
                window.rows(target.labels, |from, to| copy_row(to, &labels[from..from + to.len()]));
            }
        }
        Ok(())
    }

    /// Reads an organ's placement candidates, deepest first; none where the case lacks the organ.
    pub(super) fn candidates(&self, organ_id: u8) -> Result<Vec<Candidate>, StoreError> {
        // Kept once checked: this is memory of ours, which nothing but this process can change.
        let all = match self.candidates.get() {
            Some(all) => all,
            None => {
                let read = self.read_candidates()?;
                self.candidates.get_or_init(|| read)
            }
        };
        let mine = all.iter().find(|(id, _)| *id == organ_id);
        Ok(mine.map_or_else(Vec::new, |(_, candidates)| candidates.clone()))
    }

    /// Reads and checks the block of candidates.
    fn read_candidates(&self) -> Result<Places, StoreError> {
        let block = &self.header.candidates;
        let damaged = |what: String| StoreError::damaged(self.mapped.path(), format!("candidate block: {what}"));
        let mut stored = vec![0; block.length as usize];
        self.mapped.copy(self.payload_offset + block.offset, &mut stored)?;
        if crc32fast::hash(&stored) != block.crc {
            return Err(damaged("the checksum does not match".into()));
        }
        let mut bytes = vec![0; self.header.candidate_bytes as usize];
        codec::unpack_bytes(block.codec, &stored, &mut bytes).map_err(damaged)?;
        let all: Places =
            decode(&mut bytes.as_slice(), bytes.len() as u64).map_err(|error| damaged(error.to_string()))?;
        let shape = self.header.record.grid.shape;
        let is_inside = |place: &Candidate| (0..3).all(|axis| usize::from(place.voxel[axis]) < shape[axis]);
        if !all.iter().all(|(_, places)| places.iter().all(is_inside)) {
            return Err(damaged("a voxel outside the volume".into()));
        }
        Ok(all)
    }

    /// Checks every block of the file.
    pub(super) fn verify(&self) -> Result<(), StoreError> {
        let places: Vec<_> = self.header.tiling.places().collect();
        places.into_par_iter().try_for_each(|place| {
            let region = self.header.tiling.region(place);
            let (mut image, mut labels) = (vec![0; region.voxels()], vec![0; region.voxels()]);
            let mut target = Target {
                region,
                image: &mut image,
                labels: &mut labels,
            };
            SCRATCH.with_borrow_mut(|scratch| self.paste(place, &mut target, scratch))
        })?;
        self.read_candidates().map(drop)
    }
}

/// The voxels that a chunk shares with a target.
struct Window {
    /// First voxel in the chunk and in the target.
    from: [usize; 3],
    to: [usize; 3],
    size: [usize; 3],
    chunk: [usize; 3],
    target: [usize; 3],
}

impl Window {
    fn new(chunk: Region, target: Region) -> Self {
        let shared = chunk.intersect(&target);
        Self {
            from: shared.relative_to(chunk.start).start.map(|v| v as usize),
            to: shared.relative_to(target.start).start.map(|v| v as usize),
            size: shared.size,
            chunk: chunk.size,
            target: target.size,
        }
    }

    /// Returns how many of the chunk's planes, from the first on, are needed.
    fn planes_needed(&self) -> usize {
        self.from[0] + self.size[0]
    }

    /// Copies what the target shares of an unpacked chunk. The target's labels are background before.
    fn paste(&self, chunk: &Unpacked, target: &mut Target) {
        self.rows(target.image, |from, to| copy_row(to, &chunk.hu[from..from + to.len()]));
        if let Some(labels) = &chunk.labels {
            self.rows(target.labels, |from, to| copy_row(to, &labels[from..from + to.len()]));
        }
    }

    /// Calls `copy` for every shared row, with the place of its first voxel in the chunk and the row in the target.
    #[inline(always)]
    fn rows<T>(&self, target: &mut [T], mut copy: impl FnMut(usize, &mut [T])) {
        let [depth, rows, width] = self.size;
        for z in 0..depth {
            let from = ((self.from[0] + z) * self.chunk[1] + self.from[1]) * self.chunk[2] + self.from[2];
            let to = ((self.to[0] + z) * self.target[1] + self.to[1]) * self.target[2] + self.to[2];
            for y in 0..rows {
                let to = to + y * self.target[2];
                copy(from + y * self.chunk[2], &mut target[to..to + width]);
            }
        }
    }
}

/// Copies a row; a whole one of the usual width without a call.
#[inline(always)]
fn copy_row<T: Copy>(to: &mut [T], from: &[T]) {
    match (<&mut [T; 32]>::try_from(&mut *to), <&[T; 32]>::try_from(from)) {
        (Ok(to), Ok(from)) => *to = *from,
        _ => to.copy_from_slice(from),
    }
}
