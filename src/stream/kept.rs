//! What frames carry of a patch, kept with it while several streams are to send it.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::delivery::ImageType;

/// One patch's part of a tensor, by what decides its bytes; the window of intensities is the store's, for all streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorKey {
    /// The tensor's name.
    pub name: &'static str,
    /// How intensities are written; nothing for tensors of integers.
    pub image: Option<ImageType>,
}

/// Bytes that are ready to be sent.
#[derive(Clone, Debug)]
pub struct KeptTensor {
    /// One patch's elements, little-endian.
    pub bytes: Bytes,
    /// Their checksum.
    pub crc32: u32,
}

/// The tensors that are kept with a patch. They go with it, and a copy of the patch starts with none.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Vec<(TensorKey, KeptTensor)>>);

impl Clone for Kept {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Kept {
    /// Returns a tensor, made if it is not kept, and kept for the next who asks if it `is_shared`.
    ///
    /// Whoever asks for a shared tensor that is being made waits for it instead of making it again.
    pub fn get(&self, key: TensorKey, is_shared: bool, make: impl FnOnce() -> KeptTensor) -> KeptTensor {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tensor)) = kept.iter().find(|(of, _)| *of == key) {
            return tensor.clone();
        }
        if !is_shared {
            return make();
        }
        let tensor = make();
        kept.push((key, tensor.clone()));
        tensor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(byte: u8) -> KeptTensor {
        KeptTensor {
            bytes: vec![byte].into(),
            crc32: byte.into(),
        }
    }

    #[test]
    fn what_is_shared_is_made_once_for_each_key() {
        let kept = Kept::default();
        let half = TensorKey {
            name: "image",
            image: Some(ImageType::F16),
        };
        let single = TensorKey {
            image: Some(ImageType::F32),
            ..half
        };
        assert_eq!(kept.get(half, false, || made(1)).crc32, 1);
        assert_eq!(
            kept.get(half, true, || made(2)).crc32,
            2,
            "what is not shared is not kept"
        );
        assert_eq!(kept.get(half, true, || made(3)).crc32, 2);
        assert_eq!(
            kept.get(half, false, || made(4)).crc32,
            2,
            "the last who asks gets what was kept"
        );
        assert_eq!(kept.get(single, true, || made(5)).crc32, 5);
        assert_eq!(kept.clone().get(half, false, || made(6)).crc32, 6);
    }
}
