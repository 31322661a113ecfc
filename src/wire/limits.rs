//! What a request may ask for: a batch must fit into a frame, whatever its codec.

use super::codec::{ALIGNMENT, Encoding, layout};
use super::frame::MAX_FRAME_BYTES;
use crate::stream::StreamError;
use crate::stream::delivery::Delivery;
use crate::volume::{HuWindow, Shape};

/// Room kept for the preamble, the header (about 1 KiB for every patch with its lesions) and zstd's overhead on noise.
const HEADER_ROOM_BYTES: u64 = 1 << 20;

/// Returns the payload of one batch in bytes, before compression.
pub fn batch_bytes(batch_size: u32, patch: Shape, encoding: &Encoding) -> u64 {
    let voxels: u64 = patch
        .iter()
        .fold(batch_size.into(), |n: u64, side| n.saturating_mul(*side as u64));
    layout(encoding)
        .into_iter()
        .map(|(_, element)| {
            voxels
                .saturating_mul(element.bytes() as u64)
                .saturating_add(ALIGNMENT as u64)
        })
        .fold(0, u64::saturating_add)
}

/// Checks that a batch fits into a frame.
///
/// # Errors
/// [`StreamError::Delivery`] names the field.
pub fn check_frame(delivery: &Delivery, patch: Shape) -> Result<(), StreamError> {
    // The window does not change sizes.
    let bytes = batch_bytes(delivery.batch_size, patch, &Encoding::of(delivery, HuWindow::default()));
    let limit = MAX_FRAME_BYTES - HEADER_ROOM_BYTES;
    if bytes > limit {
        return Err(StreamError::Delivery {
            field: "batch_size",
            expected: format!("a batch of at most {limit} bytes (frame limit {MAX_FRAME_BYTES})"),
            got: format!("{} patches of {patch:?} voxels: {bytes} bytes", delivery.batch_size),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::delivery::Output;

    #[test]
    fn a_batch_beyond_the_frame_limit_is_refused_by_name() {
        let delivery = Delivery::default();
        // Two patches of f32 and u8: 5 bytes a voxel.
        assert_eq!(
            batch_bytes(2, [96; 3], &Encoding::of(&delivery, HuWindow::default())),
            2 * 96 * 96 * 96 * 5 + 128
        );
        assert!(check_frame(&delivery, [96; 3]).is_ok());
        let large = Delivery {
            batch_size: u32::MAX,
            outputs: vec![Output::Source, Output::Source],
            ..delivery
        };
        let error = check_frame(&large, [384; 3]).unwrap_err().to_string();
        assert!(error.contains("delivery field batch_size"), "{error}");
    }
}
