//! The server's settings.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keys::{ApiKey, Keys, one_or_more};

/// The largest request body in bytes: a recipe with 10^4 held-out cases fits.
pub(super) const MAX_BODY_BYTES: usize = 1 << 20;
/// The most bytes of a request's line and headers.
pub(super) const MAX_HEAD_BYTES: usize = 32 << 10;
/// The most header fields of a request.
pub(super) const MAX_HEADERS: usize = 64;
/// What a client gets to send its headers, and how long a connection may idle between requests.
pub(super) const HEAD_TIME: Duration = Duration::from_secs(30);
/// What a client gets for a TLS handshake.
pub(super) const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Encoded frames that may wait for a stream's client (promise P3).
pub(super) const FRAMES_IN_FLIGHT: usize = 2;

/// The server's settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Where to listen.
    pub bind: SocketAddr,
    /// Names beside loopback that a request's Host may be, without port; `*` for any, behind a proxy that checks.
    pub allowed_hosts: Vec<String>,
    /// One or two secrets of which a request must bring one; none where absent.
    #[serde(skip_serializing, deserialize_with = "one_or_more")]
    pub read_keys: Vec<ApiKey>,
    /// A file with one or two such secrets, one a line.
    pub read_keys_file: Option<PathBuf>,
    /// One or two secrets for the routes that change the server, which do not exist without.
    #[serde(skip_serializing, deserialize_with = "one_or_more")]
    pub admin_keys: Vec<ApiKey>,
    /// A file with one or two such secrets, one a line.
    pub admin_keys_file: Option<PathBuf>,
    /// Whether an address that other machines reach may be listened on without read keys.
    pub allow_anonymous: bool,
    /// PEM file of the certificate and its chain; with it the server speaks TLS only.
    pub tls_certificate: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    pub tls_key: Option<PathBuf>,
    /// Connections open at the same time; further ones are closed at once.
    pub max_connections: usize,
    /// Streams open at the same time.
    pub max_streams: usize,
    /// Single batches and validations worked on at the same time.
    pub max_batch_requests: usize,
    /// Work that the open streams and batches of one key may ask for: patch voxels x attempts x batch size, summed.
    pub max_voxels_per_key: u64,
    /// Seconds that a single batch may take, and the longest deadline that a client may set for one.
    pub batch_seconds: u64,
    /// Seconds that a client gets to send a request's body.
    pub body_seconds: u64,
    /// Seconds after which a heartbeat is sent while a batch is not ready.
    pub heartbeat_seconds: u64,
    /// Seconds that a client may take nothing of what it is sent: a trainer that validates reads nothing meanwhile.
    pub stall_seconds: u64,
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
            read_keys: Vec::new(),
            read_keys_file: None,
            admin_keys: Vec::new(),
            admin_keys_file: None,
            allow_anonymous: false,
            tls_certificate: None,
            tls_key: None,
            max_connections: 16_384,
            max_streams: 16,
            max_batch_requests: 4,
            // 96^3 voxels, four attempts, batches of two: 2400 streams.
            max_voxels_per_key: 1 << 34,
            batch_seconds: 300,
            body_seconds: 30,
            heartbeat_seconds: 15,
            stall_seconds: 1800,
            drain_seconds: 20,
            max_stream_age_seconds: None,
            retry_after_seconds: 2,
        }
    }
}

/// A hundred years: later than any clock is asked for.
const YEARS_SECONDS: u64 = 100 * 366 * 86_400;

impl ServerConfig {
    /// Tells what is wrong with the settings, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let age = self.max_stream_age_seconds.unwrap_or(1);
        let ranges = [
            ("max_connections", 16, 1 << 20, self.max_connections as u64),
            ("max_streams", 1, 4096, self.max_streams as u64),
            ("max_batch_requests", 1, 256, self.max_batch_requests as u64),
            ("max_voxels_per_key", 1 << 12, 1 << 62, self.max_voxels_per_key),
            ("batch_seconds", 1, 86_400, self.batch_seconds),
            ("body_seconds", 1, 300, self.body_seconds),
            ("heartbeat_seconds", 1, 300, self.heartbeat_seconds),
            ("stall_seconds", 1, 86_400, self.stall_seconds),
            ("drain_seconds", 0, 3600, self.drain_seconds),
            ("max_stream_age_seconds", 1, YEARS_SECONDS, age),
            ("retry_after_seconds", 1, 3600, u64::from(self.retry_after_seconds)),
        ];
        ranges
            .into_iter()
            .find(|(_, least, most, got)| !(least..=most).contains(&got))
            .map(|(key, least, most, got)| format!("server.{key}: expected {least} to {most}, got {got}"))
            .or_else(|| self.refused_pair())
            .or_else(|| Keys::refusal(self))
    }

    fn refused_pair(&self) -> Option<String> {
        match (&self.tls_certificate, &self.tls_key) {
            (Some(_), None) => Some("server.tls_key: expected a file beside server.tls_certificate, got none".into()),
            (None, Some(_)) => Some("server.tls_certificate: expected a file beside server.tls_key, got none".into()),
            _ => None,
        }
    }

    /// Tells why the address must not be listened on with these settings, or nothing.
    pub fn exposure(&self) -> Option<String> {
        let has_key = !self.read_keys.is_empty() || self.read_keys_file.is_some();
        let is_safe = self.bind.ip().is_loopback() || has_key || self.allow_anonymous;
        (!is_safe).then(|| {
            format!(
                "server.bind: other machines reach {}, and there is no read key: set server.read_keys or \
                 server.read_keys_file, or server.allow_anonymous = true",
                self.bind
            )
        })
    }
}
