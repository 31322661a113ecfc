//! What a pickle would call, found without running any of it.
//!
//! A pickle is a program: `R` calls what `c` or `\x93` named. Nothing here or in the reader behind it calls anything; this
//! pass refuses files that ask for more than a checkpoint needs, by name, so that nobody imports one unawares.

use std::collections::HashMap;

/// What checkpoints name: tensors and their storages, numbers of numpy, plain containers.
const KNOWN: [(&str, &[&str]); 13] = [
    (
        "torch._utils",
        &[
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
        ],
    ),
    (
        "torch",
        &[
            "FloatStorage",
            "DoubleStorage",
            "HalfStorage",
            "BFloat16Storage",
            "LongStorage",
            "IntStorage",
            "ShortStorage",
            "CharStorage",
            "ByteStorage",
            "BoolStorage",
            "Size",
            "device",
            "float16",
            "bfloat16",
            "float32",
            "float64",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
        ],
    ),
    ("torch.storage", &["UntypedStorage", "TypedStorage"]),
    ("collections", &["OrderedDict", "defaultdict"]),
    ("builtins", &["set", "frozenset", "dict", "list", "tuple", "slice"]),
    ("__builtin__", &["set", "frozenset", "dict", "list", "tuple", "slice"]),
    ("numpy", &["dtype", "ndarray"]),
    ("numpy.core.multiarray", &["scalar", "_reconstruct"]),
    ("numpy._core.multiarray", &["scalar", "_reconstruct"]),
    ("numpy.dtypes", &["Float64DType", "Float32DType", "Int64DType"]),
    ("_codecs", &["encode"]),
    ("argparse", &["Namespace"]),
    ("copyreg", &["_reconstructor"]),
];

/// Opcodes of one pickle, at most: each leaves one object behind at most, and 3.9 million empty dictionaries took 0.7 GB.
/// Checkpoints of 100 million parameters take some 10^5.
const MAX_OPCODES: usize = 1_000_000;

/// Refuses a pickle that names anything but what checkpoints need, or that cannot be followed.
///
/// # Errors
/// A sentence that names the object or the opcode.
pub(super) fn check(pickle: &[u8]) -> Result<(), String> {
    let mut scan = Scan {
        rest: pickle,
        top: [None; 2],
        memo: HashMap::new(),
    };
    for _ in 0..MAX_OPCODES {
        if !scan.step()? {
            return Ok(());
        }
    }
    Err(format!("the pickle has more than {MAX_OPCODES} opcodes"))
}

/// A walk over opcodes that keeps the last two values as far as they are text, which is what names are made of.
struct Scan<'a> {
    rest: &'a [u8],
    /// The value pushed before the last one, and the last one.
    top: [Option<&'a [u8]>; 2],
    memo: HashMap<u64, Option<&'a [u8]>>,
}

