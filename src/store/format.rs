//! The case file's layout: preamble, header, chunk table. Pure bytes, no files; `docs/store-format.md` spells it out.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};

use super::decode::decode;
use super::{CaseRecord, TumourRecord};
use super::{codec, residuals};
use crate::volume::{Region, Shape};

/// The first eight bytes of a case file; the line break shows a transfer that rewrote line ends.
pub(super) const CASE_MAGIC: [u8; 8] = *b"FTCASE\r\n";
/// The layout this code writes and reads.
pub(super) const CASE_VERSION: u32 = 3;
/// Bytes before the header.
pub(super) const PREAMBLE_BYTES: usize = 32;
/// Voxels along each side of the chunks that are written. A random patch also reads what it does not show of the chunks it
/// meets: small chunks waste less, large ones share the cost of a row's copy and of a Huffman table.
pub(super) const CHUNK_SIDES: [u8; 3] = [16, 16, 32];
/// The longest side of a chunk.
const MAX_CHUNK_SIDE: usize = residuals::MAX_ROW;
/// The longest side of a stored volume; candidates keep voxels in 16 bits, and the chunk table stays under 16 MiB.
pub(super) const MAX_SIDE: usize = 2048;
/// The most header bytes that are read.
pub(super) const MAX_HEADER_BYTES: usize = 32 << 20;
/// The most bytes of a block of candidates.
pub(super) const MAX_CANDIDATE_BYTES: usize = 8 << 20;

/// Fixed-width little-endian integers, so that the layout can be written down; nothing larger than the limit is read.
pub(super) type HeaderConfig = Configuration<LittleEndian, Fixint, Limit<{ 4 * MAX_HEADER_BYTES }>>;

/// Returns how headers and candidate blocks are encoded. The limit counts decoded sizes, hence the factor of four.
pub(super) fn header_config() -> HeaderConfig {
    bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<{ 4 * MAX_HEADER_BYTES }>()
}

/// Where a block of bytes stands in the payload and how it is coded.
#[derive(Clone, Copy, Debug, PartialEq, bincode::Encode, bincode::Decode)]
pub(super) struct Block {
    /// See [`codec`].
    pub(super) codec: u8,
    /// First byte, counted from the payload's start.
    pub(super) offset: u64,
    /// Bytes as stored.
    pub(super) length: u32,
    /// CRC-32 of the bytes as stored.
    pub(super) crc: u32,
}

/// One chunk: its image as stored, directly followed by its labels as stored.
#[derive(Clone, Copy, Debug, PartialEq, bincode::Encode, bincode::Decode)]
pub(super) struct Chunk {
    /// First byte, counted from the payload's start.
    pub(super) offset: u64,
    /// Bytes of the image as stored.
    pub(super) image_length: u32,
    /// Bytes of the labels as stored.
    pub(super) labels_length: u32,
    /// CRC-32 of both as stored.
    pub(super) crc: u32,
    /// See [`codec`].
    pub(super) image_codec: u8,
    /// See [`codec`].
    pub(super) labels_codec: u8,
}

impl Chunk {
    /// Tells whether reading it takes more than a copy.
    pub(super) fn is_packed(&self) -> bool {
        self.image_codec == codec::RESIDUALS || self.labels_codec == codec::ZSTD
    }

    /// Returns the bytes of both.
    pub(super) fn length(&self) -> usize {
        self.image_length as usize + self.labels_length as usize
    }
}

/// How a volume is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, bincode::Encode, bincode::Decode)]
pub(super) struct Tiling {
    /// Voxels of the volume.
    pub(super) shape: Shape,
    /// Voxels of a chunk; those at the far borders are smaller.
    pub(super) sides: [u8; 3],
}

impl Tiling {
    /// Returns how many chunks cover the volume along each axis.
    pub(super) fn counts(&self) -> Shape {
        std::array::from_fn(|axis| self.shape[axis].div_ceil(usize::from(self.sides[axis])))
    }

    /// Returns the box of the chunk at a place, cut at the volume's border.
    pub(super) fn region(&self, place: [usize; 3]) -> Region {
        let start: Shape = std::array::from_fn(|axis| place[axis] * usize::from(self.sides[axis]));
        Region {
            start: start.map(|v| v as i64),
            size: std::array::from_fn(|axis| usize::from(self.sides[axis]).min(self.shape[axis] - start[axis])),
        }
    }

    /// Returns the places of all chunks in their order, x fastest.
    pub(super) fn places(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [depth, rows, columns] = self.counts();
        (0..depth * rows * columns).map(move |n| [n / (rows * columns), n / columns % rows, n % columns])
    }
}

