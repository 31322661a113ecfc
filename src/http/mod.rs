//! The HTTP server: streams, single batches and what an operator asks. The only module beside `cli` with axum and tokio.
//!
//! Every route works against [`PatchService`](crate::stream::PatchService). CPU work runs on named threads; async code
//! only moves bytes. What a client may hold is bounded: streams, batch requests, two frames per stream, 1 MiB bodies.

mod access;
mod app;
mod batch;
mod body;
mod health;
mod openapi;
mod problem;
mod producer;
mod provenance;
mod query;
mod router;
mod server;
mod settings;
mod streams;

pub use openapi::document as openapi_document;
pub use problem::Problem;
pub use server::{Drain, ServeError, Server};
pub use settings::{ApiKey, ServerConfig};
