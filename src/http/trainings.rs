//! `/v1/trainings`: hosted trainings, their events and files; for admins: start, stop, resume, remove, promote.

use std::io::Read;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{Stream, unfold};
use serde::Serialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::app::{App, Shared, on_thread, spawn};
use super::body::{self, WholeBody};
use super::problem::{Problem, ProblemKind};
use crate::jobs::{JobRecord, JobStatus, Promoted, TrainingHost};
use crate::stream::StreamError;

/// How a file is read and sent.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that may wait for a client.
const CHUNKS_IN_FLIGHT: usize = 2;

/// Every training of this server.
#[derive(Serialize)]
pub(super) struct Trainings {
    trainings: Vec<JobStatus>,
}

/// A training, and what it is.
#[derive(Serialize)]
pub(super) struct Training {
    #[serde(flatten)]
    status: JobStatus,
    /// What it was submitted as, complete.
    job: JobRecord,
}

/// Returns what hosts trainings, where this server does.
pub(super) fn host(app: &App) -> Result<Arc<TrainingHost>, Problem> {
    let none = || {
        let detail = "this server hosts no trainings; start one with --jobs-dir";
        Problem::new(ProblemKind::TrainingsOff, detail)
    };
    app.trainings.clone().ok_or_else(none)
}

/// Works with the host on a thread: it looks at files.
async fn with_host<T: Send + 'static>(
    app: Shared,
    work: impl FnOnce(&App, &TrainingHost) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    on_thread("trainings", move || work(&app, &*host(&app)?)).await
}

/// Lists the trainings that are queued, run, or ended, by name.
#[utoipa::path(get, path = "/v1/trainings", responses((status = 200, description = "names, states, steps and last \
    measures", content_type = "application/json")))]
pub(super) async fn list(State(app): State<Shared>) -> Result<Json<Trainings>, Problem> {
    let trainings = with_host(app, |_, host| Ok(host.list())).await?;
    Ok(Json(Trainings { trainings }))
}

/// Takes a training of the segmentor on this server's stream; it begins when those before it have ended.
#[utoipa::path(post, path = "/v1/trainings", responses((status = 201, description = "it is queued",
    content_type = "application/json")))]
pub(super) async fn submit(State(app): State<Shared>, WholeBody(body): WholeBody) -> Result<Response, Problem> {
    let status = with_host(app, move |app, host| {
        refuse_while_draining(app)?;
        let (name, config) = body::parse_training(&body, host.defaults())?;
        Ok(host.submit(name, config)?)
    })
    .await?;
    let location = format!("/v1/trainings/{}", status.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(status)).into_response())
}

/// Tells what a training is and how it stands.
#[utoipa::path(get, path = "/v1/trainings/{name}", params(("name" = String, Path, description = "the training's name")),
    responses((status = 200, description = "state, steps, last measures and complete configuration",
    content_type = "application/json")))]
pub(super) async fn get(State(app): State<Shared>, Path(name): Path<String>) -> Result<Json<Training>, Problem> {
    let (job, status) = with_host(app, move |_, host| Ok(host.get(&name)?)).await?;
    let job = Arc::unwrap_or_clone(job);
    Ok(Json(Training { status, job }))
}

/// Stops a training; one that runs saves a checkpoint first.
#[utoipa::path(post, path = "/v1/trainings/{name}/stop",
    params(("name" = String, Path, description = "the training's name")),
    responses((status = 202, description = "it stops", content_type = "application/json")))]
pub(super) async fn stop(State(app): State<Shared>, Path(name): Path<String>) -> Result<Response, Problem> {
    change(app, move |host| Ok(host.stop(&name)?)).await
}

/// Lets a training that was stopped, or failed, go on from its last checkpoint.
#[utoipa::path(post, path = "/v1/trainings/{name}/resume",
    params(("name" = String, Path, description = "the training's name")),
    responses((status = 202, description = "it is queued", content_type = "application/json")))]
pub(super) async fn resume(State(app): State<Shared>, Path(name): Path<String>) -> Result<Response, Problem> {
    let resumed = change(app.clone(), move |host| {
        refuse_while_draining(&app)?;
        Ok(host.resume(&name)?)
    });
    resumed.await
}