/// What a case file says before its chunks.
#[derive(Clone, Debug, PartialEq, bincode::Encode, bincode::Decode)]
pub(super) struct CaseHeader {
    /// Everything known of the case.
    pub(super) record: CaseRecord,
    /// How the volume is cut.
    pub(super) tiling: Tiling,
    /// The chunks, x fastest.
    pub(super) chunks: Vec<Chunk>,
    /// Placement candidates of all organs.
    pub(super) candidates: Block,
    /// Bytes of the candidates before compression.
    pub(super) candidate_bytes: u32,
}

/// The fields of a preamble.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Preamble {
    /// Bytes of the header, directly after the preamble.
    pub(super) header_bytes: usize,
    /// First byte of the payload.
    pub(super) payload_offset: u64,
    crc: u32,
}

/// Encodes preamble and header; chunks follow at the returned offset.
pub(super) fn encode_head(header: &CaseHeader) -> Result<Vec<u8>, String> {
    let body = bincode::encode_to_vec(header, header_config()).map_err(|error| format!("header: {error}"))?;
    if body.len() > MAX_HEADER_BYTES {
        return Err(format!("header: {} bytes, at most {MAX_HEADER_BYTES}", body.len()));
    }
    let header_bytes = u32::try_from(body.len()).map_err(|_| "header: too long".to_string())?;
    let payload_offset = (PREAMBLE_BYTES + body.len()).next_multiple_of(64);
    let mut head = Vec::with_capacity(payload_offset);
    head.extend(CASE_MAGIC);
    head.extend(CASE_VERSION.to_le_bytes());
    head.extend(header_bytes.to_le_bytes());
    head.extend((payload_offset as u64).to_le_bytes());
    head.extend([0; 4]);
    let crc = head_crc(&head, &body);
    head.extend(crc.to_le_bytes());
    head.extend(body);
    head.resize(payload_offset, 0);
    Ok(head)
}

/// The header's checksum also covers the preamble's own fields.
fn head_crc(preamble: &[u8], header: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&preamble[..28]);
    hasher.update(header);
    hasher.finalize()
}

/// Reads a preamble; the header's length is bounded by the file's.
pub(super) fn decode_preamble(bytes: &[u8; PREAMBLE_BYTES], file_bytes: u64) -> Result<Preamble, String> {
    if bytes[..8] != CASE_MAGIC {
        return Err(format!(
            "expected the magic bytes of a case file, got {:02x?}",
            &bytes[..8]
        ));
    }
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes of a slice of four"));
    let version = word(8);
    if version != CASE_VERSION {
        return Err(format!(
            "expected layout version {CASE_VERSION}, got {version}: written by another release, ingest the case again"
        ));
    }
    let header_bytes = word(12) as usize;
    let payload_offset = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes of a slice of eight"));
    let header_end = (PREAMBLE_BYTES + header_bytes) as u64;
    if header_bytes > MAX_HEADER_BYTES || header_end > payload_offset || payload_offset > file_bytes {
        return Err(format!(
            "the header ends at byte {header_end} and the payload starts at {payload_offset}, in a file of \
             {file_bytes} bytes"
        ));
    }
    Ok(Preamble {
        header_bytes,
        payload_offset,
        crc: word(28),
    })
}

/// Checks and reads a header, and every extent in it.
pub(super) fn decode_header(
    raw_preamble: &[u8; PREAMBLE_BYTES],
    preamble: &Preamble,
    bytes: &[u8],
    file_bytes: u64,
) -> Result<CaseHeader, String> {
    if head_crc(raw_preamble, bytes) != preamble.crc {
        return Err("the header's checksum does not match".into());
    }
    let mut rest = bytes;
    let header: CaseHeader = decode(&mut rest, bytes.len() as u64).map_err(|error| format!("header: {error}"))?;
    if !rest.is_empty() {
        let used = bytes.len() - rest.len();
        return Err(format!("the header holds {used} bytes, {} were announced", bytes.len()));
    }
    check_header(&header, file_bytes - preamble.payload_offset)?;
    Ok(header)
}

/// Checks the shape, the number of chunks and that each lies in the payload with a length its codec allows.
fn check_header(header: &CaseHeader, payload_bytes: u64) -> Result<(), String> {
    let shape = header.record.grid.shape;
    if !shape.iter().all(|side| (1..=MAX_SIDE).contains(side)) {
        return Err(format!("shape {shape:?}: expected 1 to {MAX_SIDE} voxels a side"));
    }
    check_places(&header.record)?;
    header.record.refusal().map_or(Ok(()), Err)?;
    check_chunks(header, payload_bytes)?;
    let candidate_bytes = header.candidate_bytes as usize;
    if candidate_bytes > MAX_CANDIDATE_BYTES {
        return Err(format!(
            "{candidate_bytes} bytes of candidates, at most {MAX_CANDIDATE_BYTES}"
        ));
    }
    let block = &header.candidates;
    check_extent(block.offset, block.length as usize, payload_bytes)
        .and_then(|()| codec::check_length(block.codec, block.length as usize, candidate_bytes, 1))
        .map_err(|what| format!("candidates: {what}"))
}

