//! Log lines on standard error, as text or as JSON.

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How a log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Least level, with exceptions by module: `info` or `info,freetumor::http=debug`.
    pub level: String,
    /// How a line is written.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::default(),
        }
    }
}

/// Why nothing can be logged as asked.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A level that is not one.
    #[error("log.level: expected a level such as info or info,freetumor::http=debug, got {0:?}")]
    Level(String),
    /// A collector that cannot be spoken to.
    #[cfg(feature = "otlp")]
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT: {0}")]
    Collector(String),
}

impl LogConfig {
    /// Checks the level.
    ///
    /// # Errors
    /// [`LogError`] names the key.
    pub fn filter(&self) -> Result<EnvFilter, LogError> {
        // Alone, a word that is no level would be taken for a module and log everything of it.
        let mut bare = self.level.split(',').filter(|part| !part.contains('='));
        let is_known = bare.all(|part| part.trim().parse::<LevelFilter>().is_ok());
        let filter = EnvFilter::builder().parse(&self.level).ok().filter(|_| is_known);
        filter.ok_or_else(|| LogError::Level(self.level.clone()))
    }

    /// Starts logging; later calls in the same process change nothing.
    ///
    /// # Errors
    /// [`LogError`] names the key.
    pub fn start(&self) -> Result<(), LogError> {
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
        let lines = match self.format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().boxed(),
        };
        let listening = tracing_subscriber::registry().with(self.filter()?).with(lines);
        #[cfg(feature = "otlp")]
        let listening = listening.with(super::otlp::layer().map_err(LogError::Collector)?);
        // A second subscriber is refused by tracing; the first goes on, which is what tests want.
        listening.try_init().ok();
        Ok(())
    }
}
