//! Errors as RFC 9457 problem documents: the one place where an error becomes a status.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::jobs::JobError;
use crate::stream::{ModelsError, StreamError};
use crate::wire::frame::{self, FrameError, Kind};
use crate::wire::proto;

/// Returns the URI of a kind of problem.
macro_rules! urn {
    ($word:literal) => {
        concat!("urn:freetumor:problem:", $word)
    };
}

/// Everything that a client may be told went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// A field that is unknown or outside its range.
    Field,
    /// A recipe that the store or the models cannot serve.
    Infeasible,
    /// Held-out cases in a model's training set (promise P7).
    Leak,
    /// A cursor of another stream.
    CursorMismatch,
    /// A cursor of models that are no longer held.
    BundleGone,
    /// A patch that could not be made.
    Failed,
    /// A batch that was not ready in time.
    Deadline,
    /// The server is shutting down.
    Stopping,
    /// No patch can be made any more.
    Lost,
    /// The server's own fault.
    Internal,
    /// A Host that is not ours.
    Host,
    /// A missing or wrong key.
    Key,
    /// A read key where an admin key is needed.
    Forbidden,
    /// A query that is no query.
    Query,
    /// A body that could not be read.
    Body,
    /// A body that is no JSON.
    Json,
    /// A body over the limit.
    BodyTooLarge,
    /// A body that took too long.
    BodyTooSlow,
    /// Too many requests are open.
    Busy,
    /// The key's work is used up.
    Budget,
    /// No such route.
    Route,
    /// No such method on the route.
    Method,
    /// Keys or certificate that could not be read again.
    Reload,
    /// Models that nobody knows, or that are not held.
    ModelsUnknown,
    /// Models that cannot be changed this way now.
    ModelsConflict,
    /// Models that cannot be loaded, or cannot serve.
    ModelsUnfit,
    /// Trainings asked of a server that hosts none.
    TrainingsOff,
    /// A training, or a file of one, that is not there.
    TrainingUnknown,
    /// A training that cannot be changed this way now.
    TrainingConflict,
    /// A training that the store or its models do not allow.
    TrainingUnfit,
}

impl ProblemKind {
    /// Every kind, for documents.
    pub const ALL: [Self; 30] = [
        Self::Field,
        Self::Infeasible,
        Self::Leak,
        Self::CursorMismatch,
        Self::BundleGone,
        Self::Failed,
        Self::Deadline,
        Self::Stopping,
        Self::Lost,
        Self::Internal,
        Self::Host,
        Self::Key,
        Self::Forbidden,
        Self::Query,
        Self::Body,
        Self::Json,
        Self::BodyTooLarge,
        Self::BodyTooSlow,
        Self::Busy,
        Self::Budget,
        Self::Route,
        Self::Method,
        Self::Reload,
        Self::ModelsUnknown,
        Self::ModelsConflict,
        Self::ModelsUnfit,
        Self::TrainingsOff,
        Self::TrainingUnknown,
        Self::TrainingConflict,
        Self::TrainingUnfit,
    ];

    /// Returns the HTTP status: the one match of kinds and statuses.
    pub fn status(self) -> StatusCode {
        use StatusCode as S;
        match self {
            Self::Field | Self::Infeasible | Self::ModelsUnfit | Self::TrainingUnfit => S::UNPROCESSABLE_ENTITY,
            // A leak is 409 like a refused cursor: the request is well formed and other models would serve it.
            Self::Leak | Self::CursorMismatch | Self::ModelsConflict => S::CONFLICT,
            Self::TrainingsOff | Self::TrainingConflict => S::CONFLICT,
            Self::BundleGone => S::GONE,
            Self::Failed | Self::Internal | Self::Reload => S::INTERNAL_SERVER_ERROR,
            Self::Deadline | Self::Stopping | Self::Lost => S::SERVICE_UNAVAILABLE,
            Self::Host => S::MISDIRECTED_REQUEST,
            Self::Key => S::UNAUTHORIZED,
            Self::Forbidden => S::FORBIDDEN,
            Self::Query | Self::Body | Self::Json => S::BAD_REQUEST,
            Self::BodyTooLarge => S::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => S::REQUEST_TIMEOUT,
            Self::Busy | Self::Budget => S::TOO_MANY_REQUESTS,
            Self::Route | Self::ModelsUnknown | Self::TrainingUnknown => S::NOT_FOUND,
            Self::Method => S::METHOD_NOT_ALLOWED,
        }
    }

