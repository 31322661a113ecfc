//! The filter before Zstandard for HU: what the rows above and behind do not foretell, split where noise begins.
//!
//! A voxel is foretold by `above + behind - above_behind` (y - 1, z - 1, both), along the first plane by the row above,
//! along the first row by its neighbour. Both sums go over whole rows, so that undoing them is a few vector additions.
//! The differences, folded to 0, -1, 1, -2, ... as 0, 1, 2, 3, ..., are split in three parts: bits 0 to 3, which are
//! mostly noise and are stored as they are unless that wastes a quarter of them; bits 4 to 7, two voxels to a byte; bits
//! 8 to 15, which are zero nearly everywhere. Huffman codes are what unpacking costs, and the split leaves half as many.
//!
//! Measured on real CTs at 1.5 mm with chunks of 16 x 16 x 32: bytes shuffled without prediction take 0.87 bytes per
//! voxel, predicted and shuffled 0.57, split as here 0.63 and unpacked half as fast again.

use super::codec::{deflate, inflate};
use crate::volume::Shape;

/// The first voxel and the lengths of the three parts.
pub(super) const HEAD_BYTES: usize = 10;
/// A listed byte: its place and its value.
const LISTED_BYTES: usize = 3;
/// The most voxels of a chunk: lengths of parts have 16 bits.
pub(super) const MAX_VOXELS: usize = 32_768;
/// The longest row of a chunk.
pub(super) const MAX_ROW: usize = 64;

fn fold(value: i16) -> u16 {
    ((value << 1) ^ (value >> 15)) as u16
}

fn unfold(value: u16) -> i16 {
    ((value >> 1) as i16) ^ (((value & 1) as i16).wrapping_neg())
}

/// Returns what is not foretold of each voxel, folded.
fn differences(hu: &[i16], [_, rows, width]: Shape) -> Vec<u16> {
    let plane = rows * width;
    let mut folded = Vec::with_capacity(hu.len());
    for (number, row) in hu.chunks_exact(width).enumerate() {
        let start = number * width;
        let row_at = |back: usize| &hu[start - back..start - back + width];
        match (number >= rows, number % rows > 0) {
            (false, false) => {
                folded.push(0);
                folded.extend(row.windows(2).map(|pair| fold(pair[1].wrapping_sub(pair[0]))));
            }
            (has_behind, has_above) if has_behind != has_above => {
                let known = row_at(if has_above { width } else { plane });
                folded.extend(row.iter().zip(known).map(|(hu, known)| fold(hu.wrapping_sub(*known))));
            }
            _ => {
                let (above, behind, both) = (row_at(width), row_at(plane), row_at(plane + width));
                let known = above.iter().zip(behind).zip(both);
                folded.extend(row.iter().zip(known).map(|(hu, ((above, behind), both))| {
                    fold(hu.wrapping_sub(above.wrapping_add(*behind).wrapping_sub(*both)))
                }));
            }
        }
    }
    folded
}

/// Packs the HU of a chunk with sides (z, y, x).
pub(super) fn pack(hu: &[i16], sides: Shape) -> std::io::Result<Vec<u8>> {
    let folded = differences(hu, sides);
    let half = hu.len().div_ceil(2);
    let (front, back) = folded.split_at(half);
    let nibbles = |shift: u32| -> Vec<u8> {
        let nibble = |value: u16| (value >> shift & 15) as u8;
        // A voxel shares its byte with the one half a chunk away: unpacking then moves no bytes sideways.
        let mut bytes: Vec<u8> = front.iter().map(|value| nibble(*value)).collect();
        bytes
            .iter_mut()
            .zip(back)
            .for_each(|(byte, value)| *byte |= nibble(*value) << 4);
        bytes
    };
    let high: Vec<u8> = folded.iter().map(|value| (value >> 8) as u8).collect();
    let (listed, high) = match list(&high) {
        Some(list) => (list.len() / LISTED_BYTES, list),
        None => (0, part(high, |plain, packed| packed < plain)?),
    };
    let parts = [
        part(nibbles(0), |plain, packed| packed < plain / 4 * 3)?,
        part(nibbles(4), |plain, packed| packed < plain)?,
        high,
    ];
    let mut bytes = Vec::with_capacity(HEAD_BYTES + parts.iter().map(Vec::len).sum::<usize>());
    bytes.extend(hu.first().copied().unwrap_or_default().to_le_bytes());
    for part in &parts {
        let length = u16::try_from(part.len()).map_err(std::io::Error::other)?;
        bytes.extend(length.to_le_bytes());
    }
    let listed = u16::try_from(listed).map_err(std::io::Error::other)?;
    bytes.extend(listed.to_le_bytes());
    parts.iter().for_each(|part| bytes.extend(part));
    Ok(bytes)
}

