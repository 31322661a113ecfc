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
/// Bytes of a text in the name of a storage, and values among which a tensor is described: the reader counts a copy of a storage or a
/// tensor as one object, however large, and stops after a million copies.
const MAX_STORAGE_TEXT: usize = 256;
const MAX_TENSOR_VALUES: usize = 64;

/// Refuses a pickle that names anything but what checkpoints need, or that cannot be followed.
///
/// # Errors
/// A sentence that names the object or the opcode.
pub(super) fn check(pickle: &[u8]) -> Result<(), String> {
    let mut scan = Scan {
        rest: pickle,
        top: [Value::Small; 2],
        memo: HashMap::new(),
        levels: vec![Level::default()],
        closed: None,
    };
    for _ in 0..MAX_OPCODES {
        if !scan.step()? {
            return Ok(());
        }
    }
    Err(format!("the pickle has more than {MAX_OPCODES} opcodes"))
}

/// A value, as far as it matters what it is.
#[derive(Clone, Copy)]
enum Value<'a> {
    Text(&'a [u8]),
    /// A number, a class.
    Small,
    /// Bytes in a file that a tensor is made of.
    Storage,
    /// Made of other values.
    Built,
}

/// What was pushed since a mark; what was taken off again counts too.
#[derive(Default)]
struct Level {
    /// Bytes of the longest text.
    text: usize,
    /// Those inside of marks that are closed too.
    values: usize,
    has_storage: bool,
    has_recalled: bool,
}