    /// Returns the kind for machines, and in words.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Field => (urn!("field"), "a field of the request is unknown or outside its range"),
            Self::Infeasible => (
                urn!("infeasible"),
                "the store or the models cannot do what the recipe asks",
            ),
            Self::Leak => (urn!("leak"), "held-out cases appear in a model's training set"),
            Self::CursorMismatch => (urn!("cursor-mismatch"), "the cursor belongs to another stream"),
            Self::BundleGone => (urn!("bundle-gone"), "the cursor's models are no longer held"),
            Self::Failed => (urn!("failed"), "a patch could not be made"),
            Self::Stopping => (urn!("stopping"), "the server is shutting down"),
            Self::Deadline => (urn!("deadline"), "the batch was not ready in time"),
            Self::Lost => (urn!("lost"), "the server can make no more patches; restart it"),
            Self::Internal => (urn!("internal"), "the server failed"),
            Self::Host => (urn!("host"), "this server has another name"),
            Self::Key => (urn!("key"), "the key is missing or wrong"),
            Self::Forbidden => (urn!("forbidden"), "the key may read, and this route changes the server"),
            Self::Query => (urn!("query"), "the query could not be read"),
            Self::Body => (urn!("body"), "the body could not be read"),
            Self::Json => (urn!("json"), "the body is not JSON"),
            Self::BodyTooLarge => (urn!("body-too-large"), "the body is too large"),
            Self::BodyTooSlow => (urn!("body-too-slow"), "the body took too long"),
            Self::Busy => (urn!("busy"), "too many requests are open"),
            Self::Budget => (urn!("budget"), "the key's open streams take all of its work"),
            Self::Route => (urn!("route"), "no such route"),
            Self::Method => (urn!("method"), "no such method on this route"),
            Self::Reload => (
                urn!("reload"),
                "keys or certificate could not be read; the old ones stay",
            ),
            Self::ModelsUnknown => (urn!("models-unknown"), "there are no such models"),
            Self::ModelsConflict => (urn!("models-conflict"), "the models cannot be changed this way now"),
            Self::ModelsUnfit => (
                urn!("models-unfit"),
                "the models cannot be loaded, or cannot serve this store",
            ),
            Self::TrainingsOff => (urn!("trainings-off"), "this server hosts no trainings"),
            Self::TrainingUnknown => (
                urn!("training-unknown"),
                "there is no such training, or no such file of it",
            ),
            Self::TrainingConflict => (urn!("training-conflict"), "the training cannot be changed this way now"),
            Self::TrainingUnfit => (
                urn!("training-unfit"),
                "the store, the models or the folders do not allow this training",
            ),
        }
    }

    /// Returns the kind in words.
    pub fn title(self) -> &'static str {
        self.names().1
    }

    /// Returns the kind for machines.
    pub fn uri(self) -> &'static str {
        self.names().0
    }
}

/// An RFC 9457 problem document.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Problem {
    /// What kind of problem: `urn:freetumor:problem:` and a word.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The kind in words.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What happened.
    pub detail: String,
    /// The field of the request, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The request's id, as in `X-Request-Id` and in the server's log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Seconds after which to try again, sent as `Retry-After`.
    #[serde(skip)]
    pub retry_after_seconds: Option<u32>,
}

