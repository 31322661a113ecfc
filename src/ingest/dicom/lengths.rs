//! What a file declares, checked before it is parsed: the parser allocates what a length says before it reads, keeps every
//! element, and goes a call deeper with every nest.

use dicom_core::VR;
use dicom_core::dictionary::{DataDictionary, DataDictionaryEntry};
use dicom_dictionary_std::{StandardDataDictionary, tags};
use dicom_object::Tag;

/// The preamble and `DICM`.
pub(super) const PREFIX_BYTES: usize = 132;
/// The most bytes of all values but pixels: scanners' private headers take some hundred thousand.
const MAX_VALUE_BYTES: usize = 4 << 20;
/// The most elements of a slice; scanners write some hundreds.
const MAX_ELEMENTS: usize = 1 << 16;
/// Sequences and their items around an element; structured reports are the deepest in use.
const MAX_DEPTH: usize = 64;
/// Length of sequences and items that end with a delimiter.
const UNDEFINED: u32 = u32::MAX;
const ITEM: Tag = Tag(0xfffe, 0xe000);
const ITEM_END: Tag = Tag(0xfffe, 0xe00d);
const SEQUENCE_END: Tag = Tag(0xfffe, 0xe0dd);

/// How elements are written after the file's own group, which is always explicit.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Encoding {
    /// Explicit VR, little endian.
    Explicit,
    /// Implicit VR, little endian.
    Implicit,
}

/// One element's head.
struct Head {
    tag: Tag,
    /// As the parser takes it; [`VR::UN`] where it has none.
    vr: VR,
    is_sequence: bool,
    /// Nothing where a delimiter ends it.
    length: Option<usize>,
    bytes: usize,
}

/// What elements stand in.
#[derive(Clone, Copy, PartialEq)]
enum Container {
    /// The file, or an item of a sequence: elements.
    Elements,
    /// A sequence: items.
    Sequence,
}

/// A container around the element at hand, and where it ends; nothing where a delimiter ends it.
#[derive(Clone, Copy)]
struct Around {
    container: Container,
    end: Option<usize>,
}

