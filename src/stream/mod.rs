//! Recipe + index -> patches, ordered and bounded. Knows nothing of HTTP.

mod count;
mod course;
pub mod cursor;
pub mod delivery;
mod donors;
pub mod encoded;
mod fair;
mod judge;
mod lane;
mod leak;
mod make;
pub mod negatives;
mod open;
pub mod patch;
mod planting;
pub mod recipe;
mod residual;
mod resolve;
mod room;
mod scene;
mod scheduler;
mod service;
mod shelf;
mod stats;
mod window;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::checkpoint::Provenance;
use crate::digest::Digest;
use crate::sampler::Pool;
use crate::volume::{LabelMap, Plan, Shape};

use cursor::Cursor;
use delivery::Delivery;
use patch::StreamedPatch;
use recipe::{Recipe, RecipeError};

pub use count::count_patches;
pub use course::{check_delivery, first_index};
pub use fair::Weights;
pub use leak::{held_out_cases, is_seen, judges, seen_cases, seen_patients};
pub use service::{StartError, StreamConfig, Streams};
pub use shelf::{Activation, ModelEntry, ModelSource, ModelState, ModelsError, Shelf, ShelfParts, WarmUp};
pub use stats::{BinCounts, StatsSnapshot, StreamStats};

/// A recipe with every absent field filled in from the store, ready to be streamed.
#[derive(Clone, Debug, Serialize)]
pub struct Resolved {
    /// The complete recipe.
    pub recipe: Recipe,
    /// Its hash.
    pub hash: Digest,
    /// Hash of the store's cases and plan.
    pub snapshot: Digest,
    /// Hash of the models; zeros where the synthesizer and the gate need none.
    pub bundle: Digest,
    /// What those models learnt from; nothing where it needs none.
    #[serde(skip)]
    pub models: Option<Arc<Provenance>>,
    /// The code's revision.
    pub revision: u32,
    /// Indices in an epoch.
    pub patches_per_epoch: u64,
    /// Patch size (z, y, x) in voxels.
    pub patch: Shape,
    /// Class names and ids of the labels sent.
    pub labels: LabelMap,
    /// Cases in each pool, by organ: those that can host at least one of the requested sizes.
    pub feasible: BTreeMap<Pool, BTreeMap<String, u64>>,
    /// Requested bins that no case of a pool can hold, as `pool/organ/size`; with figures behind a colon, those that too
    /// few can hold.
    pub shortfall: Vec<String>,
    /// The arithmetic that decides bytes, such as `cpu-avx512`.
    pub numerics: String,
}

impl Resolved {
    /// Returns the cursor that stands before `next_index`.
    pub fn cursor(&self, next_index: u64) -> Cursor {
        let Self {
            hash,
            snapshot,
            bundle,
            revision,
            ..
        } = self;
        Cursor {
            recipe: *hash,
            snapshot: *snapshot,
            bundle: *bundle,
            revision: *revision,
            next_index,
        }
    }
}

/// The patches of one rank, in order. Dropping it cancels what is not yet made.
pub trait PatchStream: Send {
    /// Blocks for the next batch of `batch_size` patches of this rank: nothing at the end of the epoch or count. An
    /// error ends the stream.
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>>;

    /// Returns how many batches the stream holds in all.
    fn batches(&self) -> u64;

    /// Returns what ends the stream from another thread, also while it waits for its next batch: by default nothing,
    /// and it ends when it is dropped.
    fn leave(&self) -> Leave {
        Leave::new(|| {})
    }
}

/// Tells a stream that its client left; may be called again.
pub struct Leave(Box<dyn Fn() + Send + Sync>);

impl Leave {
    /// Makes the handle from what it does.
    pub fn new(leave: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Box::new(leave))
    }

    /// Ends the stream: what only it waited for is not made.
    pub fn now(&self) {
        (self.0)();
    }
}

/// The patches of one step of one rank.
#[derive(Debug)]
pub struct Batch {
    /// Position in the run: global indices `step * world * batch_size` and up.
    pub step: u64,
    /// The patches, in order; fewer than the batch size, or none, in the last step of a partial epoch.
    pub patches: Vec<Arc<StreamedPatch>>,
    /// Places among `patches` of those that were made once, for another stream as well.
    pub reused: Vec<u32>,
    /// Size (z, y, x) of every patch in voxels.
    pub shape: Shape,
    /// Where to go on after this step.
    pub next: Cursor,
}

/// What serves streams: the in-process service behind HTTP and behind hosted training.
pub trait PatchService: Send + Sync {
    /// Returns the store's plan.
    fn plan(&self) -> &Plan;

    /// Checks a recipe against the store and the models and fills in what is absent.
    ///
    /// # Errors
    /// [`StreamError`] names the field.
    fn resolve(&self, recipe: Recipe) -> Result<Arc<Resolved>, StreamError>;

    /// Opens a stream.
    ///
    /// # Errors
    /// [`StreamError`] names the field of the delivery or cursor.
    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError>;

    /// Tells why no stream can be served any more, such as a device that is gone; nothing while all is well.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Tells whether anybody but a training waits for patches that are still to be made.
    fn has_waiting_readers(&self) -> bool {
        false
    }

    /// Returns who serves these models for as long as it is kept, also once they are released here; nothing where that is this service.
    ///
    /// # Errors
    /// [`StreamError::BundleGone`] where they are not held.
    fn holder(&self, _models: Digest) -> Result<Option<Arc<dyn PatchService>>, StreamError> {
        Ok(None)
    }

    /// Returns where models are loaded and exchanged, if this service holds several bundles.
    fn shelf(&self) -> Option<&Shelf> {
        None
    }
}

/// Why a stream is refused or ends early.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// A recipe field outside its range.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A delivery field outside its range.
    #[error("delivery field {field}: expected {expected}, got {got}")]
    Delivery {
        /// The field.
        field: &'static str,
        /// The allowed range.
        expected: String,
        /// What was found.
        got: String,
    },
    /// The store or the models cannot do what the recipe asks.
    #[error("recipe field {field}: {what}")]
    Infeasible {
        /// The field.
        field: &'static str,
        /// What is missing.
        what: String,
    },
    /// Held-out cases, or scans equal to them, appear in a model's training set (promise P7).
    #[error("recipe field select.hold_out: {what}")]
    Leak {
        /// Which cases and which model.
        what: String,
    },
    /// A cursor of another recipe, snapshot or revision.
    #[error("cursor field {field}: the cursor has {cursor}, the server has {server}")]
    CursorMismatch {
        /// The field.
        field: &'static str,
        /// What the cursor holds.
        cursor: String,
        /// What the server has.
        server: String,
    },
    /// A cursor of a bundle that is no longer held.
    #[error("cursor field bundle: {0} is no longer held; start again without a cursor, or load that bundle")]
    BundleGone(Digest),
    /// A patch could not be made.
    #[error("patch {index}: {what}")]
    Failed {
        /// The patch's index.
        index: u64,
        /// Why, naming the file.
        what: String,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Stopped,
}

impl StreamError {
    /// Returns the error of a recipe that named its models itself: models that are not held are then a field of the recipe.
    pub fn of_recipe(self) -> Self {
        match self {
            Self::BundleGone(hash) => Self::Infeasible {
                field: "bundle",
                what: format!("no models {hash} are held; load them first"),
            },
            other => other,
        }
    }
}
