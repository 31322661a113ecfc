//! What a scan looks like in a few hundred bytes, by which it is found again under another header, crop or voxel size.
//!
//! ```text
//! make.rs: voxels, spacing -> areas and spreads of tissues, slab by slab    alike.rs: two of them -> the best alignment
//! ```
//!
//! `docs/ingest.md` says what is measured, what is found, and what is not. `python/freetumor/fingerprint.py` makes the same
//! bytes.

mod alike;
mod make;

use serde::{Deserialize, Serialize};

pub use alike::{Alignment, MIN_SCORE, Outline};

/// The most bytes of a fingerprint.
pub const MAX_FINGERPRINT_BYTES: usize = 640;

/// A compact description of a scan that survives what a re-saving changes; empty where none was made.
///
/// It says nothing that can change a patch, so it is no part of a content hash.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode)]
pub struct Fingerprint(Vec<u8>);

/// Bytes that are no fingerprint.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("fingerprint: expected {expected}, got {got}")]
pub struct FingerprintError {
    expected: &'static str,
    got: String,
}

impl Fingerprint {
    /// Takes the bytes of a fingerprint.
    ///
    /// # Errors
    /// [`FingerprintError`] where there are more than [`MAX_FINGERPRINT_BYTES`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, FingerprintError> {
        let fingerprint = Self(bytes);
        match fingerprint.refusal() {
            Some(refusal) => Err(refusal),
            None => Ok(fingerprint),
        }
    }

    /// Returns the bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Tells whether none was made.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells what is wrong with a fingerprint that was read from a file, or nothing.
    pub fn refusal(&self) -> Option<FingerprintError> {
        (self.0.len() > MAX_FINGERPRINT_BYTES).then(|| FingerprintError {
            expected: "at most 640 bytes",
            got: self.0.len().to_string(),
        })
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let invalid = || FingerprintError {
            expected: "an even number of hexadecimal digits",
            got: format!("{:?}", text.chars().take(80).collect::<String>()),
        };
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or_else(invalid);
        if !text.len().is_multiple_of(2) || text.len() > 2 * MAX_FINGERPRINT_BYTES {
            return Err(invalid());
        }
        let pairs = text.as_bytes().chunks_exact(2);
        let bytes = pairs.map(|pair| Ok((digit(pair[0])? << 4 | digit(pair[1])?) as u8));
        Self::from_bytes(bytes.collect::<Result<_, _>>()?)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_text_round_trips_and_other_text_is_refused() {
        let fingerprint = Fingerprint::from_bytes(vec![0, 1, 0xab, 0xff]).unwrap();
        assert_eq!(fingerprint.to_string(), "0001abff");
        assert_eq!("0001abff".parse(), Ok(fingerprint));
        assert!("".parse::<Fingerprint>().unwrap().is_empty());
        for text in ["0", "0g", "é", &"0".repeat(2 * MAX_FINGERPRINT_BYTES + 2)] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
        assert!(Fingerprint::from_bytes(vec![0; MAX_FINGERPRINT_BYTES + 1]).is_err());
    }
}
