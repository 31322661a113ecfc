//! The frame: a 32-byte little-endian preamble, a header and a payload.
//!
//! ```text
//! offset  0  magic "FTUM"          offset 12  header length, u32
//!         4  version, u16 = 1             16  payload length, u64
//!         6  kind, u16                    24  CRC-32 (IEEE) of the header, u32
//!         8  flags, u32 = 0               28  reserved, 4 bytes of 0
//! ```

use std::io::{self, Read};

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"FTUM";
/// The version of the frame format.
pub const VERSION: u16 = 1;
/// Bytes before the header.
pub const PREAMBLE_BYTES: usize = 32;
/// The largest header that a reader accepts: 16 MiB.
pub const MAX_HEADER_BYTES: u32 = 16 << 20;
/// The largest frame, everything included: 256 MiB.
pub const MAX_FRAME_BYTES: u64 = 256 << 20;

/// What a frame is; readers skip kinds they do not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The stream's header, once and first.
    Header,
    /// A step's patches.
    Batch,
    /// Nothing new: the connection is alive.
    Heartbeat,
    /// The stream ended as it should.
    End,
    /// The stream failed.
    Error,
    /// A kind of a later version.
    Unknown(u16),
}

impl From<u16> for Kind {
    fn from(code: u16) -> Self {
        match code {
            1 => Self::Header,
            2 => Self::Batch,
            3 => Self::Heartbeat,
            4 => Self::End,
            5 => Self::Error,
            other => Self::Unknown(other),
        }
    }
}

impl From<Kind> for u16 {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Header => 1,
            Kind::Batch => 2,
            Kind::Heartbeat => 3,
            Kind::End => 4,
            Kind::Error => 5,
            Kind::Unknown(code) => code,
        }
    }
}

/// Bytes that are no frame of ours.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("cannot read the stream")]
    Read(#[from] io::Error),
    /// The bytes end inside a frame.
    #[error("the stream was cut inside a frame")]
    Cut,
    /// Another protocol.
    #[error("expected a frame starting with {MAGIC:02x?}, got {0:02x?}")]
    Magic([u8; 4]),
    /// A version of the frame that this reader does not know.
    #[error("expected frame version {VERSION}, got {0}")]
    Version(u16),
    /// A length over the limit.
    #[error("frame {part} length: expected at most {limit} bytes, got {got}")]
    TooLong {
        /// `header` or `payload`.
        part: &'static str,
        /// The largest length.
        limit: u64,
        /// What the preamble says.
        got: u64,
    },
    /// Bytes changed on the way.
    #[error("{what}: expected CRC-32 {expected:08x}, got {got:08x}")]
    Checksum {
        /// `frame header`, or a tensor's name.
        what: String,
        /// What was sent.
        expected: u32,
        /// What arrived.
        got: u32,
    },
    /// A header that is no protobuf message of its kind, or contradicts its payload.
    #[error("frame header: {0}")]
    Header(String),
}

impl From<prost::DecodeError> for FrameError {
    fn from(error: prost::DecodeError) -> Self {
        Self::Header(error.to_string())
    }
}

/// The fixed part in front of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// What the frame is.
    pub kind: Kind,
    /// Bytes of the header.
    pub header_length: u32,
    /// Bytes of the payload.
    pub payload_length: u64,
    /// CRC-32 of the header.
    pub header_crc32: u32,
}

impl Preamble {
    /// Returns the preamble's bytes.
    pub fn to_bytes(&self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&u16::from(self.kind).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.header_length.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.payload_length.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.header_crc32.to_le_bytes());
        bytes
    }

    /// Reads a preamble and checks its lengths. Flags and reserved bytes are ignored: later versions may use them.
    ///
    /// # Errors
    /// [`FrameError`] where the bytes are no preamble of this version or promise more than the limits.
    pub fn from_bytes(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, FrameError> {
        let magic = take(bytes, 0);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let version = u16::from_le_bytes(take(bytes, 4));
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let preamble = Self {
            kind: u16::from_le_bytes(take(bytes, 6)).into(),
            header_length: u32::from_le_bytes(take(bytes, 12)),
            payload_length: u64::from_le_bytes(take(bytes, 16)),
            header_crc32: u32::from_le_bytes(take(bytes, 24)),
        };
        let too_long = |part, limit, got| Err(FrameError::TooLong { part, limit, got });
        if preamble.header_length > MAX_HEADER_BYTES {
            return too_long("header", MAX_HEADER_BYTES.into(), preamble.header_length.into());
        }
        if preamble.payload_length > MAX_FRAME_BYTES {
            return too_long("payload", MAX_FRAME_BYTES, preamble.payload_length);
        }
        Ok(preamble)
    }
}

fn take<const N: usize>(bytes: &[u8; PREAMBLE_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// A frame in pieces, so that a payload goes from the encoder to the socket without being copied.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Preamble and header.
    pub head: Bytes,
    /// The tensors, piece by piece.
    pub payload: Vec<Bytes>,
}

impl Parts {
    /// Returns how many bytes the frame has.
    pub fn length(&self) -> usize {
        self.head.len() + self.payload.iter().map(Bytes::len).sum::<usize>()
    }

    /// Returns the whole frame in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        [&self.head[..], &self.payload.concat()].concat()
    }
}