impl<'a> Scan<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let taken = usize::try_from(count).ok().and_then(|n| self.rest.split_at_checked(n));
        let (taken, rest) = taken.ok_or("the pickle ends in the middle of a value")?;
        self.rest = rest;
        Ok(taken)
    }

    /// Takes an unsigned little-endian number of so many bytes.
    fn number(&mut self, bytes: u64) -> Result<u64, String> {
        let taken = self.take(bytes)?;
        Ok(taken.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    /// Takes what a length of so many bytes announces.
    fn counted(&mut self, bytes: u64) -> Result<&'a [u8], String> {
        let length = self.number(bytes)?;
        self.take(length)
    }

    fn line(&mut self) -> Result<&'a [u8], String> {
        let end = self.rest.iter().position(|byte| *byte == b'\n');
        let line = self.take(end.ok_or("the pickle ends in the middle of a line")? as u64)?;
        self.take(1)?;
        Ok(line)
    }

    fn push(&mut self, text: Option<&'a [u8]>) {
        self.top = [self.top[1], text];
    }

    fn recall(&mut self, slot: u64) {
        let text = self.memo.get(&slot).copied().flatten();
        self.push(text);
    }

    /// Follows one opcode; false at the end.
    fn step(&mut self) -> Result<bool, String> {
        let opcode = self.take(1)?[0];
        match opcode {
            b'.' => return Ok(false),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                known(module, name)?;
                self.push(None);
            }
            // The name lies on the stack: two texts pushed just before.
            0x93 => {
                let [Some(module), Some(name)] = self.top else {
                    return Err("the pickle puts the name of an object together from parts".into());
                };
                known(module, name)?;
                self.push(None);
            }
            b'X' | b'T' => self.text(4)?,
            b'U' | 0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'V' | b'S' => {
                let line = self.line()?;
                self.push(Some(line));
            }
            b'q' => self.remember(1)?,
            b'r' => self.remember(4)?,
            0x94 => {
                let slot = self.memo.len() as u64;
                self.memo.insert(slot, self.top[1]);
            }
            b'h' => {
                let slot = self.number(1)?;
                self.recall(slot);
            }
            b'j' => {
                let slot = self.number(4)?;
                self.recall(slot);
            }
            other => self.other(other)?,
        }
        Ok(true)
    }

    fn text(&mut self, length_bytes: u64) -> Result<(), String> {
        let text = self.counted(length_bytes)?;
        self.push(Some(text));
        Ok(())
    }

    fn remember(&mut self, slot_bytes: u64) -> Result<(), String> {
        let slot = self.number(slot_bytes)?;
        self.memo.insert(slot, self.top[1]);
        Ok(())
    }

    /// Follows an opcode that neither names anything nor makes text.
    fn other(&mut self, opcode: u8) -> Result<(), String> {
        match opcode {
            // Protocol, and the length of a frame: neither pushes anything.
            0x80 => return self.take(1).map(drop),
            0x95 => return self.take(8).map(drop),
            b'I' | b'L' | b'F' => drop(self.line()?),
            b'K' => drop(self.take(1)?),
            b'M' => drop(self.take(2)?),
            b'J' => drop(self.take(4)?),
            b'G' => drop(self.take(8)?),
            b'C' | 0x8a => drop(self.counted(1)?),
            b'B' | 0x8b => drop(self.counted(4)?),
            0x8e | 0x96 => drop(self.counted(8)?),
            b'('
            | b'0'
            | b'1'
            | b'2'
            | b'N'
            | b'R'
            | b'b'
            | b'd'
            | b'l'
            | b't'
            | b's'
            | b'a'
            | b'Q'
            | b')'
            | b']'
            | b'}'
            | b'e'
            | b'u'
            | 0x81
            | 0x85..=0x89
            | 0x8f..=0x92 => {}
            _ => return Err(format!("pickle opcode 0x{opcode:02x}, which no checkpoint needs")),
        }
        self.push(None);
        Ok(())
    }
}

fn known(module: &[u8], name: &[u8]) -> Result<(), String> {
    let found = KNOWN
        .iter()
        .any(|(of, names)| of.as_bytes() == module && names.iter().any(|known| known.as_bytes() == name));
    if found {
        return Ok(());
    }
    let [module, name] = [module, name].map(String::from_utf8_lossy);
    Err(format!(
        "the pickle names {module}.{name}, which no checkpoint needs; nothing was executed. Save `model.state_dict()` alone"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_refused_by_name_however_they_are_spelt() {
        // Written by Python's pickle, protocols 0, 2 and 4, of an object whose `__reduce__` is (os.system, ("true",)).
        let system: [&[u8]; 3] = [
            b"cposix\nsystem\np0\n(Vtrue\np1\ntp2\nRp3\n.",
            b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.",
            b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
        ];
        for pickle in system {
            assert!(check(pickle).unwrap_err().contains("posix.system"), "{pickle:?}");
        }
        // The same through the memo, and with a value between the two names.
        let recalled = b"\x80\x04\x8c\x06system\x94\x8c\x05posix\x94h\x01h\x00\x93.";
        assert!(check(recalled).unwrap_err().contains("posix.system"));
        assert!(
            check(b"\x80\x04\x8c\x05posix\x8c\x06systemN0\x93.")
                .unwrap_err()
                .contains("together from parts")
        );
        assert!(check(b"iposix\nsystem\n.").unwrap_err().contains("0x69"));
    }

    #[test]
    fn damaged_pickles_are_errors() {
        for pickle in [
            &b""[..],
            b"X\xff\xff\xff\x7f",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
            b"ctorch",
            b"\x80",
        ] {
            assert!(check(pickle).is_err(), "{pickle:?}");
        }
        assert!(check(&[b'}'; MAX_OPCODES + 1]).unwrap_err().contains("more than"));
        assert_eq!(check(b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01."), Ok(()));
    }
}
