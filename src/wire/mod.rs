//! Patches <-> bytes: frames for streams, npz and safetensors for single batches. Knows nothing of HTTP.
//!
//! A frame is a 32-byte preamble ([`frame`]), a protobuf header ([`proto`], filled by [`header`]) and a payload of
//! tensors ([`codec`], [`payload`]). `docs/wire.md` is the reference; golden bytes in `tests/golden/wire` are shared with the Python
//! client.

pub mod codec;
pub mod frame;
pub mod header;
pub mod limits;
pub mod npz;
pub mod payload;
pub mod proto;
pub mod reader;
pub mod safetensors;

/// The media type of a stream of frames.
pub const MEDIA_TYPE: &str = "application/vnd.freetumor.stream";
