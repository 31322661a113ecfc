//! Reads the golden tensors: float32 C-ordered arrays in `.npz` archives.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

/// An array of an archive.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Reads an archive of the golden tensors; nothing, with a message, where they are not at hand.
#[allow(clippy::print_stderr, reason = "a test says why it is skipped")]
pub fn golden(name: &str) -> Option<BTreeMap<String, Array>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../shared/golden")
        .join(name);
    let Ok(file) = std::fs::File::open(&path) else {
        eprintln!("skipped: no golden tensors {name}");
        return None;
    };
    let mut archive = zip::ZipArchive::new(file).expect("a zip archive");
    let mut arrays = BTreeMap::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).expect("an entry");
        let name = entry
            .name()
            .expect("a name in UTF-8")
            .trim_end_matches(".npy")
            .to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("a readable entry");
        arrays.insert(name, parse(&bytes));
    }
    Some(arrays)
}

/// Parses the `.npy` format, version 1.
fn parse(bytes: &[u8]) -> Array {
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..10 + length]).expect("an ASCII header");
    assert!(
        header.contains("'<f4'") && header.contains("'fortran_order': False"),
        "{header}"
    );
    let shape = header
        .split_once("'shape': (")
        .expect("a shape")
        .1
        .split_once(')')
        .expect("a shape")
        .0;
    let shape = shape.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let values = bytes[10 + length..].chunks_exact(4);
    Array {
        shape,
        values: values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
