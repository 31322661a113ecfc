//! The query of `GET /v1/batch`: a recipe's commonest fields as plain text, laid over the server's default recipe.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::problem::Problem;
use crate::sampler::Augmentation;
use crate::stream::delivery::{Delivery, Priority};
use crate::stream::recipe::Recipe;

/// The file formats of a single batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Npz,
    Safetensors,
}

/// A single batch as asked for.
#[derive(Clone, Debug)]
pub(super) struct BatchQuery {
    pub recipe: Recipe,
    pub delivery: Delivery,
    pub format: Format,
    /// Seconds after which the client wants no answer.
    pub deadline_seconds: Option<u64>,
}

/// Every parameter with its meaning, for the OpenAPI document and for refusals.
pub(super) const PARAMETERS: [(&str, &str); 17] = [
    ("index", "index of the first patch (default 0)"),
    ("batch_size", "patches in the batch (default 2)"),
    ("format", "npz (default) or safetensors"),
    (
        "deadline_seconds",
        "seconds after which the answer is of no use; the batch is then given up with 503 (default server.batch_seconds, the most)",
    ),
    ("image", "f32 (default) or f16, windowed to [0, 1], or i16 in HU"),
    (
        "outputs",
        "optional arrays, comma-separated: source, soft_mask, lesion_instance",
    ),
    ("seed", "the recipe's seed"),
    ("synthesizer", "conditional, published, analytic or copy_paste"),
    ("gate", "on or off"),
    ("augment", "on or off"),
    ("organ", "organs, comma-separated, in equal shares"),
    (
        "pool",
        "pools, comma-separated, in equal shares: labelled_real, labelled_host, unlabelled_host",
    ),
    (
        "size",
        "size classes, comma-separated, in equal shares: tiny, small, medium, large",
    ),
    (
        "contrast",
        "contrast bins, comma-separated, in equal shares: dark, dim, iso, bright",
    ),
    ("fallback", "healthy, real or best"),
    (
        "unlabelled_negatives",
        "what a hidden tumour in an unlabelled host means: trust, ignore or critic",
    ),
    ("patch", "patch size in voxels: D,H,W, or one number for all three"),
];

/// Reads the query's pairs.
pub(super) fn parse(pairs: Vec<(String, String)>, default_recipe: &Recipe) -> Result<BatchQuery, Problem> {
    let mut query = BatchQuery {
        recipe: default_recipe.clone(),
        delivery: Delivery {
            count: Some(1),
            priority: Priority::Preview,
            ..Delivery::default()
        },
        format: Format::Npz,
        deadline_seconds: None,
    };
    let mut seen = Vec::new();
    for (key, value) in pairs {
        set(&mut query, &key, &value)?;
        if seen.contains(&key) {
            return Err(Problem::field(&key, format!("query field {key}: given twice")));
        }
        seen.push(key);
    }
    Ok(query)
}

fn set(query: &mut BatchQuery, key: &str, value: &str) -> Result<(), Problem> {
    let BatchQuery {
        recipe,
        delivery,
        format,
        deadline_seconds,
    } = query;
    match key {
        "deadline_seconds" => *deadline_seconds = Some(number(key, value)?),
        "index" => delivery.from = number(key, value)?,
        "batch_size" => delivery.batch_size = number(key, value)?,
        "format" => {
            *format = match value {
                "npz" => Format::Npz,
                "safetensors" => Format::Safetensors,
                _ => return Err(refuse(key, "npz or safetensors", value)),
            }
        }
        "image" => delivery.image = word(key, value)?,
        "outputs" => delivery.outputs = words(key, value)?,
        "seed" => recipe.seed = number(key, value)?,
        "synthesizer" => recipe.synthesizer = word(key, value)?,
        "gate" => recipe.gate.enabled = switch(key, value)?,
        "augment" => {
            if !switch(key, value)? {
                recipe.augment = Augmentation::off();
            }
        }
        "organ" => recipe.organs = Some(value.split(',').map(|name| (name.to_owned(), 1.0)).collect()),
        "pool" => recipe.pools = Some(equal_shares(words(key, value)?)),
        "size" => recipe.sizes = equal_shares(words(key, value)?),
        "contrast" => recipe.contrasts = equal_shares(words(key, value)?),
        "fallback" => recipe.fallback = word(key, value)?,
        "unlabelled_negatives" => recipe.unlabelled_negatives = Some(word(key, value)?),
        "patch" => {
            let sides = value
                .split(',')
                .map(|side| number(key, side))
                .collect::<Result<Vec<_>, _>>()?;
            recipe.patch = Some(match sides[..] {
                [side] => [side; 3],
                [d, h, w] => [d, h, w],
                _ => return Err(refuse(key, "one number or D,H,W", value)),
            });
        }
        _ => {
            let known: Vec<_> = PARAMETERS.iter().map(|(name, _)| *name).collect();
            let name: String = key.chars().take(80).collect();
            let detail = format!("unknown query field `{name}`, expected one of {}", known.join(", "));
            return Err(Problem::field(name, detail));
        }
    }
    Ok(())
}

