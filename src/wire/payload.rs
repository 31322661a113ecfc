//! A batch's payload, in the pieces that it is made of: where several streams send a patch, it is converted and hashed once.

use std::sync::Arc;

use bytes::Bytes;
use crc32fast::Hasher;

use super::codec::{ALIGNMENT, Element, Encoding, Writer, check_shape, layout, pack, tensors};
use super::frame::FrameError;
use super::proto;
use crate::stream::delivery::Codec;
use crate::stream::kept::{KeptTensor, TensorKey};
use crate::stream::patch::StreamedPatch;
use crate::volume::Shape;

/// What lies between a tensor's end and the next one's aligned start.
static PADDING: [u8; ALIGNMENT] = [0; ALIGNMENT];

/// Returns a batch's tensors, described and as the payload's bytes: piece by piece where nothing is compressed, so that no byte
/// is copied once it is made.
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
    let writer = Writer::new(encoding);
    let (mut described, mut pieces, mut length) = (Vec::new(), Vec::new(), 0_usize);
    for (name, element) in layout(encoding) {
        let offset = length.next_multiple_of(ALIGNMENT);
        if offset > length {
            pieces.push(Bytes::from_static(&PADDING[..offset - length]));
        }
        length = offset;
        let mut crc32 = Hasher::new();
        for of in patches {
            check_shape(name, of, patch)?;
            let tensor = piece(name, element, of, encoding, &writer);
            crc32.combine(&Hasher::new_with_initial_len(tensor.crc32, tensor.bytes.len() as u64));
            length += tensor.bytes.len();
            pieces.push(tensor.bytes);
        }
        described.push(proto::Tensor {
            name: name.into(),
            element: element.proto().into(),
            shape: shape.iter().map(|n| *n as u32).collect(),
            offset: offset as u64,
            stored_length: (length - offset) as u64,
            raw_length: (length - offset) as u64,
            codec: proto::Codec::Raw.into(),
            crc32: crc32.finalize(),
        });
    }
    Ok((described, pieces))
}

/// Returns one patch's part of a tensor; it stays with the patch where another stream holds the patch too.
fn piece(
    name: &'static str,
    element: Element,
    patch: &Arc<StreamedPatch>,
    encoding: &Encoding,
    writer: &Writer,
) -> KeptTensor {
    let is_intensity = matches!(name, "image" | "source");
    let key = TensorKey {
        name,
        image: is_intensity.then_some(encoding.image),
    };
    let is_shared = Arc::strong_count(patch) > 1;
    patch.kept.get(key, is_shared, || {
        let mut bytes = Vec::with_capacity(patch.image.len() * element.bytes());
        let mut crc32 = Hasher::new();
        writer.write(name, patch, |part| {
            crc32.update(part);
            bytes.extend_from_slice(part);
        });
        KeptTensor {
            bytes: bytes.into(),
            crc32: crc32.finalize(),
        }
    })
}
