//! Log lines on standard error, as text or as JSON.

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

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

/// A level that is not one.
#[derive(Debug, thiserror::Error)]
#[error("log.level: expected a level such as info or info,freetumor::http=debug, got {0:?}")]
pub struct LevelError(String);

impl LogConfig {
    /// Checks the level.
    ///
    /// # Errors
    /// [`LevelError`] names the key.
    pub fn filter(&self) -> Result<EnvFilter, LevelError> {
        // Alone, a word that is no level would be taken for a module and log everything of it.
        let mut bare = self.level.split(',').filter(|part| !part.contains('='));
        let is_known = bare.all(|part| part.trim().parse::<LevelFilter>().is_ok());
        let filter = EnvFilter::builder().parse(&self.level).ok().filter(|_| is_known);
        filter.ok_or_else(|| LevelError(self.level.clone()))
    }

    /// Starts logging; later calls in the same process change nothing.
    ///
    /// # Errors
    /// [`LevelError`] names the key.
    pub fn start(&self) -> Result<(), LevelError> {
        let builder = tracing_subscriber::fmt()
            .with_env_filter(self.filter()?)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
        // A second subscriber is refused by tracing; the first goes on, which is what tests want.
        match self.format {
            LogFormat::Text => builder.try_init().ok(),
            LogFormat::Json => builder.json().try_init().ok(),
        };
        Ok(())
    }
}
