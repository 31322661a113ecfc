//! Request bodies: JSON laid over the server's defaults, every refusal naming its field.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::app::Shared;
use super::problem::{Problem, ProblemKind};
use super::settings::MAX_BODY_BYTES;
use crate::jobs::{JobName, TrainingConfig};
use crate::stream::delivery::Delivery;
use crate::stream::recipe::Recipe;

/// A request's body, bounded in bytes and in time.
pub(super) struct WholeBody(pub Bytes);

impl FromRequest<Shared> for WholeBody {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &Shared) -> Result<Self, Problem> {
        let seconds = app.config.body_seconds;
        let declared = declared_bytes(request.headers());
        let read = async {
            if declared <= MAX_BODY_BYTES as u64 {
                return Bytes::from_request(request, app).await.map(Self).map_err(refused_body);
            }
            if declared <= MAX_DISCARDED_BYTES {
                discard(request.into_body()).await;
            }
            Err(too_large())
        };
        match timeout(Duration::from_secs(seconds), read).await {
            Ok(body) => body,
            Err(_) => {
                let detail = format!("the request's body: expected within {seconds} s");
                Err(Problem::new(ProblemKind::BodyTooSlow, detail))
            }
        }
    }
}

/// Takes a body and keeps nothing: clients that only listen after they have sent everything hear the refusal too.
async fn discard(body: Body) {
    let mut chunks = body.into_data_stream();
    while let Some(Ok(_)) = chunks.next().await {}
}

fn declared_bytes(headers: &HeaderMap) -> u64 {
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok());
    length.and_then(|length| length.parse().ok()).unwrap_or(0)
}

/// Of a body over the limit, what is read for the client's sake; one that is declared longer is not even begun.
const MAX_DISCARDED_BYTES: u64 = 8 << 20;

/// Which patches, and how they are to be delivered.
#[derive(Clone, Debug)]
pub(super) struct StreamRequest {
    pub recipe: Recipe,
    pub delivery: Delivery,
}

/// Reads `{"recipe": {...}, "delivery": {...}}`. Either may be absent; a field not given is the server's default.
pub(super) fn parse(body: &[u8], default_recipe: &Recipe) -> Result<StreamRequest, Problem> {
    let value = if body.is_empty() {
        Value::Object(Map::new())
    } else {
        json(body)?
    };
    let Value::Object(mut request) = value else {
        return Err(Problem::field(
            "",
            "the request: expected an object with recipe and delivery",
        ));
    };
    let recipe = overlay("recipe", default_recipe, request.remove("recipe"), replace)?;
    let delivery = overlay("delivery", &Delivery::default(), request.remove("delivery"), replace)?;
    if let Some(unknown) = request.keys().next() {
        let name = shorten(unknown);
        return Err(Problem::field(
            &name,
            format!("unknown field `{name}`, expected `recipe` or `delivery`"),
        ));
    }
    Ok(StreamRequest { recipe, delivery })
}

/// Reads `{"name": "...", "segmentor": {...}}`: the name of a training, and what differs from the server's segmentor; of its
/// recipe, what differs from that one's.
pub(super) fn parse_training(body: &[u8], default: &TrainingConfig) -> Result<(JobName, TrainingConfig), Problem> {
    let Value::Object(mut request) = json(body)? else {
        return Err(Problem::field(
            "",
            "the request: expected an object with name and segmentor",
        ));
    };
    let Some(Value::String(name)) = request.remove("name") else {
        return Err(Problem::field("name", "name: expected the training's name, a text"));
    };
    let name = name.parse()?;
    let mut given = request.remove("segmentor");
    if let Some(unknown) = request.keys().next() {
        let name = shorten(unknown);
        let detail = format!("unknown field `{name}`, expected `name` or `segmentor`");
        return Err(Problem::field(&name, detail));
    }
    let recipe = given.as_mut().and_then(Value::as_object_mut);
    let recipe = recipe.and_then(|fields| fields.remove("recipe"));
    let mut config = overlay("segmentor", default, given, merge)?;
    config.recipe = overlay("segmentor.recipe", &default.recipe, recipe, replace)?;
    Ok((name, config))
}

fn refused_body(rejection: BytesRejection) -> Problem {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return too_large();
    }
    Problem::new(ProblemKind::Body, rejection.body_text())
}

fn too_large() -> Problem {
    let detail = format!("the request's body: expected at most {MAX_BODY_BYTES} bytes");
    Problem::new(ProblemKind::BodyTooLarge, detail)
}

fn json(body: &[u8]) -> Result<Value, Problem> {
    serde_json::from_slice(body).map_err(|error| Problem::new(ProblemKind::Json, error.to_string()))
}

/// Lays a field over a default as a whole: `{"sizes": {...}}` replaces all sizes.
fn replace(below: &mut Map<String, Value>, key: String, value: Value) {
    below.insert(key, value);
}

/// Lays a field over a default, section by section, as the configuration file does: `{"validation": {"every": 200}}` leaves the
/// others of that section as they are. A network is one as a whole.
fn merge(below: &mut Map<String, Value>, key: String, value: Value) {
    match (below.get_mut(&key), value) {
        (Some(Value::Object(below)), Value::Object(above)) if key != "network" => {
            above.into_iter().for_each(|(key, value)| merge(below, key, value));
        }
        (_, value) => replace(below, key, value),
    }
}

