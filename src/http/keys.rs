//! Keys: who may read, who may change the server.

use std::path::Path;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer};
use subtle::{Choice, ConstantTimeEq};

use super::settings::ServerConfig;

/// Keys of a kind that are valid at the same time: the one in use and its successor.
const MAX_KEYS: usize = 2;
/// The largest file of keys in bytes.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// A secret that requests bring. Never printed, never serialized.
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

    /// Tells whether a request's key is this one, in a time that does not depend on where or whether they differ.
    pub fn matches(&self, given: &[u8]) -> bool {
        self.equals(given).into()
    }

    fn equals(&self, given: &[u8]) -> Choice {
        // Hashes have one length, so that not even the secret's length shows.
        let [secret, given] = [self.0.expose_secret().as_bytes(), given].map(blake3::hash);
        secret.as_bytes().ct_eq(given.as_bytes())
    }

    /// Tells whether a header can carry it.
    fn is_usable(&self) -> bool {
        let secret = self.0.expose_secret();
        !secret.is_empty() && secret.bytes().all(|byte| byte.is_ascii_graphic())
    }
}

/// Reads one key or a list of them: `READ_KEYS=secret` is enough in an environment.
pub(super) fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ApiKey>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a secret or a list of secrets")]
    enum Given {
        One(ApiKey),
        More(Vec<ApiKey>),
    }
    Ok(match Given::deserialize(deserializer)? {
        Given::One(key) => vec![key],
        Given::More(keys) => keys,
    })
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Caller {
    /// Nobody in particular: the server has no read keys.
    Anyone,
    /// The holder of a read key, by its place.
    Reader(usize),
    /// The holder of an admin key, by its place.
    Admin(usize),
}

impl Caller {
    /// Returns a name for log lines, which tells nothing of the key.
    pub fn name(self) -> &'static str {
        match self {
            Self::Anyone => "anyone",
            Self::Reader(0) => "read key 1",
            Self::Reader(_) => "read key 2",
            Self::Admin(0) => "admin key 1",
            Self::Admin(_) => "admin key 2",
        }
    }
}

/// A file of keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("server.{setting}: cannot read the keys: {source}")]
    Read {
        /// The setting.
        setting: &'static str,
        /// What the operating system says, with the path.
        source: std::io::Error,
    },
    /// It holds none, or too many.
    #[error("server.{setting}: expected {expected}, got {got}")]
    Value {
        /// The setting.
        setting: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// What was found; never a key.
        got: String,
    },
}

/// The keys that are valid now.
#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    read: Vec<ApiKey>,
    admin: Vec<ApiKey>,
}

impl Keys {
    /// Joins the settings' keys with those of their files.
    pub fn load(config: &ServerConfig) -> Result<Self, KeysError> {
        Ok(Self {
            read: joined("read_keys", &config.read_keys, config.read_keys_file.as_deref())?,
            admin: joined("admin_keys", &config.admin_keys, config.admin_keys_file.as_deref())?,
        })
    }

    /// Tells what is wrong with the settings' own keys, whatever files there are.
    pub fn refusal(config: &ServerConfig) -> Option<String> {
        let read = joined("read_keys", &config.read_keys, None);
        let admin = joined("admin_keys", &config.admin_keys, None);
        read.and(admin).err().map(|error| error.to_string())
    }

    /// Tells whether anybody may read.
    pub fn is_open(&self) -> bool {
        self.read.is_empty()
    }

    /// Tells whether there is somebody who may change the server.
    pub fn has_admin(&self) -> bool {
        !self.admin.is_empty()
    }

    /// Returns who asks; nobody where the key is missing or wrong and one is needed.
    pub fn caller(&self, given: Option<&[u8]>) -> Option<Caller> {
        let place = |keys: &[ApiKey]| {
            // All are compared, so that time does not tell which one matched.
            let matches: Vec<bool> = keys
                .iter()
                .map(|key| given.is_some_and(|given| key.matches(given)))
                .collect();
            matches.iter().position(|matched| *matched)
        };
        let (admin, read) = (place(&self.admin), place(&self.read));
        let anyone = self.is_open().then_some(Caller::Anyone);
        admin.map(Caller::Admin).or(read.map(Caller::Reader)).or(anyone)
    }

