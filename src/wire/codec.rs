//! Patches -> tensors: windowing, element types, compression and checksums.

use std::borrow::Borrow;
use std::cell::OnceCell;

use bytes::{BufMut, BytesMut};
use half::f16;
use ndarray::Array3;

use super::frame::FrameError;
use super::proto;
use crate::stream::delivery::{Codec, Delivery, ImageType, Output};
use crate::stream::patch::StreamedPatch;
use crate::volume::{HuWindow, Shape};

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
pub fn tensors<P: Borrow<StreamedPatch>>(patches: &[P], encoding: &Encoding) -> Result<Vec<RawTensor>, FrameError> {
    let (d, h, w) = patches.first().map_or((0, 0, 0), |patch| patch.borrow().image.dim());
    let shape = [patches.len(), 1, d, h, w];
    let voxels: usize = shape.iter().product();
    let writer = Writer::new(encoding);
    let mut out = Vec::new();
    for (name, element) in layout(encoding) {
        let mut bytes = Vec::with_capacity(voxels * element.bytes());
        for patch in patches {
            check_shape(name, patch.borrow(), [d, h, w])?;
            writer.write(name, patch.borrow(), |part| bytes.extend_from_slice(part));
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

/// Checks that the array behind a tensor has the patch size.
///
/// # Errors
/// [`FrameError::Header`] names the tensor and the patch.
pub(super) fn check_shape(name: &str, patch: &StreamedPatch, [d, h, w]: Shape) -> Result<(), FrameError> {
    let dim = match name {
        "image" => patch.image.dim(),
        "source" => patch.source.dim(),
        "label" => patch.label.dim(),
        "soft_mask" => patch.soft_mask.dim(),
        _ => patch.lesion_instance.dim(),
    };
    if dim == (d, h, w) {
        return Ok(());
    }
    Err(FrameError::Header(format!(
        "{name} of patch {}: expected shape {:?}, got {dim:?}",
        patch.meta.index,
        (d, h, w)
    )))
}

/// Bytes that are made, hashed and copied while they are in the nearest cache.
const PART_BYTES: usize = 16 << 10;

/// Writes patches as elements of an encoding's tensors.
pub(super) struct Writer {
    image: Element,
    window_hu: HuWindow,
    /// Made for the first intensity that is written.
    table: OnceCell<Table>,
}

impl Writer {
    pub(super) fn new(encoding: &Encoding) -> Self {
        Self {
            image: encoding.image.into(),
            window_hu: encoding.window_hu,
            table: OnceCell::new(),
        }
    }

    /// Hands the bytes of one patch of a tensor to `put`, part by part.
    pub(super) fn write(&self, name: &str, patch: &StreamedPatch, mut put: impl FnMut(&[u8])) {
        let table = || self.table.get_or_init(|| Table::new(self.image, self.window_hu));
        match name {
            "image" => table().write(&patch.image, &mut put),
            "source" => table().write(&patch.source, &mut put),
            "label" => write_bytes(&patch.label, &mut put),
            "soft_mask" => write_bytes(&patch.soft_mask, &mut put),
            _ => write_bytes(&patch.lesion_instance, &mut put),
        }
    }
}

fn write_bytes(array: &Array3<u8>, put: &mut impl FnMut(&[u8])) {
    let whole = array.as_standard_layout();
    let bytes = whole.as_slice().expect("the standard layout is contiguous");
    bytes.chunks(PART_BYTES).for_each(put);
}

/// How many values an HU can have.
const HUS: usize = 1 << 16;

/// What becomes of every HU, at the place that its 16 bits name: a look-up without a comparison, of which only the window's
/// few hundred values are ever in the cache.
enum Table {
    Integer,
    Half(Box<[u16; HUS]>),
    Single(Box<[u32; HUS]>),
}

impl Table {
    fn new(element: Element, window: HuWindow) -> Self {
        match element {
            Element::I16 | Element::U8 => Self::Integer,
            Element::F16 => Self::Half(filled(window, |value| f16::from_f32(value).to_bits())),
            Element::F32 => Self::Single(filled(window, f32::to_bits)),
        }
    }

    fn write(&self, array: &Array3<i16>, put: &mut impl FnMut(&[u8])) {
        let whole = array.as_standard_layout();
        let hus = whole.as_slice().expect("the standard layout is contiguous");
        match self {
            Self::Integer => write_parts(hus, put, i16::to_le_bytes),
            Self::Half(values) => write_parts(hus, put, |hu| values[usize::from(hu as u16)].to_le_bytes()),
            Self::Single(values) => write_parts(hus, put, |hu| values[usize::from(hu as u16)].to_le_bytes()),
        }
    }
}

/// Fills a table; beyond the window every HU is what the window's ends are.
fn filled<V: Copy>(window: HuWindow, value_of: impl Fn(f32) -> V) -> Box<[V; HUS]> {
    let below = value_of(window.normalise(i16::MIN));
    let mut values = vec![below; HUS];
    let hu = |hu: f32| hu.clamp(f32::from(i16::MIN), f32::from(i16::MAX)) as i16;
    let (lowest, highest) = (hu(window.low.floor() - 1.0), hu(window.high.ceil() + 1.0));
    for hu in lowest..=highest {
        values[usize::from(hu as u16)] = value_of(window.normalise(hu));
    }
    // The positive HU above the window lie together in the table.
    let above = value_of(window.normalise(i16::MAX));
    for hu in (highest..=i16::MAX).skip(1) {
        values[usize::from(hu as u16)] = above;
    }
    let values: Box<[V]> = values.into();
    values
        .try_into()
        .unwrap_or_else(|_| unreachable!("the table has a place for every HU"))
}

fn write_parts<const N: usize>(hus: &[i16], put: &mut impl FnMut(&[u8]), bytes_of: impl Fn(i16) -> [u8; N]) {
    let mut part = [0; PART_BYTES];
    for hus in hus.chunks(PART_BYTES / N) {
        for (bytes, hu) in part.chunks_exact_mut(N).zip(hus) {
            bytes.copy_from_slice(&bytes_of(*hu));
        }
        put(&part[..hus.len() * N]);
    }
}

fn codec_of(element: Element, asked: Codec) -> proto::Codec {
    match (asked, element) {
        (Codec::Zstd, _) | (Codec::ZstdU8, Element::U8) => proto::Codec::Zstd,
        (Codec::Raw | Codec::ZstdU8, _) => proto::Codec::Raw,
    }
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
        let codec = codec_of(tensor.element, codec);
        match codec {
            proto::Codec::Raw => payload.put_slice(&tensor.bytes),
            proto::Codec::Zstd => payload.put_slice(&zstd::bulk::compress(&tensor.bytes, ZSTD_LEVEL)?),
        }
        described.push(proto::Tensor {
            name: tensor.name.into(),
            element: tensor.element.proto().into(),
            shape: tensor.shape.iter().map(|n| *n as u32).collect(),
            offset: offset as u64,
            stored_length: (payload.len() - offset) as u64,
            raw_length: tensor.bytes.len() as u64,
            codec: codec.into(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_what_the_window_says_of_every_hu() {
        for (low, high) in [
            (-175.0, 250.0),
            (-1000.5, 3000.25),
            (10.0, 40.0),
            (-900.0, -850.0),
            (-40_000.0, 40_000.0),
        ] {
            let window = HuWindow { low, high };
            let (half, single) = (Table::new(Element::F16, window), Table::new(Element::F32, window));
            let (Table::Half(half), Table::Single(single)) = (half, single) else {
                panic!("tables of another type");
            };
            for hu in i16::MIN..=i16::MAX {
                let (at, value) = (usize::from(hu as u16), window.normalise(hu));
                assert_eq!(single[at], value.to_bits(), "{hu} in {low} to {high}");
                assert_eq!(half[at], f16::from_f32(value).to_bits());
            }
        }
    }
}
