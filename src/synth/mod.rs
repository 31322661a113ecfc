//! Lesions painted into healthy organs, and the gate that judges them.
//!
//! ```text
//! plant: place, shape, soft mask -> Synthesizer: residual in HU -> compose: x' = round(x + residual) -> gate: scores
//!        (preparation thread)         (preparation or device thread)      (preparation thread)          (critic: device)
//! ```

mod analytic;
mod bridge;
mod compose;
mod conditional;
mod device;
mod engine;
pub mod gate;
mod plant;
mod published;
mod settings;
mod transplant;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::Array3;

pub use crate::lesion::LESION_FROM;
pub use analytic::Analytic;
pub use bridge::{GridBridge, MAX_GRID_RATIO};
pub use compose::{compose, realised_hu, shift_mean};
pub use conditional::Conditional;
pub use device::HostLook;
pub use engine::Engine;
pub use plant::{PlantRequest, Planted, habitat, plant};
pub use published::PublishedGan;
pub use settings::{GateRule, GateSettings, SynthesizerKind};
pub use transplant::{Graft, TransplantRequest, transplant};

/// Tells the threads that work for a stream that nobody waits any more.
#[derive(Clone, Debug, Default)]
pub struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    /// Marks the work as no longer wanted.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Tells whether the work is no longer wanted.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A lesion to be painted: the cube around it and what was asked for.
#[derive(Clone, Debug)]
pub struct LesionCube {
    /// The host in HU, `[D, H, W]`.
    pub image: Array3<i16>,
    /// The soft mask in 1/255.
    pub soft: Array3<u8>,
    /// The organ's position in the label map's organs.
    pub organ: usize,
    /// 1 in the organ's healthy tissue.
    pub host: Array3<u8>,
    /// Equivalent-sphere diameter in mm after clipping.
    pub diameter_mm: f64,
    /// Requested signed contrast in HU.
    pub contrast_hu: f64,
    /// Voxel size (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
    /// Seed, index and attempt: the key of every random number.
    pub key: [u64; 3],
    /// Set when nobody waits any more.
    pub cancelled: Cancelled,
}

/// Why a lesion could not be painted or judged.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SynthError {
    /// The stream that asked is gone.
    #[error("the work was cancelled")]
    Cancelled,
    /// The device thread panicked over this lesion; it goes on with the next.
    #[error("the device thread failed: {0}")]
    Device(String),
    /// The device thread has ended.
    #[error("the device thread has ended")]
    Ended,
    /// The bundle lacks the network.
    #[error("the bundle has no {0}")]
    NoModel(&'static str),
}

/// Turns lesion cubes into residuals in HU.
pub trait Synthesizer: Send + Sync {
    /// Returns the name used in recipes and metrics.
    fn name(&self) -> &'static str;

    /// Tells whether it needs trained weights.
    fn needs_weights(&self) -> bool;

    /// Returns the residual of each cube in HU, exactly 0 where the soft mask is.
    ///
    /// # Errors
    /// [`SynthError`] where the device fails.
    fn residuals(&self, batch: &[LesionCube]) -> Result<Vec<Array3<f32>>, SynthError>;
}
