//! What the program says about itself: metrics for Prometheus and log lines.

pub mod log;
pub mod metrics;
#[cfg(feature = "otlp")]
pub mod otlp;