impl Problem {
    /// Makes a problem of a kind.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            kind: kind.uri(),
            title: kind.title(),
            status: kind.status().as_u16(),
            detail: detail.into(),
            field: None,
            request_id: None,
            retry_after_seconds: None,
        }
    }

    /// Makes the problem of a training's recipe, whose fields lie in the segmentor's section.
    fn from_training(error: StreamError) -> Self {
        let problem = Self::from(error);
        match &problem.field {
            Some(field) => {
                let field = format!("segmentor.{field}");
                problem.at(field)
            }
            None => problem,
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
        Self::new(ProblemKind::Field, detail).at(field)
    }

    /// Makes the problem of work that panicked: the log has more than the client may see.
    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(ProblemKind::Internal, detail)
    }

    /// Returns the last frame of a stream that failed this way.
    pub fn to_frame(&self) -> bytes::Bytes {
        let error = proto::Error {
            r#type: self.kind.into(),
            title: self.title.into(),
            status: self.status.into(),
            // A long detail must not be what breaks the frame.
            detail: self.detail.chars().take(10_000).collect(),
            field: self.field.clone().unwrap_or_default(),
            request_id: self.request_id.clone().unwrap_or_default(),
        };
        frame::encode(Kind::Error, &error, &[]).expect("an error frame has a bounded size")
    }
}

impl From<StreamError> for Problem {
    fn from(error: StreamError) -> Self {
        use ProblemKind as K;
        let detail = error.to_string();
        match error {
            StreamError::Recipe(recipe) => Self::field(format!("recipe.{}", recipe.field), detail),
            StreamError::Delivery { field, .. } => Self::field(format!("delivery.{field}"), detail),
            StreamError::Infeasible { field, .. } => Self::new(K::Infeasible, detail).at(format!("recipe.{field}")),
            StreamError::Leak { .. } => Self::new(K::Leak, detail).at("recipe.select.hold_out"),
            StreamError::CursorMismatch { field, .. } => {
                Self::new(K::CursorMismatch, detail).at(format!("delivery.cursor.{field}"))
            }
            StreamError::BundleGone(_) => Self::new(K::BundleGone, detail).at("delivery.cursor.bundle"),
            StreamError::Failed { .. } => Self::new(K::Failed, detail),
            StreamError::Stopped => Self::new(K::Stopping, detail).retry_after(5),
        }
    }
}

impl From<ModelsError> for Problem {
    fn from(error: ModelsError) -> Self {
        use ProblemKind as K;
        let mut detail = error.to_string();
        let kind = match &error {
            ModelsError::Unknown(_) | ModelsError::NotHeld(_) => K::ModelsUnknown,
            ModelsError::Full | ModelsError::Active(_) | ModelsError::NoPrevious => K::ModelsConflict,
            ModelsError::Start(_) | ModelsError::FailsDefaultRecipe { .. } | ModelsError::Replaced { .. } => {
                K::ModelsUnfit
            }
            ModelsError::Damaged { source, .. } => {
                detail = format!("{detail}: {source}");
                K::ModelsUnfit
            }
        };
        Self::new(kind, detail)
    }
}

impl From<JobError> for Problem {
    fn from(error: JobError) -> Self {
        use ProblemKind as K;
        let detail = error.to_string();
        let kind = match error {
            JobError::Name { .. } => return Self::field("name", detail),
            JobError::Field { field, .. } => return Self::field(field, detail),
            JobError::Stream(error) => return Self::from_training(error),
            JobError::Models(error) => return error.into(),
            JobError::Full { .. } => return Self::new(K::Busy, detail).retry_after(60),
            JobError::Stopping => return Self::new(K::Stopping, detail).retry_after(5),
            JobError::Exists(_)
            | JobError::Occupied(_)
            | JobError::ModelsExist(_)
            | JobError::State { .. }
            | JobError::TooMany { .. } => K::TrainingConflict,
            JobError::Unknown(_) => K::TrainingUnknown,
            JobError::Unfit(_) => K::TrainingUnfit,
            JobError::Checkpoint(_) | JobError::File { .. } | JobError::Io(_) => K::Internal,
        };
        Self::new(kind, detail)
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
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // The outermost layer writes the request's id into it.
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_name_of_its_own_and_an_error_status() {
        let mut uris: Vec<_> = ProblemKind::ALL.map(ProblemKind::uri).to_vec();
        uris.sort_unstable();
        uris.dedup();
        assert_eq!(uris.len(), ProblemKind::ALL.len());
        for kind in ProblemKind::ALL {
            assert!(
                kind.status().is_client_error() || kind.status().is_server_error(),
                "{kind:?}"
            );
        }
    }
}
