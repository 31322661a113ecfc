//! Fingerprints of scans that were never taken.

use freetumor::rng::{Purpose, Rng};
use freetumor::volume::Fingerprint;

/// Returns what planes of 5 mm of a patient look like, of 40 in all.
pub fn fingerprint(patient: u64, planes: std::ops::Range<usize>) -> Fingerprint {
    let mut rng = Rng::keyed(patient, 0, 0, Purpose::Test);
    let mut codes: [i64; 6] = std::array::from_fn(|_| 100 + rng.below(60) as i64);
    let mut bytes = vec![1, 1, 0];
    [5000_u32, 800, 800]
        .iter()
        .for_each(|side| bytes.extend(side.to_le_bytes()));
    for plane in 0..planes.end {
        for code in &mut codes {
            *code = (*code + rng.below(5) as i64 - 2).clamp(20, 240);
        }
        if plane >= planes.start {
            bytes.extend(codes.map(|code| code as u8));
        }
    }
    Fingerprint::from_bytes(bytes).expect("far below the limit")
}
