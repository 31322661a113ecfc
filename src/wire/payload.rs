//! A batch's payload, in the pieces that it is made of: patches that others hold too are converted and hashed once.

use std::sync::Arc;

use bytes::Bytes;
use crc32fast::Hasher;

use super::codec::{ALIGNMENT, Element, Encoding, Writer, check_shape, layout, pack, tensors};
use super::frame::FrameError;
use super::proto;
use crate::stream::delivery::Codec;
use crate::stream::encoded::{EncodedTensor, TensorKey};
use crate::stream::patch::StreamedPatch;
use crate::volume::Shape;

/// What lies between a tensor's end and the next one's aligned start.
static PADDING: [u8; ALIGNMENT] = [0; ALIGNMENT];

/// Returns a batch's tensors, described and as the payload's bytes: piece by piece where nothing is compressed, so that whole
/// tensors are never copied.
///
/// # Shape
/// Each `[B, 1, D, H, W]`, with the patch size given: a batch may hold no patches.
///
/// # Errors
/// [`FrameError`] where a patch differs in shape, or the compressor runs out of memory.
pub fn payload(
    patches: &[Arc<StreamedPatch>],
    patch: Shape,
    encoding: &Encoding,
) -> Result<(Vec<proto::Tensor>, Vec<Bytes>), FrameError> {
    let [d, h, w] = patch;
    let shape = [patches.len(), 1, d, h, w];
    if encoding.codec != Codec::Raw {
        let mut tensors = tensors(patches, encoding)?;
        tensors.iter_mut().for_each(|tensor| tensor.shape = shape);
        let (described, payload) = pack(&tensors, encoding.codec)?;
        return Ok((described, vec![payload.freeze()]));
    }
    let mut pieces = Pieces::new(encoding);
    let mut described = Vec::new();
    for (name, element) in layout(encoding) {
        let offset = pieces.align();
        let mut crc32 = Hasher::new();
        for streamed in patches {
            check_shape(name, streamed, patch)?;
            crc32.combine(&pieces.put(name, element, streamed));
        }
        let length = (pieces.length - offset) as u64;
        described.push(proto::Tensor {
            name: name.into(),
            element: element.proto().into(),
            shape: shape.iter().map(|n| *n as u32).collect(),
            offset: offset as u64,
            stored_length: length,
            raw_length: length,
            codec: proto::Codec::Raw.into(),
            crc32: crc32.finalize(),
        });
    }
    Ok((described, pieces.all))
}

/// A payload that is being laid out.
struct Pieces<'a> {
    encoding: &'a Encoding,
    writer: Writer,
    all: Vec<Bytes>,
    /// Of all pieces.
    length: usize,
}

impl<'a> Pieces<'a> {
    fn new(encoding: &'a Encoding) -> Self {
        Self {
            encoding,
            writer: Writer::new(encoding),
            all: Vec::new(),
            length: 0,
        }
    }

    /// Pads up to where a tensor may begin, and returns that place.
    fn align(&mut self) -> usize {
        let offset = self.length.next_multiple_of(ALIGNMENT);
        if offset > self.length {
            self.push(Bytes::from_static(&PADDING[..offset - self.length]));
        }
        offset
    }

    fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        self.all.push(piece);
    }

    /// Adds one patch's part of a tensor, and returns its checksum.
    fn put(&mut self, name: &'static str, element: Element, patch: &Arc<StreamedPatch>) -> Hasher {
        let encoded = self.encoded(name, element, patch);
        let crc32 = Hasher::new_with_initial_len(encoded.crc32, encoded.bytes.len() as u64);
        self.push(encoded.bytes);
        crc32
    }

    /// Returns one patch's part of a tensor, which stays with a patch that somebody else holds too.
    fn encoded(&self, name: &'static str, element: Element, patch: &Arc<StreamedPatch>) -> EncodedTensor {
        let is_of_intensities = matches!(name, "image" | "source");
        let key = TensorKey {
            name,
            intensities: is_of_intensities.then_some((self.encoding.image, self.encoding.window_hu)),
        };
        let is_shared = Arc::strong_count(patch) > 1;
        patch.encoded.get(key, is_shared, || {
            let mut bytes = Vec::with_capacity(patch.image.len() * element.bytes());
            let mut crc32 = Hasher::new();
            self.writer.write(name, patch, |part| {
                crc32.update(part);
                bytes.extend_from_slice(part);
            });
            EncodedTensor {
                bytes: bytes.into(),
                crc32: crc32.finalize(),
            }
        })
    }
}