/// Lays the fields of an object over a default, each by `lay`.
fn overlay<T: Serialize + DeserializeOwned + Clone>(
    part: &str,
    default: &T,
    given: Option<Value>,
    lay: fn(&mut Map<String, Value>, String, Value),
) -> Result<T, Problem> {
    let given = match given {
        None | Some(Value::Null) => return Ok(default.clone()),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err(Problem::field(part, format!("{part}: expected an object"))),
    };
    let mut whole = match serde_json::to_value(default) {
        Ok(Value::Object(whole)) => whole,
        _ => {
            return Err(Problem::internal(format!(
                "the default {part} is not representable in JSON"
            )));
        }
    };
    for (key, value) in given {
        // Every field is tried alone first, because an error of the whole would not say where it lies.
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        if let Err(error) = serde_json::from_value::<T>(alone) {
            return Err(refused_field(part, &key, &error.to_string()));
        }
        lay(&mut whole, key, value);
    }
    serde_json::from_value(Value::Object(whole)).map_err(|error| Problem::field(part, format!("{part}: {error}")))
}

fn refused_field(part: &str, key: &str, error: &str) -> Problem {
    let key = shorten(key);
    let unknown = error
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split('`').next());
    let field = match unknown {
        Some(name) if name != key => format!("{part}.{key}.{name}"),
        _ => format!("{part}.{key}"),
    };
    let detail: String = format!("{field}: {error}").chars().take(2000).collect();
    Problem::field(field, detail)
}

fn shorten(name: &str) -> String {
    name.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<StreamRequest, Problem> {
        let default = Recipe {
            seed: 9,
            ..Recipe::default()
        };
        parse(text.as_bytes(), &default)
    }

    #[test]
    fn absent_parts_are_the_servers_defaults() {
        assert_eq!(read("").unwrap().recipe.seed, 9);
        let request = read(r#"{"recipe": {"fallback": "best"}, "delivery": {"batch_size": 4}}"#).unwrap();
        assert_eq!((request.recipe.seed, request.delivery.batch_size), (9, 4));
        assert_eq!(
            read(r#"{"recipe": {"sizes": {"tiny": 1}}}"#)
                .unwrap()
                .recipe
                .sizes
                .len(),
            1
        );
    }

    #[test]
    fn a_training_is_what_differs_from_the_servers() {
        let mut default = TrainingConfig {
            steps: 77,
            ..TrainingConfig::default()
        };
        default.recipe.seed = 5;
        default.validation.patience = 3;
        default.split.fold = 2;
        default.held_out.cases = 7;
        let read = |text: &str| parse_training(text.as_bytes(), &default);
        let text = r#"{"name": "a", "segmentor": {"batch_size": 3, "recipe": {"fallback": "best"}}}"#;
        let (name, config) = read(text).unwrap();
        assert_eq!(name.as_str(), "a");
        assert_eq!((config.steps, config.batch_size, config.recipe.seed), (77, 3, 5));
        assert_eq!(config.recipe.fallback, crate::stream::recipe::Fallback::Best);
        assert_eq!(read(r#"{"name": "a"}"#).unwrap().1, default);
        // Of a section too.
        let text =
            r#"{"name": "a", "segmentor": {"validation": {"every": 200}, "held_out": {"window": {"overlap": 0.25}}}}"#;
        let (_, config) = read(text).unwrap();
        let (every, patience) = (config.validation.every, config.validation.patience);
        assert_eq!((every, patience, config.split.fold), (200, 3, 2));
        assert_eq!((config.held_out.window.overlap, config.held_out.cases), (0.25, 7));
        for (text, field) in [
            ("[]", ""),
            ("{}", "name"),
            (r#"{"name": "../a"}"#, "name"),
            (r#"{"name": "a", "critic": {}}"#, "critic"),
            (r#"{"name": "a", "segmentor": []}"#, "segmentor"),
            (r#"{"name": "a", "segmentor": {"step": 1}}"#, "segmentor.step"),
            (
                r#"{"name": "a", "segmentor": {"recipe": {"sed": 1}}}"#,
                "segmentor.recipe.sed",
            ),
        ] {
            let problem = read(text).unwrap_err();
            assert_eq!((problem.status, problem.field.as_deref()), (422, Some(field)), "{text}");
        }
    }

    #[test]
    fn refusals_name_status_and_field() {
        let cases = [
            ("{", 400, None),
            ("[]", 422, Some("")),
            (r#"{"recipes": {}}"#, 422, Some("recipes")),
            (r#"{"recipe": 3}"#, 422, Some("recipe")),
            (r#"{"recipe": {"sed": 1}}"#, 422, Some("recipe.sed")),
            (r#"{"recipe": {"gate": {"recal": 1}}}"#, 422, Some("recipe.gate.recal")),
            (r#"{"recipe": {"sizes": {"huge": 1}}}"#, 422, Some("recipe.sizes")),
            (r#"{"recipe": {"seed": -1}}"#, 422, Some("recipe.seed")),
            (r#"{"delivery": {"batch_size": 2.5}}"#, 422, Some("delivery.batch_size")),
            (r#"{"delivery": {"codec": "gzip"}}"#, 422, Some("delivery.codec")),
            (
                r#"{"delivery": {"cursor": {"recipe": "xy"}}}"#,
                422,
                Some("delivery.cursor"),
            ),
        ];
        for (text, status, field) in cases {
            let problem = read(text).unwrap_err();
            assert_eq!(
                (problem.status, problem.field.as_deref()),
                (status, field),
                "{text}: {problem:?}"
            );
        }
    }
}
