//! The OpenAPI document, generated from the routes' annotations, from the types' defaults and from the kinds of problems.

use axum::Json;
use axum::response::Html;
use serde_json::{Value, json};
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::{IntoParams, OpenApi};

use super::problem::ProblemKind;
use super::query::PARAMETERS;
use super::schema::schema_of;
use super::{admin, batch, events, health, models, problem, streams, trainings};
use crate::jobs::TrainingConfig;
use crate::stream::delivery::Delivery;
use crate::stream::recipe::Recipe;

/// The query of `GET /v1/batch`.
pub(super) struct BatchParameters;

impl IntoParams for BatchParameters {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let parameter = |(name, meaning): (&str, &str)| {
            ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Query)
                .description(Some(meaning))
                .build()
        };
        PARAMETERS.map(parameter).to_vec()
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "FreeTumor",
        description = "Synthesized, filtered CT tumour patches with labels."
    ),
    paths(
        streams::open,
        streams::validate,
        batch::get,
        models::list,
        models::load,
        models::activate,
        models::roll_back,
        models::release,
        trainings::list,
        trainings::submit,
        trainings::get,
        events::follow,
        trainings::file,
        trainings::remove,
        trainings::stop,
        trainings::resume,
        trainings::promote,
        health::index,
        health::info,
        health::livez,
        health::readyz,
        health::metrics,
        json_document,
        page,
        admin::reload,
        admin::drain
    ),
    components(schemas(problem::Problem))
)]
struct Document;

/// Who may ask a route.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Anybody,
    Reader,
    Admin,
}

/// Returns who may ask a route, and what it may refuse beside what every route of its kind may.
fn rules(method: &str, path: &str) -> (Asked, &'static [ProblemKind]) {
    use ProblemKind as K;
    match path {
        "/livez" => (Asked::Anybody, &[K::Lost]),
        "/readyz" => (Asked::Anybody, &[K::Stopping]),
        "/v1/stream" => (
            Asked::Reader,
            &[
                K::Body,
                K::Json,
                K::BodyTooSlow,
                K::BodyTooLarge,
                K::Field,
                K::Infeasible,
                K::Leak,
                K::CursorMismatch,
                K::BundleGone,
                K::Busy,
                K::Budget,
                K::Internal,
                K::Stopping,
            ],
        ),
        "/v1/recipes/validate" => (
            Asked::Reader,
            &[
                K::Body,
                K::Json,
                K::BodyTooSlow,
                K::BodyTooLarge,
                K::Field,
                K::Infeasible,
                K::Leak,
                K::CursorMismatch,
                K::BundleGone,
                K::Busy,
                K::Internal,
                K::Stopping,
            ],
        ),
        "/v1/batch" => (
            Asked::Reader,
            &[
                K::Query,
                K::Field,
                K::Infeasible,
                K::Leak,
                K::Busy,
                K::Budget,
                K::Failed,
                K::Deadline,
                K::Internal,
                K::Stopping,
            ],
        ),
        "/metrics" | "/v1/info" | "/v1/models" => (Asked::Reader, &[]),
        "/v1/models/{name}/load" => (
            Asked::Admin,
            &[
                K::ModelsUnknown,
                K::ModelsConflict,
                K::ModelsUnfit,
                K::Infeasible,
                K::Internal,
            ],
        ),
        "/v1/models/{name}/activate" | "/v1/models/{name}/release" | "/v1/models/roll-back" => (
            Asked::Admin,
            &[K::ModelsUnknown, K::ModelsConflict, K::Infeasible, K::Internal],
        ),
        _ if path.starts_with("/v1/trainings") => training_rules(method, path),
        "/v1/reload" => (Asked::Admin, &[K::Reload]),
        "/v1/drain" => (Asked::Admin, &[]),
        _ => (Asked::Anybody, &[]),
    }
}

