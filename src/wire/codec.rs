//! Patches -> tensors: windowing, element types, compression and checksums.

use bytes::{BufMut, BytesMut};
use half::f16;
use ndarray::Array3;

use super::frame::FrameError;
use super::proto;
use crate::stream::delivery::{Codec, Delivery, ImageType, Output};
use crate::stream::patch::StreamedPatch;
use crate::volume::HuWindow;

/// Tensors start at multiples of this, so that a reader may view them with any alignment a CPU or GPU wants.
pub const ALIGNMENT: usize = 64;
/// The fastest level: voxels are noisy, higher levels cost much time for few bytes.
const ZSTD_LEVEL: i32 = 1;

/// How patches become tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoding {
    /// How intensities are written.
    pub image: ImageType,
    /// How tensors are compressed.
    pub codec: Codec,
    /// Optional tensors.
    pub outputs: Vec<Output>,
    /// The window of f16 and f32 intensities.
    pub window_hu: HuWindow,
}

impl Encoding {
    /// Returns what a delivery asks for; an output named twice is written once.
    pub fn of(delivery: &Delivery, window_hu: HuWindow) -> Self {
        let mut outputs = delivery.outputs.clone();
        outputs.sort_unstable();
        outputs.dedup();
        Self {
            image: delivery.image,
            codec: delivery.codec,
            outputs,
            window_hu,
        }
    }
}

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Unsigned bytes.
    U8,
    /// 16-bit integers.
    I16,
    /// Half precision.
    F16,
    /// Single precision.
    F32,
}

impl Element {
    /// Returns the bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::I16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Returns the wire's name of the type.
    pub fn proto(self) -> proto::ElementType {
        match self {
            Self::U8 => proto::ElementType::U8,
            Self::I16 => proto::ElementType::I16,
            Self::F16 => proto::ElementType::F16,
            Self::F32 => proto::ElementType::F32,
        }
    }
}

impl From<ImageType> for Element {
    fn from(image: ImageType) -> Self {
        match image {
            ImageType::I16 => Self::I16,
            ImageType::F16 => Self::F16,
            ImageType::F32 => Self::F32,
        }
    }
}

/// A tensor before compression, elements little-endian.
#[derive(Clone, Debug, PartialEq)]
pub struct RawTensor {
    /// `image`, `label`, or an optional output.
    pub name: &'static str,
    /// The type of its elements.
    pub element: Element,
    /// `[B, 1, D, H, W]`.
    pub shape: [usize; 5],
    /// Its elements.
    pub bytes: Vec<u8>,
}

/// Names and types of the tensors of an encoding, in their order.
pub(crate) fn layout(encoding: &Encoding) -> Vec<(&'static str, Element)> {
    let image = Element::from(encoding.image);
    let mut layout = vec![("image", image), ("label", Element::U8)];
    layout.extend(encoding.outputs.iter().map(|output| match output {
        Output::Source => ("source", image),
        Output::SoftMask => ("soft_mask", Element::U8),
        Output::LesionInstance => ("lesion_instance", Element::U8),
    }));
    layout
}

/// Returns the tensors of a batch: image, label, then the optional outputs in the order of [`Output`].
///
/// # Shape
/// Each `[B, 1, D, H, W]`.
///
/// # Errors
/// [`FrameError::Header`] where a patch or one of its arrays differs in shape from the first image.
pub fn tensors(patches: &[StreamedPatch], encoding: &Encoding) -> Result<Vec<RawTensor>, FrameError> {
    let (d, h, w) = patches.first().map_or((0, 0, 0), |patch| patch.image.dim());
    let shape = [patches.len(), 1, d, h, w];
    let voxels = d * h * w;
    let mut out = Vec::new();
    for (name, element) in layout(encoding) {
        let mut bytes = Vec::with_capacity(patches.len() * voxels * element.bytes());
        for patch in patches {
            let dim = match name {
                "image" => put_image(&mut bytes, &patch.image, element, encoding.window_hu),
                "source" => put_image(&mut bytes, &patch.source, element, encoding.window_hu),
                "label" => put_bytes(&mut bytes, &patch.label),
                "soft_mask" => put_bytes(&mut bytes, &patch.soft_mask),
                _ => put_bytes(&mut bytes, &patch.lesion_instance),
            };
            if dim != (d, h, w) {
                return Err(FrameError::Header(format!(
                    "{name} of patch {}: expected shape {:?}, got {dim:?}",
                    patch.meta.index,
                    (d, h, w)
                )));
            }
        }
        out.push(RawTensor {
            name,
            element,
            shape,
            bytes,
        });
    }
    Ok(out)
}

