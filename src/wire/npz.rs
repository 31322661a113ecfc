//! Arrays as an `npz` archive that `numpy.load(allow_pickle=False)` reads; equal input gives equal bytes.

use std::io::{Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::codec::{Element, RawTensor};

/// An archive that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum NpzError {
    /// The archive's structure.
    #[error("cannot write the archive")]
    Zip(#[from] zip::result::ZipError),
    /// An array's bytes.
    #[error("cannot write the archive")]
    Io(#[from] std::io::Error),
}

/// Returns an archive of the tensors and, as the text array `meta`, a JSON document.
///
/// # Errors
/// [`NpzError`] where an array is over 4 GiB; frames are far smaller.
pub fn write(tensors: &[RawTensor], meta_json: &str) -> Result<Vec<u8>, NpzError> {
    let size: usize = tensors.iter().map(|tensor| tensor.bytes.len() + 512).sum();
    let mut archive = ZipWriter::new(Cursor::new(Vec::with_capacity(size + 4 * meta_json.len() + 1024)));
    // No compression and a fixed time: the bytes depend on the arrays alone.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default())
        .unix_permissions(0o644);
    for tensor in tensors {
        archive.start_file(format!("{}.npy", tensor.name), options)?;
        archive.write_all(&npy_header(descr(tensor.element), &tensor.shape))?;
        archive.write_all(&tensor.bytes)?;
    }
    let characters: Vec<u32> = meta_json.chars().map(u32::from).collect();
    archive.start_file("meta.npy", options)?;
    archive.write_all(&npy_header(&format!("<U{}", characters.len().max(1)), &[]))?;
    let mut text: Vec<u8> = characters.iter().flat_map(|c| c.to_le_bytes()).collect();
    text.resize(text.len().max(4), 0);
    archive.write_all(&text)?;
    Ok(archive.finish()?.into_inner())
}

fn descr(element: Element) -> &'static str {
    match element {
        Element::U8 => "|u1",
        Element::I16 => "<i2",
        Element::F16 => "<f2",
        Element::F32 => "<f4",
    }
}

/// Returns the header of version 1.0 of numpy's array format, padded so that elements start at a multiple of 64.
fn npy_header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let sides: String = shape.iter().map(|side| format!("{side}, ")).collect();
    let mut dictionary = format!(
        "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}",
        sides.trim_end()
    );
    let total = (10 + dictionary.len() + 1).next_multiple_of(64);
    dictionary.extend(std::iter::repeat_n(' ', total - 10 - dictionary.len() - 1));
    dictionary.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    let length = u16::try_from(dictionary.len()).expect("the dictionary of five sides is short");
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(dictionary.as_bytes());
    header
}