/// Returns the places and values of the bytes that are not zero, where they are few.
fn list(high: &[u8]) -> Option<Vec<u8>> {
    let places: Vec<usize> = (0..high.len()).filter(|at| high[*at] != 0).collect();
    if places.is_empty() || places.len() * LISTED_BYTES > high.len() / 8 {
        return None;
    }
    let mut bytes = Vec::with_capacity(places.len() * LISTED_BYTES);
    places.iter().for_each(|at| bytes.extend((*at as u16).to_le_bytes()));
    bytes.extend(places.iter().map(|at| high[*at]));
    Some(bytes)
}

/// Returns a part as it is stored: nothing for zeros, Zstandard where that `pays`, else as it is.
fn part(plain: Vec<u8>, pays: impl Fn(usize, usize) -> bool) -> std::io::Result<Vec<u8>> {
    if plain.iter().all(|byte| *byte == 0) {
        return Ok(Vec::new());
    }
    let mut packed = deflate(&plain, false)?;
    // Matches of a few bytes save little and take long to follow; long ones, of zeros, show in codes of one or two bits.
    if packed.len() < plain.len() / 4 {
        let with_matches = deflate(&plain, true)?;
        if 2 * with_matches.len() < packed.len() {
            packed = with_matches;
        }
    }
    Ok(if pays(plain.len(), packed.len()) { packed } else { plain })
}

/// Room for unpacking; kept by the caller, as it is larger than a chunk.
#[derive(Default)]
pub(super) struct Workspace {
    nibbles: [Vec<u8>; 2],
    low: Vec<u8>,
    high: Vec<u8>,
}

/// Unpacks the first planes of a chunk with sides (z, y, x), as many as `into` holds.
pub(super) fn unpack(packed: &[u8], sides: Shape, into: &mut [i16], work: &mut Workspace) -> Result<(), String> {
    let voxels: usize = sides.iter().product();
    let half = voxels.div_ceil(2);
    let (head, mut rest) = packed
        .split_at_checked(HEAD_BYTES)
        .ok_or_else(|| format!("{} bytes of residuals", packed.len()))?;
    let word = |at: usize| [head[at], head[at + 1]];
    let first = i16::from_le_bytes(word(0));
    let listed = usize::from(u16::from_le_bytes(word(8)));
    let Workspace { nibbles, low, high } = work;
    let [first_nibbles, second_nibbles] = nibbles;
    for (number, (buffer, length)) in [(first_nibbles, half), (second_nibbles, half), (&mut *high, voxels)]
        .into_iter()
        .enumerate()
    {
        let stored = usize::from(u16::from_le_bytes(word(2 + 2 * number)));
        let (part, after) = rest
            .split_at_checked(stored)
            .ok_or_else(|| format!("part {number} of the residuals reaches past the end"))?;
        rest = after;
        if number == 2 && listed > 0 {
            unlist(part, listed, length, buffer)?;
        } else {
            unpack_part(part, length, buffer, number == 2)?;
        }
    }
    if !rest.is_empty() {
        return Err(format!("{} bytes after the residuals", rest.len()));
    }
    low.resize(voxels, 0);
    join_nibbles(&nibbles[0], &nibbles[1], low);
    let [_, rows, width] = sides;
    // The usual width as a constant, so that a row stays in registers.
    match width {
        32 => restore(first, low, high, [rows, 32], into),
        _ => restore(first, low, high, [rows, width], into),
    }
    Ok(())
}

/// Unpacks a part; zeros become `length` zeros, or nothing where the caller can do without.
fn unpack_part(part: &[u8], length: usize, into: &mut Vec<u8>, may_be_empty: bool) -> Result<(), String> {
    into.clear();
    if part.is_empty() {
        if !may_be_empty {
            into.resize(length, 0);
        }
        return Ok(());
    }
    if part.len() == length {
        into.extend_from_slice(part);
        return Ok(());
    }
    into.resize(length, 0);
    inflate(part, into)
}

/// Unpacks listed bytes between zeros.
fn unlist(part: &[u8], listed: usize, length: usize, into: &mut Vec<u8>) -> Result<(), String> {
    if part.len() != listed * LISTED_BYTES {
        return Err(format!("{} bytes for {listed} listed residuals", part.len()));
    }
    into.clear();
    into.resize(length, 0);
    let (places, values) = part.split_at(2 * listed);
    for (place, value) in places.chunks_exact(2).zip(values) {
        let place = usize::from(u16::from_le_bytes([place[0], place[1]]));
        *into
            .get_mut(place)
            .ok_or_else(|| format!("a residual at {place} of {length}"))? = *value;
    }
    Ok(())
}

