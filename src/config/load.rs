//! Reads the configuration: defaults, then the file, then `FREETUMOR__SECTION__KEY`, each over the one before.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::Config;

/// What variables that override a key start with; `__` separates levels, as in `FREETUMOR__SERVER__MAX_STREAMS`.
pub const ENVIRONMENT_PREFIX: &str = "FREETUMOR__";

/// A refused configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration")]
    Read(#[from] std::io::Error),
    /// The file is no TOML.
    #[error("{path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line and column with what was expected.
        message: String,
    },
    /// A key that does not exist, or a value of the wrong type.
    #[error("{source_name}: key {key}: {message}")]
    Key {
        /// The file, or what else was read.
        source_name: String,
        /// The key's path.
        key: String,
        /// What was expected.
        message: String,
    },
    /// A value outside its range.
    #[error("{source_name}: {message}")]
    Value {
        /// The file, or what else was read.
        source_name: String,
        /// The key, its range and what it holds.
        message: String,
    },
}

/// Says what is wrong and where; not the line itself, which may hold a key.
fn without_text(text: &str, error: &toml::de::Error) -> String {
    let message = error.message();
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return message.into();
    };
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |start| start.chars().count()) + 1;
    format!("line {line}, column {column}: {message}")
}

/// Reads the configuration from a file, if one is given, and the environment.
///
/// # Errors
/// [`ConfigError`] names the file and the key.
pub fn load(path: Option<&Path>, environment: impl Iterator<Item = (String, String)>) -> Result<Config, ConfigError> {
    let mut table = Table::new();
    let mut sources = Vec::new();
    if let Some(path) = path {
        let text = fs_err::read_to_string(path)?;
        table = text.parse().map_err(|error: toml::de::Error| {
            let path = path.to_path_buf();
            ConfigError::Syntax {
                path,
                message: without_text(&text, &error),
            }
        })?;
        sources.push(path.display().to_string());
    }
    let mut overrides: Vec<(String, String)> = environment
        .filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX))
        .collect();
    overrides.sort();
    if !overrides.is_empty() {
        sources.push(format!("environment ({ENVIRONMENT_PREFIX}...)"));
    }
    for (name, text) in &overrides {
        set(&mut table, name, text)?;
    }
    let source_name = if sources.is_empty() {
        "defaults".to_string()
    } else {
        sources.join(" + ")
    };
    let mut whole = Table::try_from(Config::default()).expect("defaults are representable in TOML");
    lay_over(&mut whole, table);
    let config: Config = serde_path_to_error::deserialize(Value::Table(whole)).map_err(|error| ConfigError::Key {
        source_name: source_name.clone(),
        key: error.path().to_string(),
        message: error.into_inner().message().to_string(),
    })?;
    match config.refusal() {
        Some(message) => Err(ConfigError::Value { source_name, message }),
        None => Ok(config),
    }
}

/// Tables whose keys are data: a file that names one means all of it.
const WHOLE_TABLES: [&str; 9] = [
    "labels",
    "pools",
    "organs",
    "sizes",
    "contrasts",
    "centres",
    "cube_mix",
    "tumours",
    "nodules",
];

/// Lays a table over another, section by section. A key that a section leaves out keeps its default there, which may
/// differ from the default of the same kind of section elsewhere (`critic.look` and `synthesizer.look`).
fn lay_over(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) if !WHOLE_TABLES.contains(&key.as_str()) => {
                lay_over(below, above);
            }
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// Puts one variable into the table. A value that reads as TOML is that value, anything else is a text.
fn set(table: &mut Table, name: &str, text: &str) -> Result<(), ConfigError> {
    let keys: Vec<String> = name[ENVIRONMENT_PREFIX.len()..]
        .split("__")
        .map(str::to_lowercase)
        .collect();
    let (last, sections) = keys.split_last().expect("split yields at least one part");
    let mut place = table;
    for section in sections {
        let entry = place
            .entry(section.clone())
            .or_insert_with(|| Value::Table(Table::new()));
        place = entry.as_table_mut().ok_or_else(|| ConfigError::Key {
            source_name: "environment".into(),
            key: name.to_string(),
            message: format!("{section} is a value, not a section"),
        })?;
    }
    place.insert(last.clone(), parse_value(text));
    Ok(())
}

fn parse_value(text: &str) -> Value {
    #[derive(Deserialize)]
    struct One {
        value: Value,
    }
    toml::from_str::<One>(&format!("value = {text}")).map_or_else(|_| Value::String(text.to_string()), |one| one.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(file: Option<&str>, environment: &[(&str, &str)]) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        if let Some(text) = file {
            fs_err::write(&path, text).unwrap();
        }
        let environment = environment
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()));
        load(file.map(|_| path.as_path()), environment).map_err(|error| error.to_string())
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_defaults() {
        let file = "[plan]\nspacing_mm = [3.0, 3.0, 3.0]\npatch = [32, 32, 32]\n";
        let config = with(
            Some(file),
            &[("FREETUMOR__PLAN__PATCH", "[64, 64, 64]"), ("OTHER", "1")],
        )
        .unwrap();
        assert_eq!((config.plan.spacing_mm, config.plan.patch), ([3.0; 3], [64; 3]));
        let config = with(None, &[("FREETUMOR__SERVER__READ_KEYS", "secret")]).unwrap();
        assert!(config.server.read_keys[0].matches(b"secret"));
        let two = with(None, &[("FREETUMOR__SERVER__READ_KEYS", r#"["old", "new"]"#)]).unwrap();
        assert!(two.server.read_keys[1].matches(b"new"));
    }

    #[test]
    fn a_section_keeps_its_own_defaults_and_shares_are_replaced_whole() {
        let file = "[synthesizer.look]\nscale = 0.05\n[recipe.sizes]\nsmall = 1.0\n";
        let config = with(Some(file), &[]).unwrap();
        let defaults = Config::default();
        assert_eq!(config.synthesizer.look.noise_hu, defaults.synthesizer.look.noise_hu);
        assert_ne!(config.synthesizer.look.noise_hu, defaults.critic.look.noise_hu);
        assert_eq!((config.synthesizer.look.scale, config.recipe.sizes.len()), (0.05, 1));
        let law = "counts = [1.0]\nln_mean = 3.0\nln_sd = 0.3\nrange_mm = [10.0, 40.0]\n";
        let file = format!("[phantom.tumours.liver]\n{law}[critic.centres]\ntumour = 1.0\n");
        let config = with(Some(&file), &[]).unwrap();
        assert_eq!((config.phantom.tumours.len(), config.critic.centres.len()), (1, 1));
    }

    #[test]
    fn refusals_name_file_and_key() {
        let error = with(Some("[server]\nmax_stream = 3\n"), &[]).unwrap_err();
        assert!(error.contains("c.toml") && error.contains("max_stream"), "{error}");
        let error = with(None, &[("FREETUMOR__PLAN__PATCH", "big")]).unwrap_err();
        assert!(error.contains("environment") && error.contains("plan.patch"), "{error}");
        let error = with(Some("[recipe.gate]\nrecall = 2.0\n"), &[]).unwrap_err();
        assert!(error.contains("gate.recall") && error.contains("0 to 1"), "{error}");
    }

    /// The line itself may hold a key.
    #[test]
    fn a_syntax_error_tells_its_place_and_not_the_text() {
        let error = with(Some("[server]\nread_keys = [\"hunter22]\n"), &[]).unwrap_err();
        assert!(error.contains("c.toml") && error.contains("line 2, column "), "{error}");
        assert!(!error.contains("hunter"), "{error}");
    }
}