fn put_bytes(out: &mut Vec<u8>, array: &Array3<u8>) -> (usize, usize, usize) {
    match array.as_slice() {
        Some(slice) => out.extend_from_slice(slice),
        None => out.extend(array.iter()),
    }
    array.dim()
}

fn put_image(out: &mut Vec<u8>, array: &Array3<i16>, element: Element, window: HuWindow) -> (usize, usize, usize) {
    match element {
        Element::F32 => array.iter().for_each(|hu| out.put_f32_le(window.normalise(*hu))),
        Element::F16 => array
            .iter()
            .for_each(|hu| out.extend_from_slice(&f16::from_f32(window.normalise(*hu)).to_le_bytes())),
        Element::I16 | Element::U8 => array.iter().for_each(|hu| out.put_i16_le(*hu)),
    }
    array.dim()
}

/// Compresses tensors and lays them out in a payload.
///
/// # Errors
/// [`FrameError::Read`] where the compressor runs out of memory.
pub fn pack(tensors: &[RawTensor], codec: Codec) -> Result<(Vec<proto::Tensor>, BytesMut), FrameError> {
    let raw: usize = tensors.iter().map(|tensor| tensor.bytes.len() + ALIGNMENT).sum();
    let mut payload = BytesMut::with_capacity(if codec == Codec::Raw { raw } else { raw / 2 });
    let mut described = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        payload.put_bytes(0, payload.len().next_multiple_of(ALIGNMENT) - payload.len());
        let offset = payload.len();
        match codec {
            Codec::Raw => payload.put_slice(&tensor.bytes),
            Codec::Zstd => payload.put_slice(&zstd::bulk::compress(&tensor.bytes, ZSTD_LEVEL)?),
        }
        described.push(proto::Tensor {
            name: tensor.name.into(),
            element: tensor.element.proto().into(),
            shape: tensor.shape.iter().map(|n| *n as u32).collect(),
            offset: offset as u64,
            stored_length: (payload.len() - offset) as u64,
            raw_length: tensor.bytes.len() as u64,
            codec: match codec {
                Codec::Raw => proto::Codec::Raw,
                Codec::Zstd => proto::Codec::Zstd,
            }
            .into(),
            crc32: crc32fast::hash(&payload[offset..]),
        });
    }
    Ok((described, payload))
}

/// Returns a tensor's elements out of a payload, its checksum and lengths verified.
///
/// # Errors
/// [`FrameError`] where description and payload contradict each other.
pub fn unpack(tensor: &proto::Tensor, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let invalid = |what: String| FrameError::Header(format!("tensor {:?}: {what}", shorten(&tensor.name)));
    let end = tensor.offset.checked_add(tensor.stored_length);
    let range = usize::try_from(tensor.offset)
        .ok()
        .zip(end.and_then(|end| usize::try_from(end).ok()));
    let stored = range
        .and_then(|(start, end)| payload.get(start..end))
        .ok_or_else(|| invalid(format!("lies outside the payload of {} bytes", payload.len())))?;
    let got = crc32fast::hash(stored);
    if got != tensor.crc32 {
        return Err(FrameError::Checksum {
            what: format!("tensor {:?}", shorten(&tensor.name)),
            expected: tensor.crc32,
            got,
        });
    }
    let raw_length = usize::try_from(tensor.raw_length)
        .ok()
        .filter(|length| *length as u64 <= super::frame::MAX_FRAME_BYTES)
        .ok_or_else(|| invalid(format!("{} bytes are over the frame limit", tensor.raw_length)))?;
    let element = match tensor.element() {
        proto::ElementType::U8 => 1,
        proto::ElementType::I16 | proto::ElementType::F16 => 2,
        proto::ElementType::F32 => 4,
        proto::ElementType::Unspecified => return Err(invalid("unknown element type".into())),
    };
    let elements = tensor
        .shape
        .iter()
        .try_fold(element, |n: u64, side| n.checked_mul((*side).into()));
    if elements != Some(tensor.raw_length) {
        return Err(invalid(format!(
            "shape {:?} does not fill {raw_length} bytes",
            tensor.shape
        )));
    }
    let bytes = match proto::Codec::try_from(tensor.codec) {
        Ok(proto::Codec::Raw) => stored.to_vec(),
        Ok(proto::Codec::Zstd) => {
            zstd::bulk::decompress(stored, raw_length).map_err(|error| invalid(error.to_string()))?
        }
        Err(_) => return Err(invalid(format!("unknown codec {}", tensor.codec))),
    };
    if bytes.len() != raw_length {
        return Err(invalid(format!("expected {raw_length} bytes, got {}", bytes.len())));
    }
    Ok(bytes)
}

fn shorten(name: &str) -> String {
    name.chars().take(40).collect()
}
