//! The HTTP server: streams, single batches and what an operator asks. The only module beside `cli` with axum and tokio.
//!
//! Every route works against [`PatchService`](crate::stream::PatchService). CPU work runs on named threads; async code
//! only moves bytes. What a client may hold is bounded: connections, streams, batch requests, voxels per key, two frames per
//! stream, 1 MiB bodies, 32 KiB of headers.

mod access;
mod admin;
mod app;
mod batch;
mod body;
mod budget;
mod connection;
mod encoders;
mod events;
mod health;
mod keys;
mod models;
mod observe;
mod openapi;
mod problem;
mod producer;
mod provenance;
mod query;
mod router;
mod schema;
mod secrets;
mod server;
mod settings;
mod stall;
mod streams;
mod tls;
mod trainings;

pub use keys::{ApiKey, KeysError};
pub use openapi::document as openapi_document;
pub use problem::{Problem, ProblemKind};
pub use secrets::SecretsError;
pub use server::{Drain, Reload, ServeError, Server};
pub use settings::ServerConfig;
pub use tls::TlsError;
