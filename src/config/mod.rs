//! The configuration: each module's own settings in one TOML document.
//!
//! Layers, later ones win: defaults, one file, `FREETUMOR__SECTION__KEY` variables, flags ([`load`]). Nothing is
//! corrected silently: an unknown key or a value outside its range is refused by name ([`Config::check`]).

mod load;

use serde::{Deserialize, Serialize};

use crate::http::ServerConfig;
use crate::stream::recipe::Recipe;
use crate::telemetry::log::LogConfig;
use crate::volume::Plan;

pub use load::{ConfigError, ENVIRONMENT_PREFIX, Flag, load};

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The grid, labels and window that a store and its models agree on.
    pub plan: Plan,
    /// The HTTP server.
    pub server: ServerConfig,
    /// What requests without a recipe get.
    pub recipe: Recipe,
    /// Log lines.
    pub log: LogConfig,
}

impl Config {
    /// Checks every value's range and what values must have in common.
    ///
    /// # Errors
    /// [`ConfigError::Refused`] names the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refused = |text: String| Err(ConfigError::Refused(text));
        if let Some(text) = self.plan.refusal().or_else(|| self.server.refusal()) {
            return refused(text);
        }
        if let Err(error) = self.recipe.validate() {
            return refused(format!(
                "recipe.{}: expected {}, got {}",
                error.field, error.expected, error.got
            ));
        }
        for organ in self.recipe.organs.iter().flat_map(|organs| organs.keys()) {
            if let Err(error) = self.plan.labels.organ(organ) {
                return refused(format!("recipe.organs: {error}"));
            }
        }
        match self.log.filter() {
            Ok(_) => Ok(()),
            Err(error) => refused(error.to_string()),
        }
    }
}
