//! Models on disk: safetensors and a JSON manifest each, hashed together as a bundle.

mod architecture;
mod bundle;
mod calibration;
mod import;
mod load;
mod manifest;
mod network;
mod save;
mod weights;

pub use architecture::Architecture;
pub use bundle::{Bundle, InnerCritic, Provenance, inner_folder};
pub use calibration::{Calibration, CalibrationEntry, Realism, Thresholds};
pub use import::{ImportRequest, NnunetPlans, PytorchFile, import_pytorch, read_pytorch, source_name};
pub use load::{Loaded, MAX_WEIGHTS_BYTES, check_plan, check_spacing, load_manifest, load_segmentor};
pub use manifest::{FORMAT_VERSION, Imported, ModelManifest, Role, Training, WeightsFile};
pub use network::{collect_network, fill_network};
pub use save::{Precision, save_model, write_atomically};
pub use weights::{Weight, Weights, collect, fill, not_finite, read_weights, weights_bytes};

use std::path::PathBuf;

/// Why a model cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file larger than anything this program writes.
    #[error("{path}: expected at most {limit} bytes, got {got}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
        /// Its size in bytes.
        got: u64,
    },
    /// The weights are not those that the manifest describes.
    #[error("{path}: expected sha256 {expected}, got {got}")]
    Checksum {
        /// The file of weights.
        path: PathBuf,
        /// What the manifest says.
        expected: String,
        /// What the file has.
        got: String,
    },
    /// A file that cannot be understood.
    #[error("{path}: {what}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor that is missing, superfluous or of another shape.
    #[error("tensor {name}: expected {expected}, got {got}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What the architecture needs.
        expected: String,
        /// What the file holds.
        got: String,
    },
    /// A model of another label map or window than the store or its companions.
    #[error("plan field {field}: {left_name} has {left}, {right_name} has {right}")]
    PlanMismatch {
        /// The field.
        field: &'static str,
        /// Who has `left`.
        left_name: String,
        /// Its value.
        left: String,
        /// Who has `right`.
        right_name: String,
        /// Its value.
        right: String,
    },
}
