//! The interface of the crate `crc32fast` that the store uses, with 0 as the checksum of everything.

/// A checksum that looks at nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hasher;

impl Hasher {
    /// Starts a checksum.
    pub fn new() -> Self {
        Self
    }

    /// Takes bytes and forgets them.
    pub fn update(&mut self, _bytes: &[u8]) {}

    /// Returns 0.
    pub fn finalize(self) -> u32 {
        0
    }
}

/// Returns 0.
pub fn hash(_bytes: &[u8]) -> u32 {
    0
}
