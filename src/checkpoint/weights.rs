//! A module's parameters as named arrays, and those as safetensors bytes.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{CheckpointError, Precision};

/// One named array.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, last axis fastest.
    pub values: Vec<f32>,
}

/// Arrays by name; the order is the names'.
pub type Weights = BTreeMap<String, Weight>;

/// Returns the first value that no computation comes back from, and the name of its array.
pub fn not_finite(weights: &Weights) -> Option<(&str, f32)> {
    weights.iter().find_map(|(name, weight)| {
        let value = weight.values.iter().find(|value| !value.is_finite())?;
        Some((name.as_str(), *value))
    })
}

struct Collector {
    path: Vec<String>,
    weights: Weights,
}

impl ModuleVisitor for Collector {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        let values = tensor
            .into_data()
            .convert::<f32>()
            .try_to_vec()
            .expect("converted to this type");
        self.weights.insert(self.path.join("."), Weight { shape, values });
    }

    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
}

/// Copies a module's parameters to memory.
pub fn collect<M: Module>(module: &M) -> Weights {
    let mut collector = Collector {
        path: Vec::new(),
        weights: Weights::new(),
    };
    module.visit(&mut collector);
    collector.weights
}

struct Filler {
    path: Vec<String>,
    weights: Weights,
    error: Option<CheckpointError>,
}

impl ModuleMapper for Filler {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.join(".");
        let found = self.weights.remove(&name);
        param.map(|tensor| {
            let expected = tensor.dims();
            match found {
                Some(weight) if weight.shape == expected => {
                    let requires_grad = tensor.is_require_grad();
                    Tensor::from_data(TensorData::new(weight.values, expected), &tensor.device())
                        .set_require_grad(requires_grad)
                }
                other => {
                    let got = other.map_or("nothing".into(), |weight| format!("{:?}", weight.shape));
                    self.error.get_or_insert(CheckpointError::Tensor {
                        name,
                        expected: format!("{expected:?}"),
                        got,
                    });
                    tensor
                }
            }
        })
    }

    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
}

/// Replaces a module's parameters.
///
/// # Errors
/// [`CheckpointError::Tensor`] for a parameter that is missing, superfluous or of another shape.
pub fn fill<M: Module>(module: M, weights: Weights) -> Result<M, CheckpointError> {
    let mut filler = Filler {
        path: Vec::new(),
        weights,
        error: None,
    };
    let module = module.map(&mut filler);
    if let Some(error) = filler.error {
        return Err(error);
    }
    match filler.weights.into_iter().next() {
        None => Ok(module),
        Some((name, weight)) => Err(CheckpointError::Tensor {
            name,
            expected: "no such tensor".into(),
            got: format!("{:?}", weight.shape),
        }),
    }
}

/// Returns arrays as the bytes of a safetensors file with text entries in its header.
///
/// # Panics
/// When a weight's values do not fill its shape.
pub fn weights_bytes(weights: &Weights, precision: Precision, header: &BTreeMap<String, String>) -> Vec<u8> {
    let (dtype, bytes): (Dtype, Vec<Vec<u8>>) = match precision {
        Precision::Single => (
            Dtype::F32,
            weights
                .values()
                .map(|w| w.values.iter().flat_map(|v| v.to_le_bytes()).collect())
                .collect(),
        ),
        Precision::Half => (
            Dtype::F16,
            weights
                .values()
                .map(|w| {
                    w.values
                        .iter()
                        .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
                        .collect()
                })
                .collect(),
        ),
    };
    let views = weights.iter().zip(&bytes).map(|((name, weight), bytes)| {
        let view = TensorView::new(dtype, weight.shape.clone(), bytes).expect("values fill the shape");
        (name.clone(), view)
    });
    // The format's writer takes a hash map for the header; one entry at most keeps its bytes the same every time.
    let header = (!header.is_empty()).then(|| header.clone().into_iter().collect());
    safetensors::serialize(views.collect::<Vec<_>>(), header).expect("names are unique")
}

/// Reads the bytes of a safetensors file; `path` is for messages.
///
/// # Errors
/// [`CheckpointError::Invalid`] for damaged bytes, other types than f32 and f16, and values that are not finite.
pub fn read_weights(bytes: &[u8], path: &Path) -> Result<Weights, CheckpointError> {
    let invalid = |what: String| CheckpointError::Invalid {
        path: path.into(),
        what,
    };
    let file =
        SafeTensors::deserialize(bytes).map_err(|error| invalid(format!("damaged safetensors file: {error}")))?;
    let mut weights = Weights::new();
    for (name, view) in file.iter() {
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => data
                .as_chunks()
                .0
                .iter()
                .map(|b| half::f16::from_le_bytes(*b).to_f32())
                .collect(),
            other => return Err(invalid(format!("tensor {name}: expected F32 or F16, got {other:?}"))),
        };
        if !values.iter().all(|value| value.is_finite()) {
            return Err(invalid(format!("tensor {name}: a value is not finite")));
        }
        let shape = view.shape().to_vec();
        weights.insert(name.to_string(), Weight { shape, values });
    }
    Ok(weights)
}
