//! Request bodies: JSON laid over the server's defaults, every refusal naming its field.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::problem::Problem;
use super::settings::MAX_BODY_BYTES;
use crate::stream::delivery::Delivery;
use crate::stream::recipe::Recipe;

/// Which patches, and how they are to be delivered.
#[derive(Clone, Debug)]
pub(super) struct StreamRequest {
    pub recipe: Recipe,
    pub delivery: Delivery,
}

/// Reads `{"recipe": {...}, "delivery": {...}}`. Either may be absent; a field not given is the server's default.
pub(super) fn parse(body: Result<Bytes, BytesRejection>, default_recipe: &Recipe) -> Result<StreamRequest, Problem> {
    let body = body.map_err(refused_body)?;
    let value = if body.is_empty() {
        Value::Object(Map::new())
    } else {
        json(&body)?
    };
    let Value::Object(mut request) = value else {
        return Err(Problem::field(
            "",
            "the request: expected an object with recipe and delivery",
        ));
    };
    let recipe = overlay("recipe", default_recipe, request.remove("recipe"))?;
    let delivery = overlay("delivery", &Delivery::default(), request.remove("delivery"))?;
    if let Some(unknown) = request.keys().next() {
        let name = shorten(unknown);
        return Err(Problem::field(
            &name,
            format!("unknown field `{name}`, expected `recipe` or `delivery`"),
        ));
    }
    Ok(StreamRequest { recipe, delivery })
}

fn refused_body(rejection: BytesRejection) -> Problem {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let detail = format!("the request's body: expected at most {MAX_BODY_BYTES} bytes");
        return Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            "the body is too large",
            detail,
        );
    }
    Problem::new(
        StatusCode::BAD_REQUEST,
        "body",
        "the body could not be read",
        rejection.body_text(),
    )
}

fn json(body: &[u8]) -> Result<Value, Problem> {
    serde_json::from_slice(body).map_err(|error| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "json",
            "the body is not JSON",
            error.to_string(),
        )
    })
}

/// Lays the fields of an object over a default, one level deep: `{"sizes": {...}}` replaces all sizes.
fn overlay<T: Serialize + DeserializeOwned + Clone>(
    part: &str,
    default: &T,
    given: Option<Value>,
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
        whole.insert(key, value);
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
        parse(Ok(Bytes::copy_from_slice(text.as_bytes())), &default)
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
