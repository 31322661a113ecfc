//! Which part of the cases a call takes, so that many machines share an ingest.

use std::str::FromStr;

use super::IngestError;

/// Shard `index` of `count`: every `count`-th case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This shard, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Default for Shard {
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl FromStr for Shard {
    type Err = IngestError;

    fn from_str(text: &str) -> Result<Self, IngestError> {
        let parse = || {
            let (index, count) = text.split_once('/')?;
            let shard = Self {
                index: index.parse().ok()?,
                count: count.parse().ok()?,
            };
            (shard.index < shard.count).then_some(shard)
        };
        parse().ok_or_else(|| IngestError::Shard(text.chars().take(40).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_parsed_or_refused() {
        assert_eq!("1/3".parse::<Shard>().unwrap(), Shard { index: 1, count: 3 });
        for text in ["3/3", "0/0", "1", "a/b", "-1/2"] {
            assert!(text.parse::<Shard>().unwrap_err().to_string().contains(text));
        }
    }
}
