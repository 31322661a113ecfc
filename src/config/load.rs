//! Layers of the configuration: defaults < one TOML file < environment < flags.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::Config;

/// What the names of our environment variables start with; sections and keys follow, separated by two underscores.
pub const ENVIRONMENT_PREFIX: &str = "FREETUMOR__";

/// A configuration that is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read; the message names it.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// The file is no TOML, or holds an unknown key or a value of another type.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and key.
        message: String,
    },
    /// A variable or flag with an unknown key or a value of another type.
    #[error("{layer}: {message}")]
    Layer {
        /// The variable's or flag's name.
        layer: String,
        /// What is wrong.
        message: String,
    },
    /// A value outside its range.
    #[error("{0}")]
    Refused(String),
}

/// A flag that stands for a key.
#[derive(Clone, Debug)]
pub struct Flag {
    /// The flag, as typed.
    pub flag: &'static str,
    /// The key's path, such as `["server", "bind"]`.
    pub path: &'static [&'static str],
    /// The value.
    pub value: String,
}

/// Composes the layers and checks the result.
///
/// # Errors
/// [`ConfigError`] names the file, variable, flag or key.
pub fn load(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[Flag],
) -> Result<Config, ConfigError> {
    let mut whole = file.map(read_file).transpose()?.unwrap_or_default();
    let mut variables: Vec<_> = environment
        .filter_map(|(name, value)| {
            let path = name.strip_prefix(ENVIRONMENT_PREFIX)?.to_lowercase();
            Some((name, path, value))
        })
        .collect();
    variables.sort();
    for (name, path, value) in variables {
        let path: Vec<_> = path.split("__").collect();
        merge(&mut whole, checked_layer(&name, &path, &value)?);
    }
    for Flag { flag, path, value } in flags {
        merge(&mut whole, checked_layer(flag, path, value)?);
    }
    let config: Config = Value::Table(whole)
        .try_into()
        .map_err(|error: toml::de::Error| ConfigError::Refused(error.message().to_owned()))?;
    config.check()?;
    Ok(config)
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let text = fs_err::read_to_string(path)?;
    let refuse = |error: toml::de::Error| ConfigError::File {
        path: path.to_owned(),
        // With the line and the key, as the parser shows them.
        message: error.to_string().trim_end().to_owned(),
    };
    // Read as a whole first, because only then does an error know its line.
    toml::from_str::<Config>(&text).map_err(refuse)?;
    toml::from_str(&text).map_err(refuse)
}

/// Returns a table with the one key, after checking that the configuration has it with a value of this type.
fn checked_layer(layer: &str, path: &[&str], text: &str) -> Result<Table, ConfigError> {
    // `8`, `true` and `[1, 2]` are TOML; a text that is not, or that the key does not want, is taken as it stands.
    let parsed = toml::from_str::<Table>(&format!("value = {text}")).ok();
    let parsed = parsed.and_then(|mut table| table.remove("value"));
    let as_text = nest(path, Value::String(text.to_owned()));
    let accepted = |table: &Table| Config::deserialize(Value::Table(table.clone()));
    if let Some(table) = parsed.map(|value| nest(path, value))
        && accepted(&table).is_ok()
    {
        return Ok(table);
    }
    match accepted(&as_text) {
        Ok(_) => Ok(as_text),
        Err(error) => Err(ConfigError::Layer {
            layer: layer.into(),
            // The value may be a secret: only the parser's own words are repeated, and they quote no texts of ours.
            message: format!("{}: {}", path.join("."), error.message()),
        }),
    }
}

fn nest(path: &[&str], value: Value) -> Table {
    let whole = path.iter().rev().fold(value, |inner, key| {
        Value::Table(Table::from_iter([((*key).to_owned(), inner)]))
    });
    match whole {
        Value::Table(table) => table,
        _ => Table::new(),
    }
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(known)), Value::Table(new)) => merge(known, new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        pairs.into_iter()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn later_layers_win() {
        let file = file("[server]\nmax_streams = 3\nheartbeat_seconds = 4\n[plan]\npatch = [32, 64, 64]");
        let variables = [
            ("FREETUMOR__SERVER__MAX_STREAMS", "5"),
            ("FREETUMOR__SERVER__BIND", "127.0.0.1:1"),
            ("FREETUMOR__SERVER__API_KEY", "123"),
            ("FREETUMOR__PLAN__PATCH", "[48, 48, 48]"),
            ("PATH", "/bin"),
        ];
        let flag = Flag {
            flag: "--bind",
            path: &["server", "bind"],
            value: "0.0.0.0:99".into(),
        };
        let config = load(Some(file.path()), environment(&variables), &[flag]).unwrap();
        assert_eq!((config.server.max_streams, config.server.heartbeat_seconds), (5, 4));
        assert_eq!(config.server.bind.port(), 99);
        assert_eq!(config.plan.patch, [48; 3]);
        assert!(config.server.api_key.unwrap().matches(b"123"));
    }

    #[test]
    fn refusals_name_the_layer_and_the_key() {
        let file_error = |text: &str| {
            let file = file(text);
            let message = load(Some(file.path()), environment(&[]), &[]).unwrap_err().to_string();
            let is_named = message.contains(&*file.path().to_string_lossy());
            (message, is_named)
        };
        let (message, is_named) = file_error("[plan]\npatchs = [1, 2, 3]");
        assert!(
            is_named && message.contains("patchs") && message.contains("line 2"),
            "{message}"
        );
        let (message, is_named) = file_error("[plan\n");
        assert!(is_named, "{message}");
        let (message, _) = file_error("[plan]\npatch = [12, 16, 16]");
        assert!(message.contains("plan.patch"), "{message}");
        let (message, _) = file_error("[recipe.gate]\nrecall = 2.0");
        assert!(message.contains("recipe.gate.recall"), "{message}");
        let (message, _) = file_error("[recipe.organs]\nspleen = 1.0");
        assert!(
            message.contains("recipe.organs") && message.contains("spleen"),
            "{message}"
        );

        let message = load(None, environment(&[("FREETUMOR__SERVER__BINDS", "x")]), &[])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("FREETUMOR__SERVER__BINDS") && message.contains("binds"),
            "{message}"
        );
        let missing = load(Some(Path::new("no/such.toml")), environment(&[]), &[])
            .unwrap_err()
            .to_string();
        assert!(missing.contains("no/such.toml"), "{missing}");
    }

    #[test]
    fn the_shipped_files_load() {
        for name in ["demo", "abdomen", "chest"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/{name}.toml"));
            let config = load(Some(&path), environment(&[]), &[]).unwrap_or_else(|error| panic!("{error}"));
            if name == "abdomen" {
                assert_eq!(config.plan, crate::volume::Plan::default());
            }
            assert_eq!(config.plan.labels.class_count(), if name == "chest" { 3 } else { 7 });
        }
    }
}