/// Returns a whole frame.
///
/// # Errors
/// [`FrameError::TooLong`] where header or payload are over the limits.
pub fn encode<M: Message>(kind: Kind, header: &M, payload: &[u8]) -> Result<Bytes, FrameError> {
    let mut frame = head(kind, header, payload.len())?;
    frame.put_slice(payload);
    Ok(frame.freeze())
}

/// Returns a frame around a payload that is not copied.
///
/// # Errors
/// [`FrameError::TooLong`] where header or payload are over the limits.
pub fn parts<M: Message>(kind: Kind, header: &M, payload: Vec<Bytes>) -> Result<Parts, FrameError> {
    let head = head(kind, header, payload.iter().map(Bytes::len).sum())?.freeze();
    Ok(Parts { head, payload })
}

/// Returns preamble and header of a frame.
fn head<M: Message>(kind: Kind, header: &M, payload_length: usize) -> Result<BytesMut, FrameError> {
    let too_long = |part, limit: u64, got: usize| FrameError::TooLong {
        part,
        limit,
        got: got as u64,
    };
    let length = header.encoded_len();
    let header_length = u32::try_from(length)
        .ok()
        .filter(|length| *length <= MAX_HEADER_BYTES)
        .ok_or(too_long("header", MAX_HEADER_BYTES.into(), length))?;
    let total = PREAMBLE_BYTES + length + payload_length;
    if total as u64 > MAX_FRAME_BYTES {
        return Err(too_long("payload", MAX_FRAME_BYTES, total));
    }
    let mut frame = BytesMut::with_capacity(PREAMBLE_BYTES + length);
    frame.put_bytes(0, PREAMBLE_BYTES);
    header
        .encode(&mut frame)
        .expect("the buffer grows with what is written to it");
    let preamble = Preamble {
        kind,
        header_length,
        payload_length: payload_length as u64,
        header_crc32: crc32fast::hash(&frame[PREAMBLE_BYTES..]),
    };
    frame[..PREAMBLE_BYTES].copy_from_slice(&preamble.to_bytes());
    Ok(frame)
}

/// A frame as it was read, its header's checksum verified.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The protobuf header.
    pub header: Vec<u8>,
    /// The tensors.
    pub payload: Vec<u8>,
}

/// Reads the next frame, or nothing where the stream ends between frames.
///
/// # Errors
/// [`FrameError`] for bytes that are no frame, over a limit, damaged or cut.
pub fn read(source: &mut impl Read) -> Result<Option<Frame>, FrameError> {
    let mut bytes = [0; PREAMBLE_BYTES];
    match fill(source, &mut bytes)? {
        0 => return Ok(None),
        PREAMBLE_BYTES => {}
        _ => return Err(FrameError::Cut),
    }
    let preamble = Preamble::from_bytes(&bytes)?;
    let header = read_part(source, preamble.header_length.into())?;
    let got = crc32fast::hash(&header);
    if got != preamble.header_crc32 {
        return Err(FrameError::Checksum {
            what: "frame header".into(),
            expected: preamble.header_crc32,
            got,
        });
    }
    Ok(Some(Frame {
        kind: preamble.kind,
        header,
        payload: read_part(source, preamble.payload_length)?,
    }))
}

/// Reads exactly `length` bytes. Memory grows with what arrives, not with what the preamble promises.
fn read_part(source: &mut impl Read, length: u64) -> Result<Vec<u8>, FrameError> {
    let mut part = Vec::new();
    let got = source.take(length).read_to_end(&mut part)?;
    if got as u64 == length {
        Ok(part)
    } else {
        Err(FrameError::Cut)
    }
}

/// Reads until the buffer is full or the source ends, and returns how much was read.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::Heartbeat;

    #[test]
    fn a_frame_round_trips_and_a_flipped_header_byte_is_found() {
        let bytes = encode(Kind::Heartbeat, &Heartbeat { waiting_seconds: 300 }, b"abc").unwrap();
        let frame = read(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!((frame.kind, &frame.payload[..]), (Kind::Heartbeat, &b"abc"[..]));
        let mut damaged = bytes.to_vec();
        damaged[PREAMBLE_BYTES] ^= 1;
        assert!(matches!(read(&mut &damaged[..]), Err(FrameError::Checksum { .. })));
        for cut in 1..bytes.len() {
            assert!(matches!(read(&mut &bytes[..cut]), Err(FrameError::Cut)), "{cut}");
        }
    }

    #[test]
    fn promised_lengths_are_checked_before_anything_is_read() {
        let mut preamble = Preamble {
            kind: Kind::Batch,
            header_length: MAX_HEADER_BYTES + 1,
            payload_length: 0,
            header_crc32: 0,
        };
        assert!(matches!(
            read(&mut &preamble.to_bytes()[..]),
            Err(FrameError::TooLong { part: "header", .. })
        ));
        preamble.header_length = 0;
        preamble.payload_length = u64::MAX;
        assert!(matches!(
            read(&mut &preamble.to_bytes()[..]),
            Err(FrameError::TooLong { part: "payload", .. })
        ));
    }
}
