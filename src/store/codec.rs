//! How a chunk's bytes are packed: one repeated value, as they are, or Zstandard with or without a byte shuffle.

/// One element stands for all.
pub(super) const CONSTANT: u8 = 0;
/// Bytes as they are.
pub(super) const RAW: u8 = 1;
/// Zstandard.
pub(super) const ZSTD: u8 = 2;
/// Zstandard over all low bytes, then all high bytes: HU change slowly, so the high bytes are nearly constant.
pub(super) const ZSTD_SHUFFLED: u8 = 3;

/// The usual balance of speed and size; higher levels gain about 2 % on CT and cost several times the time.
const LEVEL: i32 = 3;

/// Whether a store's chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all: larger files, faster reads, and bytes that no library release changes.
    Raw,
    /// Zstandard, where it makes a chunk smaller.
    #[default]
    Zstd,
}

/// Packs elements of `element_bytes` bytes; returns the codec and the bytes.
pub(super) fn pack(bytes: Vec<u8>, element_bytes: usize, compression: Compression) -> std::io::Result<(u8, Vec<u8>)> {
    let first = bytes.get(..element_bytes).unwrap_or_default().to_vec();
    if !first.is_empty() && bytes.chunks_exact(element_bytes).all(|element| element == first) {
        return Ok((CONSTANT, first));
    }
    if compression == Compression::Raw {
        return Ok((RAW, bytes));
    }
    let (codec, packed) = if element_bytes == 2 {
        (ZSTD_SHUFFLED, zstd::bulk::compress(&shuffle(&bytes), LEVEL)?)
    } else {
        (ZSTD, zstd::bulk::compress(&bytes, LEVEL)?)
    };
    Ok(if packed.len() < bytes.len() {
        (codec, packed)
    } else {
        (RAW, bytes)
    })
}

/// Tells whether a stored length can belong to that many elements, before anything is allocated.
pub(super) fn check_length(codec: u8, length: usize, elements: usize, element_bytes: usize) -> Result<(), String> {
    let full = elements * element_bytes;
    let fits = match codec {
        CONSTANT => length == element_bytes,
        RAW => length == full,
        ZSTD => length < full,
        ZSTD_SHUFFLED => length < full && element_bytes == 2,
        other => return Err(format!("unknown codec {other}")),
    };
    if fits {
        return Ok(());
    }
    Err(format!("codec {codec} cannot pack {full} bytes into {length}"))
}

/// Unpacks to exactly `elements` elements.
pub(super) fn unpack(codec: u8, bytes: Vec<u8>, elements: usize, element_bytes: usize) -> Result<Vec<u8>, String> {
    check_length(codec, bytes.len(), elements, element_bytes)?;
    let full = elements * element_bytes;
    let inflate = |bytes: &[u8]| {
        let plain = zstd::bulk::decompress(bytes, full).map_err(|error| format!("zstd: {error}"))?;
        if plain.len() == full {
            return Ok(plain);
        }
        Err(format!("zstd: expected {full} bytes, got {}", plain.len()))
    };
    match codec {
        CONSTANT => Ok(bytes.repeat(elements)),
        RAW => Ok(bytes),
        ZSTD => inflate(&bytes),
        _ => inflate(&bytes).map(|plain| unshuffle(&plain)),
    }
}

fn shuffle(bytes: &[u8]) -> Vec<u8> {
    let low = bytes.iter().step_by(2);
    low.chain(bytes.iter().skip(1).step_by(2)).copied().collect()
}

fn unshuffle(bytes: &[u8]) -> Vec<u8> {
    let (low, high) = bytes.split_at(bytes.len() / 2);
    low.iter().zip(high).flat_map(|(low, high)| [*low, *high]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_codec_returns_what_it_got() {
        let ramp: Vec<u8> = (0..2000_i16).flat_map(|v| (v / 7).to_le_bytes()).collect();
        for (compression, codec) in [(Compression::Raw, RAW), (Compression::Zstd, ZSTD_SHUFFLED)] {
            let (got, packed) = pack(ramp.clone(), 2, compression).unwrap();
            assert_eq!(got, codec);
            assert_eq!(unpack(got, packed, 2000, 2).unwrap(), ramp);
        }
        let (codec, packed) = pack(vec![3; 500], 1, Compression::Zstd).unwrap();
        assert_eq!((codec, packed.as_slice()), (CONSTANT, [3].as_slice()));
        assert_eq!(unpack(codec, packed, 500, 1).unwrap(), vec![3; 500]);
    }

    #[test]
    fn lengths_that_a_codec_cannot_have_are_refused() {
        assert!(check_length(RAW, 7, 4, 2).is_err());
        assert!(check_length(ZSTD, 8, 4, 2).is_err());
        assert!(check_length(9, 8, 4, 2).unwrap_err().contains("unknown codec 9"));
        // A frame that inflates to more than the chunk holds is refused, not grown into.
        let bomb = zstd::bulk::compress(&vec![0; 1 << 20], 3).unwrap();
        assert!(unpack(ZSTD, bomb, 4096, 1).is_err());
    }
}
