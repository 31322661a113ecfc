//! Decodes bincode under a limit that follows from the bytes at hand: a length among them must not make a thousand bytes
//! allocate a gigabyte.

use std::io::Read;

use bincode::Decode;
use bincode::error::DecodeError;

/// What decoded values may take of memory, per byte they were made of: a length of eight bytes stands for an element of a
/// few times as many.
const EXPANSION: u64 = 4;

/// Decodes a value with fixed-width little-endian integers from a reader of `bytes` bytes.
pub(super) fn decode<T: Decode<()>>(reader: &mut impl Read, bytes: u64) -> Result<T, DecodeError> {
    // Limits are part of bincode's types, so there are only a few.
    match bytes.saturating_mul(EXPANSION) {
        0..=0x10_0000 => within::<T, { 1 << 20 }>(reader),
        0x10_0001..=0x100_0000 => within::<T, { 1 << 24 }>(reader),
        0x100_0001..=0x800_0000 => within::<T, { 1 << 27 }>(reader),
        _ => within::<T, { 1 << 30 }>(reader),
    }
}

fn within<T: Decode<()>, const LIMIT: usize>(reader: &mut impl Read) -> Result<T, DecodeError> {
    let config = bincode::config::standard()
        .with_fixed_int_encoding()
        .with_limit::<LIMIT>();
    bincode::decode_from_std_read(reader, config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_lies_is_an_error_before_it_is_memory() {
        let mut bytes = (1_u64 << 29).to_le_bytes().to_vec();
        bytes.extend([b'a'; 100]);
        let length = bytes.len() as u64;
        let error = decode::<String>(&mut bytes.as_slice(), length).unwrap_err();
        assert!(matches!(error, DecodeError::LimitExceeded), "{error}");
        bytes[..8].copy_from_slice(&100_u64.to_le_bytes());
        assert_eq!(decode::<String>(&mut bytes.as_slice(), length).unwrap().len(), 100);
    }
}