/// From the first sign of a shutdown on nothing is queued, also while the host of trainings has not heard of it.
fn refuse_while_draining(app: &App) -> Result<(), Problem> {
    if app.is_draining() {
        return Err(StreamError::Stopped.into());
    }
    Ok(())
}

async fn change(
    app: Shared,
    work: impl FnOnce(&TrainingHost) -> Result<JobStatus, Problem> + Send + 'static,
) -> Result<Response, Problem> {
    let status = with_host(app, move |_, host| work(host)).await?;
    Ok((StatusCode::ACCEPTED, Json(status)).into_response())
}

/// Removes a training that is neither queued nor running, with all of its files.
#[utoipa::path(delete, path = "/v1/trainings/{name}",
    params(("name" = String, Path, description = "the training's name")),
    responses((status = 204, description = "it is gone")))]
pub(super) async fn remove(State(app): State<Shared>, Path(name): Path<String>) -> Result<StatusCode, Problem> {
    with_host(app, move |_, host| Ok(host.remove(&name)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes models of a finished training: its segmentor as critic, calibrated on held-out lesions, beside the generator and
/// discriminator it learnt from. Load and activate them like others.
#[utoipa::path(post, path = "/v1/trainings/{name}/promote/{models}", params(
    ("name" = String, Path, description = "the training's name"),
    ("models" = String, Path, description = "the new models' name")),
    responses((status = 201, description = "the models can be loaded", content_type = "application/json")))]
pub(super) async fn promote(
    State(app): State<Shared>,
    Path((name, models)): Path<(String, String)>,
) -> Result<(StatusCode, Json<Promoted>), Problem> {
    let promoted = with_host(app, move |_, host| Ok(host.promote(&name, &models.parse()?)?)).await?;
    Ok((StatusCode::CREATED, Json(promoted)))
}

/// Sends one of a training's files: `segmentor.safetensors` (weights), `segmentor.json` (manifest), `segmentor.report.json`,
/// `segmentor.metrics.jsonl`, `segmentor.mixes.jsonl` (of a steered one), `segmentor.state.safetensors` (last checkpoint).
#[utoipa::path(get, path = "/v1/trainings/{name}/files/{file}", params(
    ("name" = String, Path, description = "the training's name"),
    ("file" = String, Path, description = "the file's name")),
    responses((status = 200, description = "the file", content_type = "application/octet-stream")))]
pub(super) async fn file(
    State(app): State<Shared>,
    Path((name, file)): Path<(String, String)>,
) -> Result<Response, Problem> {
    host(&app)?;
    let place = app.admit_follower("/v1/trainings/{name}/files/{file}")?;
    let (open, bytes) = with_host(app, move |_, host| {
        let opened = fs_err::File::open(host.file(&name, &file)?).and_then(|open| {
            let bytes = open.metadata()?.len();
            Ok((open, bytes))
        });
        opened.map_err(|error| Problem::internal(error.to_string()))
    })
    .await?;
    let (sender, receiver) = channel(CHUNKS_IN_FLIGHT);
    spawn("download", move || {
        send_file(open.take(bytes), &sender);
        drop(place);
    })?;
    let headers: [(HeaderName, String); 3] = [
        (header::CONTENT_TYPE, "application/octet-stream".into()),
        (header::CONTENT_LENGTH, bytes.to_string()),
        (header::CACHE_CONTROL, "no-store, no-transform".into()),
    ];
    Ok((headers, Body::from_stream(chunks(receiver))).into_response())
}

/// Reads a file's chunks until its end, an error, or a client that left.
fn send_file(mut file: impl Read, sender: &Sender<std::io::Result<Bytes>>) {
    loop {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        let read = file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk);
        let item = match read {
            Ok(0) => return,
            Ok(_) => Ok(Bytes::from(chunk)),
            Err(error) => Err(error),
        };
        let is_last = item.is_err();
        if sender.blocking_send(item).is_err() || is_last {
            return;
        }
    }
}

fn chunks<T>(receiver: Receiver<T>) -> impl Stream<Item = T> {
    unfold(receiver, async |mut receiver| {
        receiver.recv().await.map(|item| (item, receiver))
    })
}
