//! What frames carry of a patch, kept with it while somebody else holds the patch too.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::delivery::ImageType;
use crate::volume::HuWindow;

/// One patch's part of a tensor, by what decides its bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorKey {
    /// The tensor's name.
    pub name: &'static str,
    /// How intensities are written, and their window; nothing for tensors of integers.
    pub intensities: Option<(ImageType, HuWindow)>,
}

/// Bytes that are ready to be sent.
#[derive(Clone, Debug)]
pub struct EncodedTensor {
    /// One patch's elements, little-endian.
    pub bytes: Bytes,
    /// Their checksum.
    pub crc32: u32,
}

/// Encoded tensors of one patch, at most one of each name. They go with the patch, and a copy of the patch starts with none.
#[derive(Debug, Default)]
pub struct Encoded(Mutex<Vec<(TensorKey, EncodedTensor)>>);

impl Clone for Encoded {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Encoded {
    /// Returns a tensor, made if it is not there, and left for the next who asks if the patch `is_shared` and no other tensor of that
    /// name was left before.
    ///
    /// Whoever asks for a tensor that is being made to be left waits for it instead of making it again. So `make` must not compute in
    /// parallel on the threads of those who ask.
    pub fn get(&self, key: TensorKey, is_shared: bool, make: impl FnOnce() -> EncodedTensor) -> EncodedTensor {
        let mut encoded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match encoded.iter().find(|(of, _)| of.name == key.name) {
            Some((of, tensor)) if *of == key => tensor.clone(),
            None if is_shared => {
                let tensor = make();
                encoded.push((key, tensor.clone()));
                tensor
            }
            _ => {
                drop(encoded);
                make()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn made(byte: u8) -> EncodedTensor {
        EncodedTensor {
            bytes: vec![byte].into(),
            crc32: byte.into(),
        }
    }

    fn image(image: ImageType, window: HuWindow) -> TensorKey {
        TensorKey {
            name: "image",
            intensities: Some((image, window)),
        }
    }

    #[test]
    fn what_is_shared_is_made_once_and_one_tensor_of_a_name_is_kept() {
        let (encoded, window) = (Encoded::default(), HuWindow::default());
        let half = image(ImageType::F16, window);
        assert_eq!(encoded.get(half, false, || made(1)).crc32, 1);
        assert_eq!(
            encoded.get(half, true, || made(2)).crc32,
            2,
            "what is not shared is not kept"
        );
        assert_eq!(encoded.get(half, true, || made(3)).crc32, 2);
        assert_eq!(
            encoded.get(half, false, || made(4)).crc32,
            2,
            "the last who asks gets what was kept"
        );
        let wide = HuWindow {
            low: window.low - 1.0,
            ..window
        };
        for other in [image(ImageType::F32, window), image(ImageType::F16, wide)] {
            assert_eq!(encoded.get(other, true, || made(5)).crc32, 5);
            assert_eq!(
                encoded.get(other, true, || made(6)).crc32,
                6,
                "a second kind is not kept"
            );
        }
        assert_eq!(encoded.clone().get(half, false, || made(7)).crc32, 7);
    }

    #[test]
    fn who_asks_for_what_is_being_made_waits_for_it() {
        let (encoded, begin, count) = (Encoded::default(), Barrier::new(4), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    begin.wait();
                    let key = image(ImageType::F16, HuWindow::default());
                    let tensor = encoded.get(key, true, || {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        count.fetch_add(1, Ordering::SeqCst);
                        made(1)
                    });
                    assert_eq!(tensor.crc32, 1);
                });
            }
        });
        assert_eq!(count.into_inner(), 1);
    }
}
