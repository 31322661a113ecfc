//! BLAKE3 digests and their hexadecimal form: the identity of cases, snapshots, bundles and recipes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A 32-byte BLAKE3 digest, written as 64 lowercase hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, bincode::Encode, bincode::Decode)]
pub struct Digest(pub [u8; 32]);

/// A text that is not 64 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("expected a digest of 64 hexadecimal digits, got {0:?}")]
pub struct DigestError(String);

impl Digest {
    /// Returns the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Returns the digest of the canonical JSON of `value`: object keys sorted, no white space, shortest floats.
    ///
    /// # Panics
    /// When `value` cannot be represented in JSON (a map with keys that are not strings, a float that is not finite).
    pub fn of_json<T: Serialize>(value: &T) -> Self {
        Self::of(canonical_json(value).as_bytes())
    }
}

/// Returns the canonical JSON of `value`: object keys sorted, no white space, shortest round-trip floats.
///
/// # Panics
/// As [`Digest::of_json`].
pub fn canonical_json<T: Serialize>(value: &T) -> String {
    // `serde_json::Value` keeps objects in a BTreeMap, so going through it sorts every level.
    serde_json::to_value(value)
        .expect("our own types are representable in JSON")
        .to_string()
}

/// Hashes 16-bit values as their little-endian bytes.
pub fn update_i16<'a>(hasher: &mut blake3::Hasher, values: impl Iterator<Item = &'a i16>) {
    // Whole blocks at a time: both the loop and the hash then use vectors.
    let mut block = [0; 1 << 14];
    let mut used = 0;
    for value in values {
        block[used..used + 2].copy_from_slice(&value.to_le_bytes());
        used += 2;
        if used == block.len() {
            hasher.update(&block);
            used = 0;
        }
    }
    hasher.update(&block[..used]);
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let invalid = || DigestError(text.chars().take(80).collect());
        if text.len() != 64 || !text.is_ascii() {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
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
    fn hex_round_trips_and_refuses_other_text() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        // The published BLAKE3 digest of "abc".
        assert!(digest.to_string().starts_with("6437b3ac38465133ffb63b75273a8db5"));
        assert!("xyz".parse::<Digest>().is_err());
        assert!("é".repeat(32).parse::<Digest>().is_err());
    }

    #[test]
    fn canonical_json_sorts_keys() {
        let value = serde_json::json!({"b": 1, "a": {"d": 0.5, "c": [1]}});
        assert_eq!(canonical_json(&value), r#"{"a":{"c":[1],"d":0.5},"b":1}"#);
    }
}
