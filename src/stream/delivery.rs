//! The delivery: how a stream is cut up and encoded. It never changes content.

use serde::{Deserialize, Serialize};

use super::cursor::Cursor;

/// What a stream is for: the class that decides its share of the threads and of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Priority {
    /// A single batch that somebody waits for.
    Preview,
    /// A trainer's stream.
    #[default]
    Stream,
    /// A training run inside this process.
    Training,
}

/// How intensities are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum ImageType {
    /// Integer HU.
    I16,
    /// Windowed to [0, 1], half precision.
    F16,
    /// Windowed to [0, 1], single precision.
    #[default]
    F32,
}

/// Which tensors' bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    /// None.
    #[default]
    Raw,
    /// All, by Zstandard.
    Zstd,
    /// Those of u8 elements: labels and masks take little time and hardly any bytes, noisy intensities much of both.
    ZstdU8,
}

/// Optional tensors beside image and label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// The untouched host under the same augmentation, like the image.
    Source,
    /// The lesions' soft mask, u8 in 1/255.
    SoftMask,
    /// The number of the synthesized lesion a voxel belongs to, u8, 0 for none.
    LesionInstance,
}

/// What the end of an epoch does with an incomplete last batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum LastBatch {
    /// Indices continue into the next epoch until the batch is full, on every rank.
    #[default]
    Fill,
    /// The incomplete step is left out, on every rank.
    Drop,
    /// The last step holds what is left, on every rank: fewer patches, or none where a rank's share is empty. The stream
    /// ends with the epoch, also where `count` is more.
    Partial,
}

/// What a patch that cannot be made does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum OnFailed {
    /// The stream ends with an error that names the index.
    #[default]
    Error,
    /// The item arrives marked `failed`, with 0 HU and the label *ignore* everywhere.
    Skip,
}

/// How a stream is cut up and encoded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Delivery {
    /// This trainer process, 0 to `world - 1`.
    pub rank: u32,
    /// How many processes share the stream.
    pub world: u32,
    /// The first global index. Streams of one run tile the indices where every start lies a multiple of
    /// `world * batch_size` after the one before; a cursor always does.
    pub from: u64,
    /// Where to go on; takes the place of `from`, and a mismatch is refused.
    pub cursor: Option<Cursor>,
    /// Batches to send to this rank; absent: to the end of the epoch.
    pub count: Option<u64>,
    /// Patches in a batch.
    pub batch_size: u32,
    /// How intensities are written.
    pub image: ImageType,
    /// How tensors are compressed.
    pub codec: Codec,
    /// Optional tensors.
    pub outputs: Vec<Output>,
    /// What happens to an incomplete last batch.
    pub last_batch: LastBatch,
    /// What a patch that cannot be made does.
    pub on_failed: OnFailed,
    /// What the stream is for. Not a client's to say: the route decides.
    #[serde(skip)]
    pub priority: Priority,
}

impl Default for Delivery {
    fn default() -> Self {
        Self {
            rank: 0,
            world: 1,
            from: 0,
            cursor: None,
            count: None,
            batch_size: 2,
            image: ImageType::default(),
            codec: Codec::default(),
            outputs: Vec::new(),
            last_batch: LastBatch::default(),
            on_failed: OnFailed::default(),
            priority: Priority::default(),
        }
    }
}
