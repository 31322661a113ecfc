//! `POST /v1/stream` and `POST /v1/recipes/validate`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::vec;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::stream::{Stream, unfold};
use metrics::gauge;
use serde::Serialize;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;

use super::app::{App, Shared, on_thread, spawn};
use super::body::{self, StreamRequest, WholeBody};
use super::budget::{Share, batch_voxels};
use super::keys::Caller;
use super::observe::RequestId;
use super::problem::Problem;
use super::producer::{Item, Producer};
use super::settings::FRAMES_IN_FLIGHT;
use crate::digest::Digest;
use crate::stream::delivery::{Codec, Delivery};
use crate::stream::recipe::Recipe;
use crate::stream::{Leave, Resolved, check_delivery};
use crate::telemetry::metrics::STREAMS_OPEN;
use crate::volume::{HuWindow, Shape};
use crate::wire::codec::Encoding;
use crate::wire::frame::Parts;
use crate::wire::header::heartbeat_frame;
use crate::wire::{MEDIA_TYPE, limits};

/// Streams patches as frames until the epoch, the count, a shutdown or a failure ends it.
#[utoipa::path(
    post,
    path = "/v1/stream",
    responses(
        (status = 200, description = "frames, see docs/wire.md", content_type = "application/vnd.freetumor.stream"),
    )
)]
pub(super) async fn open(
    State(app): State<Shared>,
    Extension(caller): Extension<Caller>,
    Extension(id): Extension<RequestId>,
    WholeBody(body): WholeBody,
) -> Result<Response, Problem> {
    let request = body::parse(&body, &app.default_recipe)?;
    let slot = Slot::new(app.admit_stream()?);
    let (frames, receiver) = channel(FRAMES_IN_FLIGHT);
    let (opened, is_open) = oneshot::channel();
    static STREAM: AtomicU64 = AtomicU64::new(0);
    let name = format!("stream-{}", STREAM.fetch_add(1, Ordering::Relaxed));
    let heartbeat = Duration::from_secs(app.config.heartbeat_seconds);
    let thread_slot = slot.clone();
    spawn(&name, move || {
        match produce(&app, caller, request) {
            Ok((producer, share)) => {
                if opened.send(Ok(producer.leave())).is_ok() {
                    producer.run(&frames, &id);
                }
                drop(share);
            }
            // A client that left before its refusal is not an error.
            Err(problem) => drop(opened.send(Err(problem))),
        }
        drop(thread_slot);
    })?;
    let leave = is_open
        .await
        .unwrap_or_else(|_| Err(Problem::internal("the stream's thread panicked; the log says why")))?;
    let connection = Connection {
        receiver,
        heartbeat,
        last: Instant::now(),
        payload: Vec::new().into_iter(),
        is_done: false,
        leave,
        _slot: slot,
    };
    let mut response = Body::from_stream(frames_of(connection)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-store, no-transform"),
    );
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Opens the service's stream, within the caller's budget.
fn produce(app: &App, caller: Caller, request: StreamRequest) -> Result<(Producer, Share), Problem> {
    let age = app.config.max_stream_age_seconds.map(Duration::from_secs);
    let ends_at = age.map(|age| Instant::now() + age);
    let StreamRequest { recipe, delivery } = request;
    let resolved = resolve(app, recipe, &delivery)?;
    let share = app.take_budget(caller, batch_voxels(&resolved, &delivery))?;
    let producer = Producer::open(app, &resolved, &delivery, ends_at)?;
    Ok((producer, share))
}

/// Resolves a recipe, with the models of the cursor where there is one, and checks what a stream of it may ask for.
fn resolve(app: &App, mut recipe: Recipe, delivery: &Delivery) -> Result<Arc<Resolved>, Problem> {
    let names_models = recipe.bundle.is_some();
    name_models(app, &mut recipe, delivery);
    let resolved = app.service.resolve(recipe);
    let resolved = resolved.map_err(|error| if names_models { error.of_recipe() } else { error })?;
    check_delivery(&resolved, delivery)?;
    limits::check_frame(delivery, resolved.patch)?;
    Ok(resolved)
}

/// A cursor goes on with the models that it was made with, whichever are active now.
fn name_models(app: &App, recipe: &mut Recipe, delivery: &Delivery) {
    let bundle = delivery.cursor.as_ref().map(|cursor| cursor.bundle);
    let named = bundle.filter(|bundle| *bundle != Digest::default() && app.service.shelf().is_some());
    if let (Some(bundle), None) = (named, &recipe.bundle) {
        recipe.bundle = Some(bundle.to_string());
    }
}

/// A place among the open streams, held by the stream's thread and by its connection until both are done.
#[derive(Clone)]
struct Slot {
    _place: Arc<Place>,
}

struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        gauge!(STREAMS_OPEN).increment(1);
        Self {
            _place: Arc::new(Place { _permit: permit }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        gauge!(STREAMS_OPEN).decrement(1);
    }
}

/// Where a connection stands.
struct Connection {
    receiver: Receiver<Item>,
    heartbeat: Duration,
    last: Instant,
    /// What is still to follow the head that was sent last.
    payload: vec::IntoIter<Bytes>,
    is_done: bool,
    leave: Leave,
    _slot: Slot,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A client that left costs no more work, also where the stream waits for its next batch, which finds the frames closed.
        self.receiver.close();
        self.leave.now();
    }
}

