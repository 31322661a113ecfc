//! The cursor: where a trainer goes on after a stop, and what must not have changed meanwhile.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// A position in a stream, bound to everything that decides its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Hash of the resolved recipe.
    pub recipe: Digest,
    /// Hash of the store's cases and plan.
    pub snapshot: Digest,
    /// Hash of the models.
    pub bundle: Digest,
    /// The code's [`REVISION`](super::recipe::REVISION).
    pub revision: u32,
    /// The next global index, on a step boundary of the world that wrote it.
    pub next_index: u64,
}
