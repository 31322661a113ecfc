//! Arrays as a safetensors file with the provenance in its metadata; equal input gives equal bytes.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensorError, TensorView, serialize};

use super::codec::{Element, RawTensor};

/// Returns a file of the tensors with a JSON document under the metadata key `meta`.
///
/// # Errors
/// [`SafeTensorError`] where a tensor's shape and bytes contradict each other.
pub fn write(tensors: &[RawTensor], meta_json: String) -> Result<Vec<u8>, SafeTensorError> {
    let views = tensors
        .iter()
        .map(|tensor| {
            let view = TensorView::new(dtype(tensor.element), tensor.shape.to_vec(), &tensor.bytes)?;
            Ok((tensor.name, view))
        })
        .collect::<Result<Vec<_>, SafeTensorError>>()?;
    // One key, so that a hash map's order cannot change the bytes.
    serialize(views, Some(HashMap::from([("meta".to_owned(), meta_json)])))
}

fn dtype(element: Element) -> Dtype {
    match element {
        Element::U8 => Dtype::U8,
        Element::I16 => Dtype::I16,
        Element::F16 => Dtype::F16,
        Element::F32 => Dtype::F32,
    }
}
