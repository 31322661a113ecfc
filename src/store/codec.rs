//! How a chunk's bytes are packed: one repeated value, as they are, Zstandard, or (HU) Zstandard over residuals.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, ParamSwitch};

use super::residuals;
use crate::volume::Shape;

/// One element stands for all.
pub(super) const CONSTANT: u8 = 0;
/// Bytes as they are.
pub(super) const RAW: u8 = 1;
/// Zstandard.
pub(super) const ZSTD: u8 = 2;
/// HU alone: what their neighbours do not foretell, in parts that are stored or Zstandard; see [`residuals`].
pub(super) const RESIDUALS: u8 = 3;

/// Of labels and candidates, which are small: the usual balance of speed and size.
const LEVEL: i32 = 3;
/// Of residuals: longer searches find nothing in noise.
const RESIDUAL_LEVEL: i32 = 1;
/// The fastest negative level looks for no matches at all, which leaves Huffman codes: half the time to unpack.
const NO_MATCHES: i32 = -131_072;

/// Whether a store's chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all: larger files, faster reads, and bytes that no library release changes.
    Raw,
    /// Zstandard, where it makes a chunk smaller.
    #[default]
    Zstd,
}

/// Packs bytes; returns the codec and what to store.
pub(super) fn pack_bytes(bytes: Vec<u8>, compression: Compression) -> std::io::Result<(u8, Vec<u8>)> {
    if let Some(first) = bytes.first()
        && bytes.iter().all(|byte| byte == first)
    {
        return Ok((CONSTANT, vec![*first]));
    }
    if compression == Compression::Zstd {
        let packed = zstd::bulk::compress(&bytes, LEVEL)?;
        if packed.len() < bytes.len() {
            return Ok((ZSTD, packed));
        }
    }
    Ok((RAW, bytes))
}

/// Packs the HU of a chunk; returns the codec and what to store.
pub(super) fn pack_hu(hu: &[i16], sides: Shape, compression: Compression) -> std::io::Result<(u8, Vec<u8>)> {
    if let Some(first) = hu.first()
        && hu.iter().all(|value| value == first)
    {
        return Ok((CONSTANT, first.to_le_bytes().into()));
    }
    if compression == Compression::Zstd {
        let packed = residuals::pack(hu, sides)?;
        if packed.len() < 2 * hu.len() {
            return Ok((RESIDUALS, packed));
        }
    }
    Ok((RAW, hu.iter().flat_map(|value| value.to_le_bytes()).collect()))
}

/// Tells whether a stored length can belong to that many elements, before anything is allocated.
pub(super) fn check_length(codec: u8, length: usize, elements: usize, element_bytes: usize) -> Result<(), String> {
    let full = elements * element_bytes;
    let fits = match codec {
        CONSTANT => length == element_bytes,
        RAW => length == full,
        ZSTD => length < full && element_bytes == 1,
        RESIDUALS => (residuals::HEAD_BYTES..full).contains(&length) && element_bytes == 2,
        other => return Err(format!("unknown codec {other}")),
    };
    if fits {
        return Ok(());
    }
    Err(format!("codec {codec} cannot pack {full} bytes into {length}"))
}

/// Unpacks bytes to exactly the length of `into`.
pub(super) fn unpack_bytes(codec: u8, packed: &[u8], into: &mut [u8]) -> Result<(), String> {
    check_length(codec, packed.len(), into.len(), 1)?;
    match codec {
        CONSTANT => into.fill(packed[0]),
        RAW => into.copy_from_slice(packed),
        _ => inflate(packed, into)?,
    }
    Ok(())
}

/// Unpacks one Zstandard frame to exactly the length of `into`.
pub(super) fn inflate(packed: &[u8], into: &mut [u8]) -> Result<(), String> {
    thread_local! {
        // A context takes longer to make than a chunk to unpack.
        static CONTEXT: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|slot| {
        let context = match slot {
            Some(context) => context,
            None => slot.insert(Decompressor::new().map_err(|error| format!("zstd: {error}"))?),
        };
        let got = context
            .decompress_to_buffer(packed, into)
            .map_err(|error| format!("zstd: {error}"))?;
        if got == into.len() {
            return Ok(());
        }
        Err(format!("zstd: expected {} bytes, got {got}", into.len()))
    })
}

/// Packs a part of the residuals with or without a search for matches.
pub(super) fn deflate(bytes: &[u8], finds_matches: bool) -> std::io::Result<Vec<u8>> {
    thread_local! {
        // With and without matches; making a context takes as long as packing with it.
        static CONTEXTS: RefCell<[Option<Compressor<'static>>; 2]> = const { RefCell::new([None, None]) };
    }
    CONTEXTS.with_borrow_mut(|contexts| {
        let slot = &mut contexts[usize::from(finds_matches)];
        let context = match slot {
            Some(context) => context,
            None => slot.insert(compressor(if finds_matches { RESIDUAL_LEVEL } else { NO_MATCHES })?),
        };
        context.compress(bytes)
    })
}

fn compressor(level: i32) -> std::io::Result<Compressor<'static>> {
    let mut context = Compressor::new(level)?;
    context.include_contentsize(false)?;
    // By itself, a negative level would store what it does not match.
    context.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable))?;
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_codec_returns_what_it_got() {
        let ramp: Vec<u8> = (0..4000_u32).map(|v| (v / 700) as u8).collect();
        for (compression, codec) in [(Compression::Raw, RAW), (Compression::Zstd, ZSTD)] {
            let (got, packed) = pack_bytes(ramp.clone(), compression).unwrap();
            assert_eq!(got, codec);
            let mut plain = vec![0; 4000];
            unpack_bytes(got, &packed, &mut plain).unwrap();
            assert_eq!(plain, ramp);
        }
        let (codec, packed) = pack_bytes(vec![3; 500], Compression::Zstd).unwrap();
        assert_eq!((codec, packed.as_slice()), (CONSTANT, [3].as_slice()));
        let mut plain = vec![0; 500];
        unpack_bytes(codec, &packed, &mut plain).unwrap();
        assert_eq!(plain, vec![3; 500]);
        assert_eq!(
            pack_hu(&[-7; 30], [2, 3, 5], Compression::Raw).unwrap(),
            (CONSTANT, vec![249, 255])
        );
    }

    #[test]
    fn lengths_that_a_codec_cannot_have_are_refused() {
        assert!(check_length(RAW, 7, 4, 2).is_err());
        assert!(check_length(ZSTD, 4, 4, 1).is_err());
        assert!(check_length(RESIDUALS, 7, 40, 2).is_err());
        assert!(check_length(9, 8, 4, 2).unwrap_err().contains("unknown codec 9"));
        // A frame that inflates to more than the chunk holds is refused, not grown into.
        let bomb = zstd::bulk::compress(&vec![0; 1 << 20], 3).unwrap();
        assert!(unpack_bytes(ZSTD, &bomb, &mut [0; 4096]).is_err());
    }
}
