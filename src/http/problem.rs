//! Errors as RFC 9457 problem documents: the one place where an error becomes a status.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::stream::StreamError;
use crate::wire::frame::{self, FrameError, Kind};
use crate::wire::proto;

/// An RFC 9457 problem document.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Problem {
    /// What kind of problem: `urn:freetumor:problem:` and a word.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened.
    pub detail: String,
    /// The field of the request, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Seconds after which to try again, sent as `Retry-After`.
    #[serde(skip)]
    pub retry_after_seconds: Option<u32>,
}

impl Problem {
    /// Makes a problem of a kind: a word for machines, a title for people.
    pub fn new(status: StatusCode, kind: &str, title: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:freetumor:problem:{kind}"),
            title: title.into(),
            status: status.as_u16(),
            detail: detail.into(),
            field: None,
            retry_after_seconds: None,
        }
    }

    /// Names the field.
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// Tells when to try again.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// Makes the problem of a request field that is unknown or outside its range.
    pub fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        Self::new(
            status,
            "field",
            "a field of the request is unknown or outside its range",
            detail,
        )
        .at(field)
    }

    /// Makes the problem of work that panicked: the log has more than the client may see.
    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the server failed",
            detail,
        )
    }

    /// Returns the last frame of a stream that failed this way.
    pub fn to_frame(&self) -> bytes::Bytes {
        let error = proto::Error {
            r#type: self.kind.clone(),
            title: self.title.clone(),
            status: self.status.into(),
            // A long detail must not be what breaks the frame.
            detail: self.detail.chars().take(10_000).collect(),
            field: self.field.clone().unwrap_or_default(),
        };
        frame::encode(Kind::Error, &error, &[]).expect("an error frame has a bounded size")
    }
}

impl From<StreamError> for Problem {
    // A refused hold-out is 409 like a refused cursor: the request is well formed and other models would serve it.
    fn from(error: StreamError) -> Self {
        let detail = error.to_string();
        let problem = |status, kind, title| Self::new(status, kind, title, detail.clone());
        match error {
            StreamError::Recipe(recipe) => Self::field(format!("recipe.{}", recipe.field), detail),
            StreamError::Delivery { field, .. } => Self::field(format!("delivery.{field}"), detail),
            StreamError::Infeasible { field, .. } => problem(
                StatusCode::UNPROCESSABLE_ENTITY,
                "infeasible",
                "the store or the models cannot do what the recipe asks",
            )
            .at(format!("recipe.{field}")),
            StreamError::Leak { .. } => problem(
                StatusCode::CONFLICT,
                "leak",
                "held-out cases appear in a model's training set",
            )
            .at("recipe.select.hold_out"),
            StreamError::CursorMismatch { field, .. } => problem(
                StatusCode::CONFLICT,
                "cursor-mismatch",
                "the cursor belongs to another stream",
            )
            .at(format!("delivery.cursor.{field}")),
            StreamError::BundleGone(_) => problem(
                StatusCode::GONE,
                "bundle-gone",
                "the cursor's models are no longer held",
            )
            .at("delivery.cursor.bundle"),
            StreamError::Failed { .. } => {
                problem(StatusCode::INTERNAL_SERVER_ERROR, "failed", "a patch could not be made")
            }
            StreamError::Stopped => problem(
                StatusCode::SERVICE_UNAVAILABLE,
                "stopping",
                "the server is shutting down",
            )
            .retry_after(5),
        }
    }
}

impl From<FrameError> for Problem {
    fn from(error: FrameError) -> Self {
        Self::internal(error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).expect("a problem is representable in JSON");
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
