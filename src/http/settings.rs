//! The server's settings.

use std::net::SocketAddr;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

/// The largest request body in bytes: a recipe with 10^4 held-out cases fits.
pub(super) const MAX_BODY_BYTES: usize = 1 << 20;
/// Encoded frames that may wait for a stream's client (promise P3).
pub(super) const FRAMES_IN_FLIGHT: usize = 2;

/// The secret that requests must bring. Never printed, never serialized.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "String")]
pub struct ApiKey(SecretString);

impl From<String> for ApiKey {
    fn from(secret: String) -> Self {
        Self::new(&secret)
    }
}

impl ApiKey {
    /// Takes a secret; surrounding white space, such as a file's last newline, is dropped.
    pub fn new(secret: &str) -> Self {
        Self(secret.trim().into())
    }

    /// Tells whether a request's key is this one, in a time that depends on its length only.
    pub fn matches(&self, given: &[u8]) -> bool {
        self.0.expose_secret().as_bytes().ct_eq(given).into()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.expose_secret().is_empty()
    }
}

/// The server's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Where to listen.
    pub bind: SocketAddr,
    /// Names beside loopback that a request's Host may be, without port; `*` for any, behind a proxy that checks.
    pub allowed_hosts: Vec<String>,
    /// The secret that requests must bring; none where absent.
    #[serde(skip_serializing)]
    pub api_key: Option<ApiKey>,
    /// Streams open at the same time.
    pub max_streams: usize,
    /// Single batches and validations worked on at the same time.
    pub max_batch_requests: usize,
    /// Seconds after which a heartbeat is sent while a batch is not ready.
    pub heartbeat_seconds: u64,
    /// Seconds that open streams get to end after a shutdown was asked for.
    pub drain_seconds: u64,
    /// Seconds after which a stream ends with `rebalance`, so that new replicas receive load; never where absent.
    pub max_stream_age_seconds: Option<u64>,
    /// Seconds after which a refused client should try again.
    pub retry_after_seconds: u32,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 8080)),
            allowed_hosts: Vec::new(),
            api_key: None,
            max_streams: 16,
            max_batch_requests: 4,
            heartbeat_seconds: 15,
            drain_seconds: 20,
            max_stream_age_seconds: None,
            retry_after_seconds: 2,
        }
    }
}

impl ServerConfig {
    /// Tells what is wrong with the settings, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let range = |key: &str, ok: bool, expected: &str, got: u64| {
            (!ok).then(|| format!("server.{key}: expected {expected}, got {got}"))
        };
        let streams = self.max_streams as u64;
        let batches = self.max_batch_requests as u64;
        let age = self.max_stream_age_seconds.unwrap_or(1);
        range("max_streams", (1..=4096).contains(&streams), "1 to 4096", streams)
            .or_else(|| range("max_batch_requests", (1..=256).contains(&batches), "1 to 256", batches))
            .or_else(|| {
                let seconds = self.heartbeat_seconds;
                range("heartbeat_seconds", (1..=300).contains(&seconds), "1 to 300", seconds)
            })
            .or_else(|| {
                range(
                    "drain_seconds",
                    self.drain_seconds <= 3600,
                    "0 to 3600",
                    self.drain_seconds,
                )
            })
            .or_else(|| range("max_stream_age_seconds", age > 0, "at least 1, or absent", age))
            .or_else(|| {
                let is_empty = self.api_key.as_ref().is_some_and(ApiKey::is_empty);
                is_empty.then(|| "server.api_key: expected a secret or no key at all, got an empty text".into())
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_never_leaves_through_debug_or_serialize() {
        let config = ServerConfig {
            api_key: Some(ApiKey::new("hunter22\n")),
            ..ServerConfig::default()
        };
        assert!(!format!("{config:?}").contains("hunter22"));
        assert!(!serde_json::to_string(&config).unwrap().contains("hunter22"));
        let key = config.api_key.unwrap();
        assert!(key.matches(b"hunter22") && !key.matches(b"hunter2") && !key.matches(b""));
    }
}
