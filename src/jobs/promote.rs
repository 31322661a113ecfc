//! A finished job's segmentor as the critic of new models, beside the generator that it learnt from.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use serde::Serialize;

use super::run::hold_models;
use super::{JobError, JobName, JobRecord, JobState, TrainingHost};
use crate::checkpoint::{Bundle, Calibration, Role, load_manifest};
use crate::digest::Digest;
use crate::learn::{Promotion, promote_segmentor};
use crate::nn::CubeSides;

/// What the folder of a promotion is called until it is complete.
const PROMOTING: &str = ".promoting-";

/// A promotion takes minutes: what is older has nobody who completes it.
const FORGET_AFTER: Duration = Duration::from_secs(86_400);

/// Where models lie.
#[derive(Clone, Debug, Default)]
pub struct ModelFolders {
    /// The folder of folders that models are loaded from by name.
    pub root: Option<PathBuf>,
    /// Name and folder of the models that the server started with.
    pub first: Option<(String, PathBuf)>,
}

/// What a promotion made.
#[derive(Clone, Debug, Serialize)]
pub struct Promoted {
    /// The name under which the models can be loaded.
    pub models: JobName,
    /// Their hash.
    pub bundle: Digest,
    /// What they hold.
    pub roles: BTreeSet<Role>,
    /// The gate's thresholds, from real lesions that the segmentor never saw.
    pub calibration: Calibration,
}

impl ModelFolders {
    /// Returns the folder of models that were listed under a name.
    fn find(&self, name: &str) -> Option<PathBuf> {
        let first = self.first.as_ref().filter(|(known, _)| known == name);
        let first = first.map(|(_, folder)| folder.clone());
        first.or_else(|| Some(self.root.as_ref()?.join(name)))
    }

    /// Removes what promotions left that were cut off; not what another server may still be making in the same folder. What cannot be removed
    /// stays, as in a folder that may only be read: it is not listed, and no reason not to start.
    pub(super) fn forget_unfinished(&self) {
        let entries = self.root.as_ref().and_then(|root| fs_err::read_dir(root).ok());
        let is_old = |entry: &fs_err::DirEntry| {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > FORGET_AFTER))
        };
        for entry in entries.into_iter().flatten().flatten() {
            let is_one = entry.file_name().to_string_lossy().starts_with(PROMOTING);
            if is_one
                && is_old(&entry)
                && let Err(error) = fs_err::remove_dir_all(entry.path())
            {
                tracing::warn!(%error, "what a promotion left cannot be removed");
            }
        }
    }
}

impl TrainingHost {
    /// Makes models of a finished job: its segmentor as the critic, calibrated on the lesions it never saw, and the
    /// generator and discriminator of the models that gated its stream. They are not loaded.
    ///
    /// # Errors
    /// [`JobError`] says what is missing: a finished job, a folder of models, a name that is free, held-out tumours.
    pub fn promote(&self, job: &str, models: &JobName) -> Result<Promoted, JobError> {
        let (record, status) = self.get(job)?;
        if status.state != JobState::Finished {
            let (name, state) = (status.name, status.state);
            let what = "only one that is finished can be promoted";
            return Err(JobError::State { name, state, what });
        }
        let parts = self.parts();
        let Some(root) = &parts.models.root else {
            return Err(JobError::Unfit(
                "the server has no folder of models; start it with --models-root".into(),
            ));
        };
        let target = root.join(models.as_str());
        let _one = self.promoting.lock().unwrap_or_else(PoisonError::into_inner);
        if target.exists() {
            return Err(JobError::ModelsExist(models.clone()));
        }
        let source = self.painters_of(&record)?;
        // The recipe that says which cases it never saw names them.
        hold_models(&record, parts)?;
        // A name that starts with a dot is not listed.
        let folder = tempfile::Builder::new().prefix(PROMOTING).tempdir_in(root)?;
        let (roles, cubes) = match &source {
            Some(source) => copy_painters(source, folder.path())?,
            None => (BTreeSet::from([Role::Critic]), CubeSides::default()),
        };
        let promotion = Promotion {
            config: &record.config,
            service: &*parts.service,
            cases: &*parts.cases,
            cubes,
            device: &parts.device,
            dtype: parts.dtype,
        };
        let calibration = promote_segmentor(&promotion, &self.folder(&record.name), folder.path())?;
        // What cannot be loaded is not offered.
        let bundle = Bundle::load(folder.path(), &parts.device)?.hash;
        fs_err::rename(folder.path(), &target)?;
        fs_err::File::open(root)?.sync_all()?;
        tracing::info!(job = %record.name, %models, %bundle, "a segmentor was promoted");
        Ok(Promoted {
            models: models.clone(),
            bundle,
            roles,
            calibration,
        })
    }
}

impl TrainingHost {
    /// Returns the folder of the models that gated a job's stream, if it needed any; another one under their name is refused.
    fn painters_of(&self, record: &JobRecord) -> Result<Option<PathBuf>, JobError> {
        let Some(wanted) = &record.config.recipe.bundle else {
            return Ok(None);
        };
        let parts = self.parts();
        let folder = record.models.as_deref().and_then(|name| parts.models.find(name));
        let folder = folder.filter(|folder| folder.exists());
        let found = folder
            .as_ref()
            .map(|folder| Bundle::load(folder, &parts.device))
            .transpose()?;
        if found.is_some_and(|bundle| bundle.hash.to_string() == *wanted) {
            return Ok(folder);
        }
        let name = record.models.as_deref().unwrap_or("without a name");
        Err(JobError::Unfit(format!(
            "the generator that it learnt from, of models {name} ({wanted}), is no longer there"
        )))
    }
}

/// Copies generator and discriminator, where there are some; returns what the new models will hold, and the cubes in which they
/// look at lesions.
fn copy_painters(from: &Path, to: &Path) -> Result<(BTreeSet<Role>, CubeSides), JobError> {
    let mut roles = BTreeSet::from([Role::Critic]);
    for role in [Role::Generator, Role::Discriminator] {
        if copy_model(from, to, role)? {
            roles.insert(role);
        }
    }
    let sides = load_manifest(from, Role::Critic)?.cubes;
    Ok((roles, CubeSides::of_manifest(&sides).unwrap_or_default()))
}

/// Copies a model's two files; `false` where there are none.
fn copy_model(from: &Path, to: &Path, role: Role) -> Result<bool, JobError> {
    let files = ["safetensors", "json"].map(|extension| format!("{}.{extension}", role.name()));
    if !from.join(&files[1]).exists() {
        return Ok(false);
    }
    for file in files {
        fs_err::copy(from.join(&file), to.join(&file))?;
        // On the disk before the folder gets its name.
        fs_err::File::open(to.join(&file))?.sync_all()?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_what_nobody_completes_any_more_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let made = [".promoting-old", ".promoting-new", "models"].map(|name| root.path().join(name));
        for folder in &made {
            fs_err::create_dir(folder).unwrap();
        }
        let two_days_ago = SystemTime::now() - 2 * FORGET_AFTER;
        for old in [&made[0], &made[2]] {
            std::fs::File::open(old).unwrap().set_modified(two_days_ago).unwrap();
        }
        let folders = |root: Option<PathBuf>| ModelFolders { root, first: None };
        folders(Some(root.path().into())).forget_unfinished();
        assert_eq!(made.each_ref().map(|folder| folder.exists()), [false, true, true]);
        // Nothing there is nothing to remove.
        folders(Some(root.path().join("absent"))).forget_unfinished();
        folders(None).forget_unfinished();
    }
}