    /// Tells whether a key is one of those that are set.
    pub fn knows(&self, given: Option<&[u8]>) -> bool {
        !matches!(self.caller(given), None | Some(Caller::Anyone))
    }
}

fn joined(setting: &'static str, keys: &[ApiKey], file: Option<&Path>) -> Result<Vec<ApiKey>, KeysError> {
    let mut all = keys.to_vec();
    if let Some(path) = file {
        let text = read_file(path).map_err(|source| KeysError::Read { setting, source })?;
        let lines = text.lines().map(str::trim);
        all.extend(
            lines
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(ApiKey::new),
        );
    }
    let value = |expected, got: String| Err(KeysError::Value { setting, expected, got });
    if all.len() > MAX_KEYS {
        return value("at most two keys, with those of the file", all.len().to_string());
    }
    if file.is_some() && all.is_empty() {
        return value("a key, one a line", "a file without any".into());
    }
    if !all.iter().all(ApiKey::is_usable) {
        return value("visible ASCII characters", "a key that is empty or holds others".into());
    }
    Ok(all)
}

fn read_file(path: &Path) -> std::io::Result<String> {
    let length = fs_err::metadata(path)?.len();
    if length > MAX_FILE_BYTES {
        let what = format!("{}: {length} bytes are too many for keys", path.display());
        return Err(std::io::Error::other(what));
    }
    fs_err::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(read: &[&str], admin: &[&str]) -> ServerConfig {
        let keys = |secrets: &[&str]| secrets.iter().map(|secret| ApiKey::new(secret)).collect();
        ServerConfig {
            read_keys: keys(read),
            admin_keys: keys(admin),
            ..ServerConfig::default()
        }
    }

    #[test]
    fn a_key_never_leaves_through_debug_or_serialize() {
        let config = config(&["hunter22\n"], &["hunter33"]);
        let keys = Keys::load(&config).unwrap();
        for text in [format!("{config:?}{keys:?}"), serde_json::to_string(&config).unwrap()] {
            assert!(!text.contains("hunter"), "{text}");
        }
        let key = &config.read_keys[0];
        assert!(key.matches(b"hunter22") && !key.matches(b"hunter2") && !key.matches(b""));
    }

    #[test]
    fn both_keys_of_a_kind_are_valid_and_say_who_asks() {
        let keys = Keys::load(&config(&["old", "new"], &["root"])).unwrap();
        let caller = |key: &str| keys.caller(Some(key.as_bytes()));
        assert_eq!(caller("old"), Some(Caller::Reader(0)));
        assert_eq!(caller("new"), Some(Caller::Reader(1)));
        assert_eq!(caller("root"), Some(Caller::Admin(0)));
        assert_eq!((caller("older"), keys.caller(None)), (None, None));
        let open = Keys::load(&config(&[], &["root"])).unwrap();
        assert_eq!(open.caller(Some(b"wrong")), Some(Caller::Anyone));
    }

    #[test]
    fn files_hold_a_key_a_line_and_refusals_never_show_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        let with = |text: &str| {
            fs_err::write(&path, text).unwrap();
            let config = ServerConfig {
                read_keys_file: Some(path.clone()),
                ..ServerConfig::default()
            };
            Keys::load(&config).map_err(|error| error.to_string())
        };
        assert_eq!(with("# in use\nhunter22\n\n# next\nhunter33\n").unwrap().read.len(), 2);
        for text in ["", "hunter1\nhunter2\nhunter3\n", "hunter\u{7f}22"] {
            let error = with(text).unwrap_err();
            assert!(
                error.contains("server.read_keys") && !error.contains("hunter"),
                "{error}"
            );
        }
    }
}