fn equal_shares<K: Ord>(keys: Vec<K>) -> BTreeMap<K, f64> {
    keys.into_iter().map(|key| (key, 1.0)).collect()
}

fn refuse(key: &str, expected: &str, got: &str) -> Problem {
    let got: String = got.chars().take(200).collect();
    Problem::field(key, format!("query field {key}: expected {expected}, got {got:?}"))
}

fn number<N: FromStr>(key: &str, value: &str) -> Result<N, Problem> {
    value.parse().map_err(|_| refuse(key, "a whole number in range", value))
}

fn switch(key: &str, value: &str) -> Result<bool, Problem> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(refuse(key, "on or off", value)),
    }
}

/// Reads a name as recipes and deliveries spell it.
fn word<T: DeserializeOwned>(key: &str, value: &str) -> Result<T, Problem> {
    serde_json::from_value(Value::String(value.into())).map_err(|error| {
        let detail: String = format!("query field {key}: {error}").chars().take(500).collect();
        Problem::field(key, detail)
    })
}

fn words<T: DeserializeOwned>(key: &str, value: &str) -> Result<Vec<T>, Problem> {
    value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| word(key, name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::delivery::Output;
    use crate::synth::SynthesizerKind;

    fn read(pairs: &[(&str, &str)]) -> Result<BatchQuery, Problem> {
        let pairs = pairs
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        parse(pairs, &Recipe::default())
    }

    #[test]
    fn the_query_changes_the_default_recipe() {
        let query = read(&[
            ("index", "8"),
            ("synthesizer", "analytic"),
            ("gate", "off"),
            ("augment", "off"),
            ("organ", "liver,kidney"),
            ("outputs", "source,soft_mask"),
            ("patch", "64"),
        ])
        .unwrap();
        assert_eq!((query.delivery.from, query.delivery.count), (8, Some(1)));
        assert_eq!(query.recipe.synthesizer, Some(SynthesizerKind::Analytic));
        assert!(!query.recipe.gate.enabled && query.recipe.augment == Augmentation::off());
        assert_eq!(query.recipe.organs.unwrap().len(), 2);
        assert_eq!(query.delivery.outputs, [Output::Source, Output::SoftMask]);
        assert_eq!(query.recipe.patch, Some([64; 3]));
    }

    #[test]
    fn every_listed_parameter_is_known_and_refusals_name_it() {
        for (name, _) in PARAMETERS {
            if let Err(problem) = read(&[(name, "?")]) {
                assert_eq!(problem.field.as_deref(), Some(name), "{problem:?}");
                assert!(!problem.detail.contains("unknown query field"), "{problem:?}");
            }
        }
        assert_eq!(read(&[("idx", "1")]).unwrap_err().field.as_deref(), Some("idx"));
        assert!(
            read(&[("seed", "1"), ("seed", "2")])
                .unwrap_err()
                .detail
                .contains("twice")
        );
    }
}