/// Returns the frames of a stream, with heartbeats while none is ready.
fn frames_of(connection: Connection) -> impl Stream<Item = io::Result<Bytes>> {
    unfold(connection, async |mut connection| {
        if let Some(piece) = connection.payload.next() {
            return Some((Ok(piece), connection));
        }
        if connection.is_done {
            return None;
        }
        let bytes = match timeout(connection.heartbeat, connection.receiver.recv()).await {
            Ok(Some(Item::Frame(Parts { head, payload }))) => {
                connection.last = Instant::now();
                connection.payload = payload.into_iter();
                Ok(head)
            }
            Ok(Some(Item::Last(bytes))) => {
                connection.is_done = true;
                Ok(bytes)
            }
            Ok(None) => {
                // The thread panicked: abort the connection, so that nobody takes it for an end.
                connection.is_done = true;
                Err(io::Error::other("the stream's thread panicked"))
            }
            Err(_) => {
                let waiting = u32::try_from(connection.last.elapsed().as_secs()).unwrap_or(u32::MAX);
                Ok(heartbeat_frame(waiting))
            }
        };
        Some((bytes, connection))
    })
}

/// What a recipe comes to on this server.
#[derive(Serialize)]
struct Validated {
    #[serde(flatten)]
    resolved: Resolved,
    /// Payload of one batch in bytes, before compression.
    batch_bytes: u64,
    /// Bytes that the server holds for one such stream at most, beside the patches of its window: the batch that is encoded, its
    /// frame, those that wait for the client and the one that it is sent.
    stream_bytes: u64,
    /// What one such stream takes of its key's `server.max_voxels_per_key`.
    batch_voxels: u64,
}

/// Bytes of a patch for each voxel: image, source, label, two masks, and what is known of voxels that are sent as 255.
const PATCH_BYTES: u64 = 8;

/// Returns what one stream holds at most, beside the patches of its window.
fn stream_bytes(delivery: &Delivery, patch: Shape, batch_bytes: u64) -> u64 {
    let frames = batch_bytes.saturating_mul(FRAMES_IN_FLIGHT as u64 + 2);
    // Tensors are whole before they are compressed.
    let uncompressed = if delivery.codec == Codec::Raw { 0 } else { batch_bytes };
    let voxels = (patch.iter()).fold(u64::from(delivery.batch_size), |n, side| n.saturating_mul(*side as u64));
    frames
        .saturating_add(uncompressed)
        .saturating_add(voxels.saturating_mul(PATCH_BYTES))
}

/// Checks a recipe and a delivery without streaming: canonical form, hash, epoch, feasible cases, memory.
#[utoipa::path(
    post,
    path = "/v1/recipes/validate",
    responses(
        (status = 200, description = "the resolved recipe with its hash, epoch length, feasible cases by pool and \
            organ, shortfall and memory", content_type = "application/json"),
    )
)]
pub(super) async fn validate(State(app): State<Shared>, WholeBody(body): WholeBody) -> Result<Response, Problem> {
    let StreamRequest { recipe, delivery } = body::parse(&body, &app.default_recipe)?;
    let permit = app.admit_batch()?;
    let validated = on_thread("validate", move || {
        let _permit = permit;
        let resolved = resolve(&app, recipe, &delivery)?;
        let encoding = Encoding::of(&delivery, HuWindow::default());
        let batch_bytes = limits::batch_bytes(delivery.batch_size, resolved.patch, &encoding);
        let stream_bytes = stream_bytes(&delivery, resolved.patch, batch_bytes);
        Ok(Validated {
            batch_voxels: batch_voxels(&resolved, &delivery),
            resolved: Arc::unwrap_or_clone(resolved),
            batch_bytes,
            stream_bytes,
        })
    })
    .await?;
    Ok(Json(validated).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::delivery::ImageType;

    #[test]
    fn a_stream_holds_four_frames_a_batch_and_what_is_compressed() {
        let delivery = Delivery {
            batch_size: 2,
            image: ImageType::F16,
            ..Delivery::default()
        };
        let zstd = Delivery {
            codec: Codec::Zstd,
            ..delivery.clone()
        };
        let (voxels, frame) = (2 * 96 * 96 * 96, 3 * 2 * 96 * 96 * 96);
        assert_eq!(stream_bytes(&delivery, [96; 3], frame), 4 * frame + 8 * voxels);
        assert_eq!(stream_bytes(&zstd, [96; 3], frame), 5 * frame + 8 * voxels);
    }
}
