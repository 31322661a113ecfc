//! The other side: reads a stream of frames back into messages. Used by our own checks and by tests.

use std::io::Read;

use prost::Message as _;

use super::codec::unpack;
use super::frame::{self, FrameError, Kind};
use super::proto;

/// A tensor as it was sent: elements little-endian.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// `image`, `label`, or an optional output.
    pub name: String,
    /// The type of its elements.
    pub element: proto::ElementType,
    /// `[B, 1, D, H, W]`.
    pub shape: Vec<usize>,
    /// Its elements.
    pub bytes: Vec<u8>,
}

/// What a frame says.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The stream's header.
    Header(proto::StreamHeader),
    /// A batch, every checksum verified.
    Batch {
        /// Tensors' descriptions, provenance and cursor.
        header: proto::BatchHeader,
        /// The tensors.
        tensors: Vec<Tensor>,
    },
    /// The connection is alive.
    Heartbeat(proto::Heartbeat),
    /// The stream ended as it should.
    End(proto::End),
    /// The stream failed.
    Error(proto::Error),
}

/// Reads the next message, skipping frames of unknown kinds; nothing where the stream ends between frames.
///
/// A stream is complete only if its last message was [`Message::End`].
///
/// # Errors
/// [`FrameError`] for anything that is not a whole, undamaged frame.
pub fn read(source: &mut impl Read) -> Result<Option<Message>, FrameError> {
    while let Some(frame) = frame::read(source)? {
        let header = &frame.header[..];
        return Ok(Some(match frame.kind {
            Kind::Header => Message::Header(proto::StreamHeader::decode(header)?),
            Kind::Batch => batch(proto::BatchHeader::decode(header)?, &frame.payload)?,
            Kind::Heartbeat => Message::Heartbeat(proto::Heartbeat::decode(header)?),
            Kind::End => Message::End(proto::End::decode(header)?),
            Kind::Error => Message::Error(proto::Error::decode(header)?),
            Kind::Unknown(_) => continue,
        }));
    }
    Ok(None)
}

fn batch(header: proto::BatchHeader, payload: &[u8]) -> Result<Message, FrameError> {
    // Damaged headers may name many tensors that overlap; together they must not exceed a frame either.
    let total = header
        .tensors
        .iter()
        .fold(0u64, |n, tensor| n.saturating_add(tensor.raw_length));
    if total > frame::MAX_FRAME_BYTES {
        return Err(FrameError::Header(format!("tensors of {total} bytes in one frame")));
    }
    let read = |tensor: &proto::Tensor| {
        Ok(Tensor {
            name: tensor.name.clone(),
            element: tensor.element(),
            shape: tensor.shape.iter().map(|side| *side as usize).collect(),
            bytes: unpack(tensor, payload)?,
        })
    };
    let tensors = header.tensors.iter().map(read).collect::<Result<_, FrameError>>()?;
    Ok(Message::Batch { header, tensors })
}
