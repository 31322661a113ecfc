//! `/v1/models`: which models are held, and for admins: load beside the live ones, activate, roll back, release.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Serialize;

use super::app::{App, Shared, on_thread};
use super::problem::{Problem, ProblemKind};
use crate::jobs::{JobName, JobState, TrainingHost};
use crate::stream::{ModelEntry, Shelf};

/// The models of this server.
#[derive(Serialize)]
pub(super) struct Models {
    models: Vec<ModelEntry>,
    /// What finished trainings made: they stream nothing, but can be downloaded, or promoted to critics.
    segmentors: Vec<Segmentor>,
}

/// What a finished training made.
#[derive(Serialize)]
struct Segmentor {
    /// The training's name.
    name: JobName,
    /// Steps that it was trained for.
    steps: u64,
    /// Its last mean Dice on held-out cases during training, where there was a validation.
    validation_dice: Option<f64>,
    /// Where its weights lie.
    weights: String,
}

impl Segmentor {
    /// Returns what finished trainings made, by name.
    fn all(trainings: &TrainingHost) -> Vec<Self> {
        let jobs = trainings.list().into_iter();
        jobs.filter(|job| job.state == JobState::Finished)
            .map(|job| Self {
                weights: format!("/v1/trainings/{}/files/segmentor.safetensors", job.name),
                name: job.name,
                steps: job.step,
                validation_dice: job.validation_dice,
            })
            .collect()
    }
}

/// Lists the models that are active, held beside them, or could be loaded, and the segmentors of finished trainings.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, description = "names, states, hashes, and what they \
    did when they were loaded", content_type = "application/json")))]
pub(super) async fn list(State(app): State<Shared>) -> Result<Json<Models>, Problem> {
    // It looks at a folder, which may be far away.
    let models = on_thread("models", move || {
        Ok(Models {
            models: app.service.shelf().map(Shelf::list).unwrap_or_default(),
            segmentors: app.trainings.as_deref().map(Segmentor::all).unwrap_or_default(),
        })
    });
    Ok(Json(models.await?))
}

/// Loads models beside the active ones and tries them on the default recipe; nothing changes for anybody else.
#[utoipa::path(post, path = "/v1/models/{name}/load", params(("name" = String, Path, description = "the models' name")),
    responses((status = 200, description = "they are held", content_type = "application/json")))]
pub(super) async fn load(State(app): State<Shared>, Path(name): Path<String>) -> Result<Json<ModelEntry>, Problem> {
    change(app, move |shelf| Ok(shelf.load(&name)?)).await
}

/// Lets requests that name no models get these from now on; open streams keep theirs.
#[utoipa::path(post, path = "/v1/models/{name}/activate",
    params(("name" = String, Path, description = "the models' name")),
    responses((status = 200, description = "they are active", content_type = "application/json")))]
pub(super) async fn activate(State(app): State<Shared>, Path(name): Path<String>) -> Result<Json<ModelEntry>, Problem> {
    change(app, move |shelf| Ok(shelf.activate(&name)?)).await
}

/// Activates the models that were active before.
#[utoipa::path(post, path = "/v1/models/roll-back", responses((status = 200, description = "they are active",
    content_type = "application/json")))]
pub(super) async fn roll_back(State(app): State<Shared>) -> Result<Json<ModelEntry>, Problem> {
    change(app, |shelf| Ok(shelf.roll_back()?)).await
}

/// Forgets models that are not active: recipes and cursors that name them are refused from now on.
#[utoipa::path(post, path = "/v1/models/{name}/release",
    params(("name" = String, Path, description = "the models' name")),
    responses((status = 204, description = "they are no longer held")))]
pub(super) async fn release(State(app): State<Shared>, Path(name): Path<String>) -> Result<StatusCode, Problem> {
    on_thread("models", move || Ok(shelf(&app)?.release(&name)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn shelf(app: &App) -> Result<&Shelf, Problem> {
    let none = || Problem::new(ProblemKind::ModelsUnknown, "this server holds one bundle only");
    app.service.shelf().ok_or_else(none)
}

/// Changes the shelf on a thread, and takes note of what the default recipe comes to afterwards.
async fn change(
    app: Shared,
    work: impl FnOnce(&Shelf) -> Result<ModelEntry, Problem> + Send + 'static,
) -> Result<Json<ModelEntry>, Problem> {
    let entry = on_thread("models", move || {
        let entry = work(shelf(&app)?)?;
        app.renew_default()?;
        Ok(entry)
    })
    .await?;
    Ok(Json(entry))
}