/// A walk over opcodes that keeps the last two values as far as they are text, which is what names are made of.
struct Scan<'a> {
    rest: &'a [u8],
    /// The value pushed before the last one, and the last one.
    top: [Value<'a>; 2],
    memo: HashMap<u64, Value<'a>>,
    /// The open marks, and what lies below them.
    levels: Vec<Level>,
    /// Bytes of the longest text in the tuple that was closed just now.
    closed: Option<usize>,
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

    fn push(&mut self, value: Value<'a>) -> Result<(), String> {
        self.top = [self.top[1], value];
        let level = self.level();
        level.values += 1;
        match value {
            Value::Text(text) => level.text = level.text.max(text.len()),
            Value::Storage => level.has_storage = true,
            Value::Small | Value::Built => {}
        }
        self.check_tensor()
    }

    fn level(&mut self) -> &mut Level {
        self.levels.last_mut().expect("the lowest level is never closed")
    }

    /// Refuses what may describe a large tensor, among the values of a level that has a storage.
    fn check_tensor(&mut self) -> Result<(), String> {
        let level = self.level();
        match (level.has_storage, level.has_recalled, level.values) {
            (true, true, _) => Err("the pickle puts a tensor together from parts".into()),
            (true, _, values) if values > MAX_TENSOR_VALUES => {
                Err(format!("a tensor described by more than {MAX_TENSOR_VALUES} values"))
            }
            _ => Ok(()),
        }
    }

    /// Takes off what was pushed since the last mark; returns the bytes of its longest text.
    fn close(&mut self) -> Result<usize, String> {
        if self.levels.len() < 2 {
            return Err("the pickle closes what it did not open".into());
        }
        let closed = self.levels.pop().expect("there are two");
        self.level().values += closed.values;
        Ok(closed.text)
    }

    fn tuple(&mut self) -> Result<(), String> {
        self.closed = Some(self.close()?);
        self.push(Value::Built)
    }

    /// Takes a storage's name, which must be the tuple that was closed just now.
    fn storage(&mut self) -> Result<(), String> {
        let text = self
            .closed
            .ok_or("the pickle puts the name of a storage together from parts")?;
        if text > MAX_STORAGE_TEXT {
            return Err(format!(
                "the name of a storage: expected at most {MAX_STORAGE_TEXT} bytes, got {text}"
            ));
        }
        self.push(Value::Storage)
    }

    fn recall(&mut self, slot: u64) -> Result<(), String> {
        let value = self.memo.get(&slot).copied().unwrap_or(Value::Built);
        self.level().has_recalled |= matches!(value, Value::Built);
        self.push(value)
    }

    /// Follows one opcode; false at the end.
    fn step(&mut self) -> Result<bool, String> {
        let opcode = self.take(1)?[0];
        // To remember a value leaves it where it is.
        if !matches!(opcode, b'q' | b'r' | 0x94 | b'Q') {
            self.closed = None;
        }
        match opcode {
            b'.' => return Ok(false),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                known(module, name)?;
                self.push(Value::Small)?;
            }
            // The name lies on the stack: two texts pushed just before.
            0x93 => {
                let [Value::Text(module), Value::Text(name)] = self.top else {
                    return Err("the pickle puts the name of an object together from parts".into());
                };
                known(module, name)?;
                self.push(Value::Small)?;
            }
            b'X' | b'T' => self.text(4)?,
            b'U' | 0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'V' | b'S' => {
                let line = self.line()?;
                self.push(Value::Text(line))?;
            }
            b'q' => self.remember(1)?,
            b'r' => self.remember(4)?,
            0x94 => {
                let slot = self.memo.len() as u64;
                self.memo.insert(slot, self.top[1]);
            }
            b'h' => {
                let slot = self.number(1)?;
                self.recall(slot)?;
            }
            b'j' => {
                let slot = self.number(4)?;
                self.recall(slot)?;
            }
            b'(' => self.levels.push(Level::default()),
            b't' => self.tuple()?,
            b'Q' => self.storage()?,
            other => self.other(other)?,
        }
        Ok(true)
    }

    fn text(&mut self, length_bytes: u64) -> Result<(), String> {
        let text = self.counted(length_bytes)?;
        self.push(Value::Text(text))
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
            b'I' | b'L' | b'F' => return self.line().and_then(|line| self.push_bytes(line)),
            b'K' => return self.take(1).and_then(|number| self.push_bytes(number)),
            b'M' => return self.take(2).and_then(|number| self.push_bytes(number)),
            b'J' => return self.take(4).and_then(|number| self.push_bytes(number)),
            b'G' => return self.take(8).and_then(|number| self.push_bytes(number)),
            b'C' | 0x8a => return self.counted(1).and_then(|bytes| self.push_bytes(bytes)),
            b'B' | 0x8b => return self.counted(4).and_then(|bytes| self.push_bytes(bytes)),
            0x8e | 0x96 => return self.counted(8).and_then(|bytes| self.push_bytes(bytes)),
            b'N' | 0x88 | 0x89 => return self.push(Value::Small),
            b'1' | b'd' | b'l' | b'e' | b'u' | 0x90 | 0x91 => drop(self.close()?),
            b'0' | b'R' | b'b' | b's' | b'a' | b')' | b']' | b'}' | 0x81 | 0x85..=0x87 | 0x8f | 0x92 => {}
            _ => return Err(format!("pickle opcode 0x{opcode:02x}, which no checkpoint needs")),
        }
        self.push(Value::Built)
    }

    /// Pushes a number or bytes, which may be as long as a text.
    fn push_bytes(&mut self, bytes: &[u8]) -> Result<(), String> {
        let level = self.level();
        level.text = level.text.max(bytes.len());
        self.push(Value::Small)
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
        assert!(check(b"K\x01t.").unwrap_err().contains("did not open"));
        assert_eq!(check(b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01."), Ok(()));
    }

    #[test]
    fn what_the_reader_copies_as_one_object_is_small() {
        let storage = |name: &str, close: &[u8]| {
            let name = [&b"X"[..], &(name.len() as u32).to_le_bytes(), name.as_bytes()].concat();
            let start = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n";
            [&start[..], &name, b"X\x03\x00\x00\x00cpuK\x01", close].concat()
        };
        assert_eq!(check(&storage("0", b"tq\x00Q.")), Ok(()));
        let long = check(&storage(&"0".repeat(257), b"tq\x00Q.")).unwrap_err();
        assert!(long.contains("at most 256 bytes, got 257"), "{long}");
        // Told by a tuple that was remembered, or by what lay on the stack before.
        for parts in [&b"tq\x000h\x00Q."[..], b"\x87Q.", b"t0Q."] {
            let refused = check(&storage("0", parts)).unwrap_err();
            assert!(refused.contains("together from parts"), "{refused}");
        }
        // Nine values beside those of the shape: five of the storage's name, the name, the storage, its offset, the shape.
        let shape = |count: usize, close: &[u8]| [b"(", &b"K\x01".repeat(count)[..], close].concat();
        let tensor = |shape: &[u8]| {
            let parts = [&b"("[..], &storage("0", b"tQK\x00")[2..], shape, b"t."];
            check(&parts.concat())
        };
        assert_eq!(tensor(&shape(55, b"t")), Ok(()));
        let elementwise = [b"]".to_vec(), b"K\x01a".repeat(40)].concat();
        for long in [shape(56, b"t"), [&b"]"[..], &shape(56, b"e")].concat(), elementwise] {
            let refused = tensor(&long).unwrap_err();
            assert!(refused.contains("more than 64 values"), "{refused}");
        }
        // Made before and recalled beside the storage.
        let before = [shape(3, b"tq\x01"), storage("0", b"tQK\x00h\x01.")].concat();
        assert!(check(&before).unwrap_err().contains("a tensor together from parts"));
        assert_eq!(check(&shape(1000, b"t.")), Ok(()));
    }
}