fn join_nibbles(first: &[u8], second: &[u8], into: &mut [u8]) {
    let (front, back) = into.split_at_mut(first.len());
    for ((to, a), b) in front.iter_mut().zip(first).zip(second) {
        *to = (a & 15) | (b << 4);
    }
    for ((to, a), b) in back.iter_mut().zip(first).zip(second) {
        *to = (a >> 4) | (b & 0xf0);
    }
}

/// Undoes the prediction for whole planes.
#[inline(always)]
fn restore(first: i16, low: &[u8], high: &[u8], [rows, width]: [usize; 2], into: &mut [i16]) {
    let plane = rows * width;
    let mut start = 0;
    while start < into.len() {
        let (done, rest) = into.split_at_mut(start);
        let low = &low[start..start + plane];
        let seed = if start == 0 { Some(first) } else { None };
        if high.is_empty() {
            sum_rows(low, &[], seed, width, &mut rest[..plane]);
        } else {
            sum_rows(low, &high[start..start + plane], seed, width, &mut rest[..plane]);
        }
        if start > 0 {
            add_plane(&mut rest[..plane], &done[start - plane..]);
        }
        start += plane;
    }
}

/// Sums the differences of one plane from row to row; the first plane's first row also along itself, from `seed` on.
#[inline(always)]
fn sum_rows(low: &[u8], high: &[u8], seed: Option<i16>, width: usize, into: &mut [i16]) {
    let mut column = [0_i16; MAX_ROW];
    let column = &mut column[..width];
    for (y, (row, low)) in into.chunks_exact_mut(width).zip(low.chunks_exact(width)).enumerate() {
        if high.is_empty() {
            for (sum, low) in column.iter_mut().zip(low) {
                *sum = sum.wrapping_add(unfold(u16::from(*low)));
            }
        } else {
            let high = &high[y * width..(y + 1) * width];
            for ((sum, low), high) in column.iter_mut().zip(low).zip(high) {
                *sum = sum.wrapping_add(unfold(u16::from(*low) | u16::from(*high) << 8));
            }
        }
        if y == 0
            && let Some(mut value) = seed
        {
            for sum in column.iter_mut() {
                value = value.wrapping_add(*sum);
                *sum = value;
            }
        }
        row.copy_from_slice(column);
    }
}

/// Not inlined: as arguments, the two are known not to overlap, which is what lets the loop become vector additions.
#[inline(never)]
fn add_plane(to: &mut [i16], behind: &[i16]) {
    for (to, behind) in to.iter_mut().zip(behind) {
        *to = to.wrapping_add(*behind);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng};

    #[test]
    fn any_chunk_comes_back() {
        let mut rng = Rng::keyed(3, 0, 0, Purpose::Test);
        let mut work = Workspace::default();
        for sides in [[16, 16, 32], [1, 1, 1], [3, 5, 7], [16, 3, 32], [2, 1, 64], [5, 9, 1]] {
            let voxels: usize = sides.iter().product();
            // Smooth, noisy, and everything that 16 bits hold.
            for spread in [0, 3, 40, 500, 65_536] {
                let hu: Vec<i16> = (0..voxels)
                    .map(|at| (at as i64 * 3 - 900 + rng.below(spread + 1) as i64) as i16)
                    .collect();
                let packed = pack(&hu, sides).unwrap();
                let mut got = vec![0; voxels];
                unpack(&packed, sides, &mut got, &mut work).unwrap();
                assert_eq!(got, hu, "{sides:?} {spread}");
                // Fewer planes are a prefix.
                let some = voxels / sides[0] * sides[0].div_ceil(2);
                let mut got = vec![0; some];
                unpack(&packed, sides, &mut got, &mut work).unwrap();
                assert_eq!(got, hu[..some]);
            }
        }
    }

    #[test]
    fn what_is_cut_or_changed_is_an_error_or_another_chunk() {
        let sides = [4, 4, 32];
        let hu: Vec<i16> = (0..512).map(|at| (at * at % 701) as i16).collect();
        let packed = pack(&hu, sides).unwrap();
        let mut got = vec![0; 512];
        let mut work = Workspace::default();
        for end in 0..packed.len() {
            assert!(unpack(&packed[..end], sides, &mut got, &mut work).is_err());
        }
        for at in 0..packed.len() {
            let mut changed = packed.clone();
            changed[at] ^= 0x55;
            drop(unpack(&changed, sides, &mut got, &mut work));
        }
    }
}
