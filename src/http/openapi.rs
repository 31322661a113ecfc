//! The OpenAPI document, generated from the routes' annotations and from the types' defaults.

use axum::Json;
use axum::response::Html;
use serde_json::{Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Schema};
use utoipa::{IntoParams, OpenApi, PartialSchema, ToSchema};

use super::query::PARAMETERS;
use super::{batch, health, problem, streams};
use crate::stream::delivery::Delivery;
use crate::stream::recipe::Recipe;

/// The body of a stream request: its example holds every field with its default.
pub(super) struct StreamRequestDocument;

impl PartialSchema for StreamRequestDocument {
    fn schema() -> RefOr<Schema> {
        let example = json!({"recipe": Recipe::default(), "delivery": Delivery::default()});
        ObjectBuilder::new()
            .description(Some(
                "a recipe (what) and a delivery (how); fields not given are the server's defaults",
            ))
            .examples([example])
            .into()
    }
}

impl ToSchema for StreamRequestDocument {
    fn name() -> std::borrow::Cow<'static, str> {
        "StreamRequest".into()
    }
}

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
        health::info,
        health::livez,
        health::readyz,
        health::metrics
    ),
    components(schemas(StreamRequestDocument, problem::Problem))
)]
struct Document;

/// Returns the OpenAPI document.
pub fn document() -> Value {
    serde_json::to_value(Document::openapi()).expect("the document is representable in JSON")
}

/// Sends the document.
pub(super) async fn json_document() -> Json<Value> {
    Json(document())
}

/// Shows the document to people, without anything from other hosts.
pub(super) async fn page() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}