/// Walks over all elements from `from` on and refuses what the parser could not read with little memory: lengths that reach
/// past their container or are no multiple of what their type counts in, stray items and delimiters, deep nests, too many elements, too large values other than pixels.
pub(super) fn check(bytes: &[u8], from: usize, encoding: Encoding) -> Result<(), String> {
    let mut at = from;
    let mut around = vec![Around {
        container: Container::Elements,
        end: Some(bytes.len()),
    }];
    let (mut elements, mut value_bytes) = (0, 0);
    while let Some(inner) = around.last().copied() {
        let end = around.iter().rev().find_map(|around| around.end).unwrap_or(bytes.len());
        if inner.end == Some(at) {
            around.pop();
            continue;
        }
        let head = head(bytes.get(at..end).unwrap_or_default(), encoding)
            .ok_or_else(|| format!("truncated: an element begins at byte {at} of {end}"))?;
        let (start, tag) = (at + head.bytes, head.tag);
        let left = end - start;
        if head.length.is_some_and(|length| length > left) {
            let length = head.length.unwrap_or_default();
            return Err(format!(
                "truncated: element {tag} declares {length} bytes, {left} are left"
            ));
        }
        at = start;
        let opened = match (inner.container, tag) {
            (Container::Sequence, ITEM) => Some(Container::Elements),
            (Container::Sequence, SEQUENCE_END) | (Container::Elements, ITEM_END)
                if inner.end.is_none() && head.length == Some(0) =>
            {
                around.pop();
                None
            }
            (Container::Elements, tag) if tag.group() != ITEM.group() => {
                head.is_sequence.then_some(Container::Sequence)
            }
            _ => return Err(format!("element {tag} in a place where none such may stand")),
        };
        match opened {
            Some(container) => around.push(Around {
                container,
                end: head.length.map(|length| start + length),
            }),
            None => at += head.length.unwrap_or_default(),
        }
        elements += 1;
        check_units(&head, opened.is_some())?;
        if opened.is_none() && tag != tags::PIXEL_DATA {
            value_bytes += head.length.unwrap_or_default();
        }
        if around.len() > MAX_DEPTH + 1 || elements > MAX_ELEMENTS || value_bytes > MAX_VALUE_BYTES {
            return Err(format!(
                "element {tag}: more than {MAX_ELEMENTS} elements, {MAX_VALUE_BYTES} bytes beside the pixels, or a nest deeper \
                 than {MAX_DEPTH}"
            ));
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
        let head = explicit(&bytes[at..]).ok_or_else(|| format!("its own header is damaged at byte {at}"))?;
        let end = head.length.map(|length| at + head.bytes + length);
        match end.filter(|end| *end <= bytes.len()) {
            Some(end) => at = end,
            None => return Err(format!("truncated: element {} reaches past the end", head.tag)),
        }
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Returns a length of four bytes: `Some(None)` where it is undefined.
fn length(bytes: &[u8], at: usize) -> Option<Option<usize>> {
    let word = u32::from(half(bytes, at)?) | u32::from(half(bytes, at + 2)?) << 16;
    Some((word != UNDEFINED).then_some(word as usize))
}

fn head(bytes: &[u8], encoding: Encoding) -> Option<Head> {
    let tag = Tag(half(bytes, 0)?, half(bytes, 2)?);
    if tag.group() != ITEM.group() && encoding == Encoding::Explicit {
        return explicit(bytes);
    }
    let known = StandardDataDictionary.by_tag(tag).map(|entry| entry.vr());
    let vr = known.and_then(|vr| vr.exact());
    let length = length(bytes, 4)?;
    Some(Head {
        tag,
        vr: known.map_or(VR::UN, |vr| vr.relaxed()),
        // What has no length and no known type is read as a sequence.
        is_sequence: tag != tags::PIXEL_DATA && (vr == Some(VR::SQ) || length.is_none()),
        length,
        bytes: 8,
    })
    .filter(|head| head.length.is_some() || head.is_sequence)
}

/// Reads the head of an element with its type; only sequences may leave their length open.
fn explicit(bytes: &[u8]) -> Option<Head> {
    let tag = Tag(half(bytes, 0)?, half(bytes, 2)?);
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
        (length(bytes, 8)?, 12)
    } else {
        (Some(usize::from(half(bytes, 6)?)), 8)
    };
    let is_sequence = vr == VR::SQ;
    (length.is_some() || is_sequence).then_some(Head {
        tag,
        vr,
        is_sequence,
        length,
        bytes,
    })
}

/// Refuses values that do not hold whole units of their type: the parser would take what is left over for an element.
fn check_units(head: &Head, is_container: bool) -> Result<(), String> {
    let unit = match head.vr {
        VR::OW | VR::SS | VR::US => 2,
        VR::AT | VR::FL | VR::OF | VR::OL | VR::SL | VR::UL => 4,
        VR::FD | VR::OD | VR::OV | VR::SV | VR::UV => 8,
        _ => 1,
    };
    match head.length {
        Some(length) if !is_container && length % unit != 0 => Err(format!(
            "element {}: expected a multiple of {unit} bytes of type {}, got {length}",
            head.tag,
            head.vr.to_string()
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: [u8; 4] = [0xff; 4];
    const ITEM_OPEN: [u8; 8] = [0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff];
    const ITEM_ENDS: [u8; 8] = [0xfe, 0xff, 0x0d, 0xe0, 0, 0, 0, 0];
    const SEQUENCE_ENDS: [u8; 8] = [0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0];

    /// (0008,1140), a sequence, of some length.
    fn sequence(length: [u8; 4]) -> Vec<u8> {
        [[0x08, 0, 0x40, 0x11, b'S', b'Q', 0, 0].as_slice(), &length].concat()
    }

    fn refusal(bytes: &[u8]) -> String {
        check(bytes, 0, Encoding::Explicit).unwrap_err()
    }

    #[test]
    fn lengths_past_the_end_are_refused() {
        // (0010,0020) LO, two bytes.
        let good = [0x10, 0, 0x20, 0, b'L', b'O', 2, 0, b'a', b'b'];
        assert_eq!(check(&good, 0, Encoding::Explicit), Ok(()));
        assert!(refusal(&good[..9]).contains("2 bytes, 1 are left"));
        assert!(refusal(&good[..5]).contains("begins at byte 0 of 5"));
        // (7fe0,0010) implicit, four gigabytes less two, and of open length.
        let pixels = |length: [u8; 4]| [[0xe0, 0x7f, 0x10, 0].as_slice(), &length].concat();
        let huge = check(&pixels([0xfe, 0xff, 0xff, 0xff]), 0, Encoding::Implicit).unwrap_err();
        assert!(huge.contains("4294967294"), "{huge}");
        assert!(check(&pixels(OPEN), 0, Encoding::Implicit).is_err());
        // UT inside an item of open length; then inside one that ends before it does.
        let text = [0x10, 0, 0x20, 0, b'U', b'T', 0, 0, 8, 0, 0, 0];
        assert!(refusal(&[&sequence(OPEN), ITEM_OPEN.as_slice(), &text].concat()).contains("8 bytes, 0 are left"));
        let short = [
            [0xfe, 0xff, 0, 0xe0, 12, 0, 0, 0].as_slice(),
            &text,
            &[0; 8],
            &SEQUENCE_ENDS,
        ]
        .concat();
        assert!(refusal(&[sequence(OPEN), short].concat()).contains("8 bytes, 0 are left"));
    }

    #[test]
    fn values_hold_whole_units_of_their_type() {
        // (000c,0100) AT, six bytes: the parser reads four, and takes the other two for an element.
        let tags = |length: u8| {
            let head = [0x0c, 0, 0, 1, b'A', b'T', length, 0];
            [head.as_slice(), &[b'1'; 8][..length.into()]].concat()
        };
        assert!(refusal(&tags(6)).contains("a multiple of 4 bytes of type AT, got 6"));
        assert_eq!(check(&tags(8), 0, Encoding::Explicit), Ok(()));
        // (0028,0010) US, of three bytes; (0028,0106), of one of two types that count in two bytes.
        for element in [[0x10, 0], [6, 1]] {
            let bytes = [[0x28, 0].as_slice(), &element, &[3, 0, 0, 0, 1, 2, 3]].concat();
            let refused = check(&bytes, 0, Encoding::Implicit).unwrap_err();
            assert!(refused.contains("a multiple of 2 bytes"), "{refused}");
        }
    }

    #[test]
    fn items_and_delimiters_stand_where_they_may() {
        let whole = [sequence(OPEN).as_slice(), &ITEM_OPEN, &ITEM_ENDS, &SEQUENCE_ENDS].concat();
        // One after the other is no nest.
        assert_eq!(check(&whole.repeat(200), 0, Encoding::Explicit), Ok(()));
        let misplaced = |parts: &[&[u8]]| refusal(&parts.concat()).contains("where none such may stand");
        let value_in_delimiter = [0xfe, 0xff, 0xdd, 0xe0, 4, 0, 0, 0, 1, 2, 3, 4];
        assert!(misplaced(&[&ITEM_OPEN]));
        assert!(misplaced(&[&SEQUENCE_ENDS]));
        assert!(misplaced(&[&sequence(OPEN), &ITEM_OPEN, &SEQUENCE_ENDS]));
        assert!(misplaced(&[&sequence(OPEN), &value_in_delimiter]));
        assert!(misplaced(&[&sequence([8, 0, 0, 0]), &SEQUENCE_ENDS]));
        assert!(misplaced(&[&sequence(OPEN), &sequence(OPEN)]));
    }

    #[test]
    fn nests_elements_and_values_are_bounded() {
        let level = [sequence(OPEN).as_slice(), &ITEM_OPEN].concat();
        assert!(refusal(&level.repeat(MAX_DEPTH / 2)).contains("truncated"));
        assert!(refusal(&level.repeat(MAX_DEPTH)).contains("deeper than 64"));
        let empty = [0x10, 0, 0x20, 0, b'L', b'O', 0, 0];
        assert_eq!(check(&empty.repeat(MAX_ELEMENTS), 0, Encoding::Explicit), Ok(()));
        assert!(refusal(&empty.repeat(MAX_ELEMENTS + 1)).contains("65536 elements"));
        let mut large = vec![0x10, 0, 0x20, 0, b'U', b'C', 0, 0, 1, 0, 0x40, 0];
        large.resize(12 + MAX_VALUE_BYTES + 1, b'\\');
        assert!(refusal(&large).contains("4194304 bytes"));
    }
}
