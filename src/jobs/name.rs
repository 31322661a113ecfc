//! Names of jobs: a folder's name and a part of a URL.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::JobError;

/// The longest name.
pub(super) const MAX_LENGTH: usize = 64;

/// A job's name: `a-z`, `0-9`, `-` and `_`, a letter or digit first. It is never a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobName(String);

impl JobName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JobName {
    type Err = JobError;

    fn from_str(text: &str) -> Result<Self, JobError> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = text.starts_with(plain) && text.chars().all(|c| plain(c) || matches!(c, '-' | '_'));
        if !fits || text.len() > MAX_LENGTH {
            let got = text.chars().take(80).collect();
            return Err(JobError::Name { got });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for JobName {
    type Error = JobError;

    fn try_from(text: String) -> Result<Self, JobError> {
        text.parse()
    }
}

impl From<JobName> for String {
    fn from(name: JobName) -> Self {
        name.0
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_never_a_path() {
        for good in ["a", "7", "liver-1", "a_b", &"x".repeat(MAX_LENGTH)] {
            assert_eq!(good.parse::<JobName>().unwrap().as_str(), good);
        }
        let long = "x".repeat(MAX_LENGTH + 1);
        for bad in [
            "", ".", "..", "a/b", "a\\b", "-a", "_a", "A", "ä", "a b", "a.b", "a\0", &long,
        ] {
            assert!(bad.parse::<JobName>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<JobName>(bad.into()).is_err(), "{bad:?}");
        }
    }
}
