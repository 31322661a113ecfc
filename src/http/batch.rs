//! `GET /v1/batch`: one batch as a file, the same bytes for the same request.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{Stream, unfold};
use metrics::counter;

use super::app::{App, Shared, on_thread};
use super::budget::{Share, batch_voxels};
use super::keys::Caller;
use super::problem::{Problem, ProblemKind};
use super::provenance;
use super::query::{self, BatchQuery, Format};
use crate::stream::{Leave, PatchService, StreamError, check_delivery, count_patches};
use crate::telemetry::metrics::{PATCHES_REUSED_TOTAL, Stage};
use crate::wire::codec::{Encoding, tensors};
use crate::wire::{limits, npz, safetensors};

/// Bytes of an answer that are handed on at a time.
const PIECE_BYTES: usize = 1 << 20;

type Pairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// Sends one batch as npz or safetensors: arrays image, label and the optional outputs, and `meta` as JSON.
#[utoipa::path(
    get,
    path = "/v1/batch",
    params(super::openapi::BatchParameters),
    responses(
        (status = 200, description = "an npz archive or a safetensors file", content_type = "application/octet-stream"),
    )
)]
pub(super) async fn get(
    State(app): State<Shared>,
    Extension(caller): Extension<Caller>,
    pairs: Pairs,
) -> Result<Response, Problem> {
    let Query(pairs) = pairs.map_err(|rejection| Problem::new(ProblemKind::Query, rejection.body_text()))?;
    let query = query::parse(pairs, &app.default_recipe)?;
    let deadline = deadline(&query, app.config.batch_seconds)?;
    let permit = app.admit_batch()?;
    let answer = app.admit_answer()?;
    let (format, index) = (query.format, query.delivery.from);
    let retry_after_seconds = app.config.retry_after_seconds;
    // Dropped with this future where the client leaves before its answer, or its time is over.
    let waiting = Waiting::default();
    let client = waiting.0.clone();
    let making = on_thread("batch", move || {
        let _permit = permit;
        make(&app, caller, query, &client)
    });
    let made = tokio::time::timeout(deadline, making).await;
    let (bytes, share) = made.map_err(|_| {
        let detail = format!("the batch was not ready within {} s", deadline.as_secs());
        Problem::new(ProblemKind::Deadline, detail).retry_after(retry_after_seconds)
    })??;
    drop(waiting);
    let length = bytes.len();
    // Whoever does not take its answer holds its place and its part of the budget, not the place of those at work.
    let body = Body::from_stream(in_pieces(bytes.into(), (answer, share)));
    let extension = match format {
        Format::Npz => "npz",
        Format::Safetensors => "safetensors",
    };
    let headers: [(HeaderName, String); 4] = [
        (header::CONTENT_TYPE, "application/octet-stream".into()),
        (header::CONTENT_LENGTH, length.to_string()),
        (header::CACHE_CONTROL, "no-store, no-transform".into()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"batch-{index}.{extension}\""),
        ),
    ];
    Ok((headers, body).into_response())
}

/// Returns how long a batch may take: as long as the client waits for it, and no longer than the server allows.
fn deadline(query: &BatchQuery, most: u64) -> Result<Duration, Problem> {
    let asked = query.deadline_seconds.unwrap_or(most);
    if (1..=most).contains(&asked) {
        return Ok(Duration::from_secs(asked));
    }
    let detail = format!("query field deadline_seconds: expected 1 to {most}, got {asked}");
    Err(Problem::field("deadline_seconds", detail))
}

/// Sends bytes piece by piece, so that what is held for them is held until the last piece was asked for.
fn in_pieces<H: Send + 'static>(bytes: Bytes, held: H) -> impl Stream<Item = io::Result<Bytes>> {
    unfold((bytes, held), async |(mut bytes, held)| {
        let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
        (!piece.is_empty()).then_some((Ok(piece), (bytes, held)))
    })
}

/// The client that waits for a batch.
#[derive(Default)]
struct Waiting(Arc<Client>);

/// What a client that leaves tells whoever makes its batch.
#[derive(Default)]
struct Client {
    has_left: AtomicBool,
    /// What ends its stream, once there is one.
    leave: OnceLock<Leave>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.has_left.store(true, Ordering::SeqCst);
        if let Some(leave) = self.0.leave.get() {
            leave.now();
        }
    }
}

fn make(app: &App, caller: Caller, query: BatchQuery, client: &Client) -> Result<(Vec<u8>, Share), Problem> {
    let service: &dyn PatchService = &*app.service;
    let resolved = service.resolve(query.recipe).map_err(StreamError::of_recipe)?;
    check_delivery(&resolved, &query.delivery)?;
    limits::check_frame(&query.delivery, resolved.patch)?;
    let share = app.take_budget(caller, batch_voxels(&resolved, &query.delivery))?;
    let mut stream = service.open(&resolved, &query.delivery)?;
    client.leave.get_or_init(|| stream.leave());
    if client.has_left.load(Ordering::SeqCst) {
        // It left before there was anything to end; nobody reads the answer.
        return Err(StreamError::Stopped.into());
    }
    let batch = stream
        .next_batch()
        .ok_or_else(|| Problem::field("index", "query field index: the stream holds no batch there"))??;
    let encoding = Encoding::of(&query.delivery, service.plan().window_hu);
    let bytes = Stage::Encode.time(|| {
        let arrays = tensors(&batch.patches, &encoding)?;
        let meta = provenance::batch_json(service, &resolved, &batch.patches, batch.next.next_index);
        match query.format {
            Format::Npz => npz::write(&arrays, &meta).map_err(|error| Problem::internal(error.to_string())),
            Format::Safetensors => {
                safetensors::write(&arrays, meta).map_err(|error| Problem::internal(error.to_string()))
            }
        }
    })?;
    if client.has_left.load(Ordering::SeqCst) {
        return Err(StreamError::Stopped.into());
    }
    count_patches(batch.patches.iter().map(|patch| &patch.meta));
    counter!(PATCHES_REUSED_TOTAL).increment(batch.reused.len() as u64);
    Ok((bytes, share))
}
