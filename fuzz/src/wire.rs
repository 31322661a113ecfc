//! The part of `src/wire` that reads frames.

#[path = "../../src/wire/codec.rs"]
pub mod codec;
#[path = "../../src/wire/frame.rs"]
pub mod frame;
#[path = "../../src/wire/proto.rs"]
pub mod proto;
#[path = "../../src/wire/reader.rs"]
pub mod reader;