/// Checks the tiling and every chunk's place and length.
fn check_chunks(header: &CaseHeader, payload_bytes: u64) -> Result<(), String> {
    let Tiling { shape, sides } = header.tiling;
    let longest = sides.into_iter().max().unwrap_or(0);
    let voxels: usize = sides.into_iter().map(usize::from).product();
    if usize::from(longest) > MAX_CHUNK_SIDE || !(1..=residuals::MAX_VOXELS).contains(&voxels) {
        return Err(format!(
            "chunks of {sides:?}: expected sides of 1 to {MAX_CHUNK_SIDE} and at most {} voxels",
            residuals::MAX_VOXELS
        ));
    }
    if shape != header.record.grid.shape {
        return Err(format!(
            "chunks of a volume of {shape:?}, the record has {:?}",
            header.record.grid.shape
        ));
    }
    let count: usize = header.tiling.counts().iter().product();
    if header.chunks.len() != count {
        return Err(format!("expected {count} chunks, got {}", header.chunks.len()));
    }
    for (chunk, place) in header.chunks.iter().zip(header.tiling.places()) {
        let voxels = header.tiling.region(place).voxels();
        let image = codec::check_length(chunk.image_codec, chunk.image_length as usize, voxels, 2);
        let labels = codec::check_length(chunk.labels_codec, chunk.labels_length as usize, voxels, 1);
        check_extent(chunk.offset, chunk.length(), payload_bytes)
            .and(image)
            .and(labels)
            .map_err(|what| format!("chunk {place:?}: {what}"))?;
    }
    Ok(())
}

/// Checks that everything the record places lies in the volume, so that its users may index with it.
fn check_places(record: &CaseRecord) -> Result<(), String> {
    let side = record.grid.shape.map(|side| side as i64);
    let is_inside = |voxel: [i64; 3]| (0..3).all(|axis| (0..side[axis]).contains(&voxel[axis]));
    let fits = |region: &Region| {
        let small = (0..3).all(|axis| region.size[axis] >= 1 && region.size[axis] <= record.grid.shape[axis]);
        small && is_inside(region.start) && is_inside(region.end().map(|end| end - 1))
    };
    if let Some(organ) = record.organs.iter().find(|organ| !fits(&organ.region)) {
        return Err(format!(
            "organ {}: its box {:?} leaves the volume",
            organ.id, organ.region
        ));
    }
    let lost = |tumour: &&TumourRecord| !fits(&tumour.region) || !is_inside(tumour.centre);
    match record.tumours.iter().find(lost) {
        Some(tumour) => Err(format!("tumour at {:?}: it leaves the volume", tumour.centre)),
        None => Ok(()),
    }
}

fn check_extent(offset: u64, length: usize, payload_bytes: u64) -> Result<(), String> {
    let end = offset.checked_add(length as u64);
    if end.is_none_or(|end| end > payload_bytes) {
        return Err(format!(
            "{length} bytes at {offset} reach past the payload's {payload_bytes}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_the_volume() {
        let tiling = Tiling {
            shape: [33, 64, 31],
            sides: [16, 16, 32],
        };
        assert_eq!(tiling.counts(), [3, 4, 1]);
        let voxels: usize = tiling.places().map(|place| tiling.region(place).voxels()).sum();
        assert_eq!(voxels, 33 * 64 * 31);
        let last = tiling.places().last().map(|place| tiling.region(place));
        assert_eq!(
            last,
            Some(Region {
                start: [32, 48, 0],
                size: [1, 16, 31]
            })
        );
    }

    #[test]
    fn a_preamble_that_points_past_the_file_is_refused() {
        let mut bytes = [0; PREAMBLE_BYTES];
        assert!(decode_preamble(&bytes, 1 << 20).unwrap_err().contains("magic"));
        bytes[..8].copy_from_slice(&CASE_MAGIC);
        bytes[8] = 9;
        assert!(
            decode_preamble(&bytes, 1 << 20)
                .unwrap_err()
                .contains("version 3, got 9")
        );
        bytes[8] = 3;
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(
            decode_preamble(&bytes, 1 << 20)
                .unwrap_err()
                .contains("file of 1048576")
        );
    }
}