/// Returns the same of the routes of trainings.
fn training_rules(method: &str, path: &str) -> (Asked, &'static [ProblemKind]) {
    use ProblemKind as K;
    match (method, path) {
        ("get", "/v1/trainings") => (Asked::Reader, &[K::TrainingsOff, K::Internal]),
        ("get", "/v1/trainings/{name}") => (Asked::Reader, &[K::TrainingsOff, K::TrainingUnknown, K::Internal]),
        ("get", "/v1/trainings/{name}/events") => (
            Asked::Reader,
            &[K::Query, K::TrainingsOff, K::TrainingUnknown, K::Busy, K::Internal],
        ),
        ("get", _) => (
            Asked::Reader,
            &[K::TrainingsOff, K::TrainingUnknown, K::Busy, K::Internal],
        ),
        (_, "/v1/trainings") => (
            Asked::Admin,
            &[
                K::Body,
                K::Json,
                K::BodyTooSlow,
                K::BodyTooLarge,
                K::Field,
                K::Infeasible,
                K::Leak,
                K::TrainingsOff,
                K::TrainingConflict,
                K::TrainingUnfit,
                K::Busy,
                K::Internal,
                K::Stopping,
            ],
        ),
        (_, "/v1/trainings/{name}" | "/v1/trainings/{name}/stop") => (
            Asked::Admin,
            &[K::TrainingsOff, K::TrainingUnknown, K::TrainingConflict, K::Internal],
        ),
        (_, "/v1/trainings/{name}/resume") => (
            Asked::Admin,
            &[
                K::TrainingsOff,
                K::TrainingUnknown,
                K::TrainingConflict,
                K::Busy,
                K::Internal,
                K::Stopping,
            ],
        ),
        _ => (
            Asked::Admin,
            &[
                K::Field,
                K::TrainingsOff,
                K::TrainingUnknown,
                K::TrainingConflict,
                K::TrainingUnfit,
                K::Internal,
            ],
        ),
    }
}

/// Returns everything that a route may refuse with.
fn problems(method: &str, path: &str) -> Vec<ProblemKind> {
    use ProblemKind as K;
    let (asked, own) = rules(method, path);
    let mut kinds = own.to_vec();
    if !matches!(path, "/livez" | "/readyz") {
        kinds.push(K::Host);
    }
    match asked {
        Asked::Anybody => {}
        Asked::Reader => kinds.push(K::Key),
        Asked::Admin => kinds.extend([K::Key, K::Forbidden, K::Route]),
    }
    kinds
}

/// Returns the OpenAPI document.
pub fn document() -> Value {
    let mut document = serde_json::to_value(Document::openapi()).expect("the document is representable in JSON");
    let components = &mut document["components"];
    components["schemas"]["Recipe"] = schema_of::<Recipe>();
    components["schemas"]["Delivery"] = schema_of::<Delivery>();
    components["schemas"]["Segmentor"] = schema_of::<TrainingConfig>();
    components["schemas"]["Segmentor"]["properties"]["recipe"] = json!({"$ref": "#/components/schemas/Recipe"});
    components["securitySchemes"] = json!({
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    });
    let kinds = ProblemKind::ALL.map(ProblemKind::uri);
    components["schemas"]["Problem"]["properties"]["type"]["enum"] = json!(kinds);
    for (path, methods) in document["paths"].as_object_mut().into_iter().flatten() {
        for (method, route) in methods.as_object_mut().into_iter().flatten() {
            complete((method, path), route);
        }
    }
    document
}

/// Adds to a route what follows from the kind it is of: refusals, keys, the request's id, the body, the query's types.
fn complete((method, path): (&str, &str), route: &mut Value) {
    for kind in problems(method, path) {
        add_problem(&mut route["responses"], kind);
    }
    for (_, response) in route["responses"].as_object_mut().into_iter().flatten() {
        response["headers"]["X-Request-Id"] = json!({"schema": {"type": "string"},
            "description": "the request's own id, or one that the server gave it"});
    }
    let keys = json!([{"bearer": []}, {"header": []}]);
    match rules(method, path).0 {
        Asked::Anybody => {}
        // Without read keys, none is asked for.
        Asked::Reader => route["security"] = json!([{}, keys[0], keys[1]]),
        Asked::Admin => route["security"] = keys,
    }
    if matches!(path, "/v1/stream" | "/v1/recipes/validate") {
        route["requestBody"] = request_body();
    }
    if (method, path) == ("post", "/v1/trainings") {
        route["requestBody"] = training_body();
    }
    // Indexing would put a null there.
    let parameters = route.get_mut("parameters").and_then(Value::as_array_mut);
    for parameter in parameters.into_iter().flatten() {
        let name = parameter["name"].as_str().unwrap_or_default().to_owned();
        parameter["schema"] = parameter_schema(&name);
    }
}

