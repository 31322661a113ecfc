//! A training's events as server-sent events: what there was, then what comes, each with a number to go on from.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{Stream, unfold};
use serde::Deserialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::app::{App, Shared, on_thread, spawn};
use super::problem::{Problem, ProblemKind};
use super::trainings::host;
use crate::jobs::{Entry, Follower};

/// Events that may wait for a client; more stay in the journal.
const EVENTS_IN_FLIGHT: usize = 64;
/// How often a thread that waits for events looks whether its client, or the server, is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where to begin.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Since {
    /// The number of the last event that the client has.
    #[serde(default)]
    after: u64,
}

/// Follows a training: `queued`, `started`, `step` (loss, `validation_dice` where there was a validation,
/// `patches_per_second`), `note`, `stopping` where its stop was asked for, and at the end `finished`, `stopped`, `interrupted` or
/// `failed`, which closes the stream.
#[utoipa::path(get, path = "/v1/trainings/{name}/events", params(
    ("name" = String, Path, description = "the training's name"),
    ("after" = Option<u64>, Query, description = "only events after this number; `Last-Event-ID` says the same")),
    responses((status = 200, description = "server-sent events, their data JSON", content_type = "text/event-stream")))]
pub(super) async fn follow(
    State(app): State<Shared>,
    Path(name): Path<String>,
    from: Result<Query<Since>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(Since { after }) = from.map_err(|rejection| Problem::new(ProblemKind::Query, rejection.body_text()))?;
    let after = last_event(&headers)?.unwrap_or(after);
    let trainings = host(&app)?;
    let place = app.admit_follower("/v1/trainings/{name}/events")?;
    let heartbeat = Duration::from_secs(app.config.heartbeat_seconds);
    let follower = on_thread("trainings", move || Ok(trainings.follow(&name, after)?)).await?;
    let (sender, receiver) = channel(EVENTS_IN_FLIGHT);
    spawn("events", move || {
        send_events(&app, follower, &sender);
        drop(place);
    })?;
    let mut response = Sse::new(events(receiver))
        .keep_alive(KeepAlive::new().interval(heartbeat))
        .into_response();
    let unbuffered = HeaderValue::from_static("no");
    response.headers_mut().insert("x-accel-buffering", unbuffered);
    Ok(response)
}

/// Reads the number that browsers send when they connect again.
fn last_event(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(value) = headers.get("last-event-id") else {
        return Ok(None);
    };
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    let refused = || Problem::new(ProblemKind::Query, "Last-Event-ID: expected the number of an event");
    number.map(Some).ok_or_else(refused)
}

/// Hands events over until the training has ended, the client left, or the server drains.
fn send_events(app: &App, mut follower: Follower, sender: &Sender<Entry>) {
    while !sender.is_closed() {
        // What ended the training is told before the connection is closed.
        let is_draining = app.is_draining();
        match follower.next(LOOK_EVERY) {
            Ok(entries) => {
                let is_quiet = entries.is_empty();
                for entry in entries {
                    if sender.blocking_send(entry).is_err() {
                        return;
                    }
                }
                if follower.is_over() || (is_quiet && is_draining) {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "a training's events cannot be read");
                return;
            }
        }
    }
}

fn events(receiver: Receiver<Entry>) -> impl Stream<Item = Result<Event, Infallible>> {
    unfold(receiver, async |mut receiver| {
        let entry = receiver.recv().await?;
        let data = serde_json::to_string(&entry).expect("finite numbers are representable in JSON");
        let event = Event::default().id(entry.id.to_string()).event(entry.event.name());
        Some((Ok(event.data(data)), receiver))
    })
}
