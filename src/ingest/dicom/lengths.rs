//! Whether every length that a file declares lies in the file: the parser allocates what a length says before it reads.

use dicom_core::VR;
use dicom_core::dictionary::{DataDictionary, DataDictionaryEntry};
use dicom_dictionary_std::StandardDataDictionary;
use dicom_object::Tag;

/// The preamble and `DICM`.
pub(super) const PREFIX_BYTES: usize = 132;
/// Length of sequences and items that end with a delimiter.
const UNDEFINED: u32 = u32::MAX;
/// The group of items and delimiters, which have no type.
const ITEM_GROUP: u16 = 0xfffe;
const ITEM: u16 = 0xe000;
/// Sequences and their items; structured reports are the deepest in use.
const MAX_DEPTH: usize = 64;

/// How elements are written after the file's own group, which is always explicit.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Encoding {
    /// Explicit VR, little endian.
    Explicit,
    /// Implicit VR, little endian.
    Implicit,
}

/// What follows an element's head.
#[derive(Clone, Copy)]
enum Kind {
    /// As many bytes as it declares.
    Value,
    /// Elements.
    Container,
    /// What follows the container that ends here.
    End,
}

/// One element's head.
struct Head {
    tag: Tag,
    kind: Kind,
    length: u32,
    bytes: usize,
}

/// Checks the lengths of all elements from `from` on; containers are entered, so that what they hold is checked too, and may
/// stand in each other [`MAX_DEPTH`] deep, because the parser goes a call deeper with each.
pub(super) fn check(bytes: &[u8], from: usize, encoding: Encoding) -> Result<(), String> {
    let mut at = from;
    // The ends of the containers around; those that end with a delimiter have none.
    let mut around: Vec<usize> = Vec::new();
    while at < bytes.len() {
        while around.last().is_some_and(|end| *end <= at) {
            around.pop();
        }
        let head = head(&bytes[at..], encoding)
            .ok_or_else(|| format!("truncated: an element begins at byte {at} of {}", bytes.len()))?;
        let start = at + head.bytes;
        let left = bytes.len() - start;
        let length = (head.length != UNDEFINED).then_some(head.length as usize);
        if length.is_some_and(|length| length > left) {
            return Err(format!(
                "truncated: element {} declares {} bytes, {left} are left",
                head.tag, head.length
            ));
        }
        at = match (head.kind, length) {
            (Kind::Value, Some(length)) => start + length,
            (Kind::Value, None) => return Err(format!("element {}: a value of undefined length", head.tag)),
            (Kind::End, _) => {
                around.pop();
                start
            }
            (Kind::Container, length) => {
                around.push(length.map_or(usize::MAX, |length| start + length));
                start
            }
        };
        if around.len() > MAX_DEPTH {
            return Err(format!("element {}: nested more than {MAX_DEPTH} deep", head.tag));
        }
    }
    Ok(())
}

/// Returns where the file's own group ends: the first element of another group.
pub(super) fn end_of_meta(bytes: &[u8]) -> Result<usize, String> {
    let mut at = PREFIX_BYTES;
    loop {
        match bytes.get(at..at + 2) {
            Some([2, 0]) => {}
            // What follows may have no types, so no more than the group is read here.
            Some(_) => return Ok(at),
            None => return Err("truncated: the file ends in its own header".into()),
        }
        let head =
            head(&bytes[at..], Encoding::Explicit).ok_or_else(|| format!("its own header is damaged at byte {at}"))?;
        let end = at + head.bytes + head.length as usize;
        if head.length == UNDEFINED || end > bytes.len() {
            return Err(format!(
                "truncated: element {} declares {} bytes",
                head.tag, head.length
            ));
        }
        at = end;
    }
}

fn head(bytes: &[u8], encoding: Encoding) -> Option<Head> {
    let half = |at: usize| Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let word = |at: usize| Some(u32::from(half(at)?) | u32::from(half(at + 2)?) << 16);
    let tag = Tag(half(0)?, half(2)?);
    let kind = |is_sequence: bool| if is_sequence { Kind::Container } else { Kind::Value };
    if tag.group() == ITEM_GROUP {
        let kind = if tag.element() == ITEM {
            Kind::Container
        } else {
            Kind::End
        };
        let length = word(4)?;
        return Some(Head {
            tag,
            kind,
            length,
            bytes: 8,
        });
    }
    if encoding == Encoding::Implicit {
        let vr = StandardDataDictionary.by_tag(tag).and_then(|entry| entry.vr().exact());
        let length = word(4)?;
        // What has no length is read as a sequence, known as one or not.
        let kind = kind(vr == Some(VR::SQ) || length == UNDEFINED);
        return Some(Head {
            tag,
            kind,
            length,
            bytes: 8,
        });
    }
    let vr = VR::from_binary([*bytes.get(4)?, *bytes.get(5)?])?;
    let is_long = matches!(
        vr,
        VR::OB
            | VR::OD
            | VR::OF
            | VR::OL
            | VR::OV
            | VR::OW
            | VR::SQ
            | VR::SV
            | VR::UC
            | VR::UN
            | VR::UR
            | VR::UT
            | VR::UV
    );
    let (length, bytes) = if is_long {
        (word(8)?, 12)
    } else {
        (u32::from(half(6)?), 8)
    };
    let kind = kind(vr == VR::SQ || length == UNDEFINED);
    Some(Head {
        tag,
        kind,
        length,
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_past_the_end_are_refused() {
        // (0010,0020) LO, two bytes.
        let good = [0x10, 0, 0x20, 0, b'L', b'O', 2, 0, b'a', b'b'];
        assert_eq!(check(&good, 0, Encoding::Explicit), Ok(()));
        assert!(
            check(&good[..9], 0, Encoding::Explicit)
                .unwrap_err()
                .contains("2 bytes, 1 are left")
        );
        assert!(
            check(&good[..5], 0, Encoding::Explicit)
                .unwrap_err()
                .contains("begins at byte 0 of 5")
        );
        // (7fe0,0010) implicit, four gigabytes less one.
        let huge = [0xe0, 0x7f, 0x10, 0, 0xfe, 0xff, 0xff, 0xff];
        assert!(check(&huge, 0, Encoding::Implicit).unwrap_err().contains("4294967294"));
        // The same inside a sequence of undefined length.
        let mut nested = vec![0x08, 0, 0x40, 0x11, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff];
        nested.extend([0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff]);
        nested.extend([0x10, 0, 0x20, 0, b'U', b'T', 0, 0, 0, 0, 0, 0x70]);
        assert!(
            check(&nested, 0, Encoding::Explicit)
                .unwrap_err()
                .contains("0 are left")
        );
    }
    #[test]
    fn nests_are_bounded() {
        // (0008,1140) SQ and an item, both of undefined length, again and again.
        let mut level = vec![0x08, 0, 0x40, 0x11, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff];
        level.extend([0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(check(&level.repeat(MAX_DEPTH / 2), 0, Encoding::Explicit), Ok(()));
        let error = check(&level.repeat(MAX_DEPTH), 0, Encoding::Explicit).unwrap_err();
        assert!(error.contains("more than 64 deep"), "{error}");
        // One after the other is no nest: each ends, with its item, where the next begins.
        let end = [0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0];
        let item_end = [0xfe, 0xff, 0x0d, 0xe0, 0, 0, 0, 0];
        let whole = [level.as_slice(), &item_end, &end].concat();
        assert_eq!(check(&whole.repeat(200), 0, Encoding::Explicit), Ok(()));
    }
}