fn add_problem(responses: &mut Value, kind: ProblemKind) {
    let response = &mut responses[kind.status().as_str()];
    let title = match response["description"].as_str() {
        Some(said) => format!("{said}; or {}", kind.title()),
        None => kind.title().to_owned(),
    };
    response["description"] = title.into();
    response["content"] = json!({"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}});
    if matches!(kind.status().as_u16(), 429 | 503) {
        response["headers"]["Retry-After"] = json!({"schema": {"type": "integer"},
            "description": "seconds after which to try again"});
    }
}

/// The body of a stream request: its example holds every field with its default.
fn request_body() -> Value {
    json!({
        "required": false,
        "description": "a recipe (what) and a delivery (how); fields not given are the server's defaults",
        "content": {"application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "recipe": {"$ref": "#/components/schemas/Recipe"},
                    "delivery": {"$ref": "#/components/schemas/Delivery"},
                },
                "additionalProperties": false,
            },
            "example": {"recipe": Recipe::default(), "delivery": Delivery::default()},
        }},
    })
}

/// The body of a training's submission.
fn training_body() -> Value {
    json!({
        "required": true,
        "description": "a name, and what differs from the server's segmentor",
        "content": {"application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,63}$"},
                    "segmentor": {"$ref": "#/components/schemas/Segmentor"},
                },
                "required": ["name"],
                "additionalProperties": false,
            },
            "example": {"name": "liver-1", "segmentor": {"steps": 2000, "validation": {"every": 200}}},
        }},
    })
}

/// Returns the type of a parameter, those of `GET /v1/batch` above all; lists are texts with commas.
fn parameter_schema(name: &str) -> Value {
    let (recipe, delivery) = (schema_of::<Recipe>(), schema_of::<Delivery>());
    let named = |schema: &Value| {
        let names = schema["enum"].as_array().into_iter().flatten();
        let names: Vec<&Value> = names.filter(|name| !name.is_null()).collect();
        json!({"type": "string", "enum": names})
    };
    match name {
        "index" | "seed" | "after" => json!({"type": "integer", "minimum": 0}),
        "batch_size" => json!({"type": "integer", "minimum": 1}),
        "format" => json!({"type": "string", "enum": ["npz", "safetensors"]}),
        "gate" | "augment" => json!({"type": "string", "enum": ["on", "off"]}),
        "image" => named(&delivery["properties"]["image"]),
        "synthesizer" | "fallback" | "unlabelled_negatives" => named(&recipe["properties"][name]),
        _ => json!({"type": "string"}),
    }
}

/// Sends this document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "this document",
    content_type = "application/json")))]
pub(super) async fn json_document() -> Json<Value> {
    Json(document())
}

/// Shows this document to people, without anything from other hosts.
#[utoipa::path(get, path = "/docs", responses((status = 200, description = "this document for people",
    content_type = "text/html")))]
pub(super) async fn page() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_says_what_it_may_refuse() {
        let document = document();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, route) in methods.as_object().unwrap() {
                let responses = route["responses"].as_object().unwrap();
                let refused = |status: &str| responses.contains_key(status);
                let is_probe = matches!(path.as_str(), "/livez" | "/readyz");
                assert_eq!(refused("421"), !is_probe, "{method} {path}");
                assert!(
                    route.as_object().unwrap().values().all(|part| !part.is_null()),
                    "{path}"
                );
                let is_keyed = route.get("security").is_some();
                assert_eq!(refused("401"), is_keyed, "{method} {path}");
            }
        }
        let stream = &document["paths"]["/v1/stream"]["post"]["responses"];
        let statuses: Vec<&str> = stream.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = [
            "200", "400", "401", "408", "409", "410", "413", "421", "422", "429", "500", "503",
        ];
        assert_eq!(statuses, expected);
        assert!(stream["429"]["headers"]["Retry-After"].is_object());
    }
}
