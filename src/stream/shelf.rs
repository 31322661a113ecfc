//! Several bundles of models beside each other: one is active, the others serve the recipes and cursors that name them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::delivery::Delivery;
use super::make::Maker;
use super::patch::Outcome;
use super::recipe::Recipe;
use super::{PatchService, PatchStream, Resolved, StartError, StreamError, Streams};
use crate::checkpoint::{Bundle, CheckpointError};
use crate::digest::Digest;
use crate::store::Cases;
use crate::volume::Plan;

/// Patches that freshly loaded models make before anybody may use them.
const WARM_UP_PATCHES: u64 = 4;
/// Bundles held at the same time: the active one, the one before, and the one that is tried.
const MAX_HELD: usize = 3;

/// Where models are found by name.
pub trait ModelSource: Send + Sync {
    /// Returns the names that can be loaded.
    fn names(&self) -> Vec<String>;

    /// Loads a bundle.
    ///
    /// # Errors
    /// [`ModelsError::Unknown`] or [`ModelsError::Damaged`].
    fn load(&self, name: &str) -> Result<Bundle, ModelsError>;

    /// Keeps which models are active on a server that was started with others, for its next start.
    ///
    /// # Errors
    /// What the operating system refuses.
    fn remember(&self, started_with: Digest, active: &Activation) -> std::io::Result<()>;

    /// Returns what was kept last for a server that is started with models of a hash.
    fn remembered(&self, started_with: Digest) -> Option<Activation>;
}

/// Which models serve in place of those that a server was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activation {
    /// Their name.
    pub name: String,
    /// Their hash.
    pub bundle: Digest,
}

/// Why models cannot be listed, loaded or exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ModelsError {
    /// No models of that name.
    #[error("no models {0:?} under the configured root")]
    Unknown(String),
    /// Models that are not held.
    #[error("models {0:?} are not held; load them first")]
    NotHeld(String),
    /// Models that cannot be loaded.
    #[error("models {name:?} cannot be loaded")]
    Damaged {
        /// Their name.
        name: String,
        /// The file, or the field in which they differ.
        source: Box<CheckpointError>,
    },
    /// Models that do not fit the store.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Models that cannot serve the default recipe.
    #[error("models {name:?} fail on the default recipe: {source}")]
    FailsDefaultRecipe {
        /// Their name.
        name: String,
        /// How.
        source: Box<StreamError>,
    },
    /// No place for more.
    #[error(
        "{MAX_HELD} bundles are held, or released but still in use by open streams, which is the limit; release one, or wait"
    )]
    Full,
    /// Other models than were active under their name.
    #[error("models {name:?} are not those that were active, {bundle}")]
    Replaced {
        /// Their name.
        name: String,
        /// The hash of those that were active.
        bundle: Digest,
    },
    /// The active models cannot be released.
    #[error("models {0:?} are active; activate others first")]
    Active(String),
    /// There is nothing to go back to.
    #[error("no models were active before")]
    NoPrevious,
}

/// What freshly loaded models did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WarmUp {
    /// Patches made of the default recipe.
    pub patches: u64,
    /// Lesions that were tried in them.
    pub attempts: u64,
    /// Patches with a lesion that passed the gate.
    pub accepted: u64,
    /// Seconds it took, loading included.
    pub seconds: f64,
}

/// Where models stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// Recipes that name no models get these.
    Active,
    /// Recipes and cursors that name them get these.
    Held,
    /// On disk only.
    Available,
}

/// Models as they are listed.
#[derive(Clone, Debug, Serialize)]
pub struct ModelEntry {
    /// Their name under the configured root.
    pub name: String,
    /// Where they stand.
    pub state: ModelState,
    /// Their hash, as frames carry it, where they are held.
    pub bundle: Option<Digest>,
    /// Cases that they were trained on, where they are held and say so.
    pub training_cases: Option<usize>,
    /// Real lesions that their critic was calibrated on, where they are held.
    pub calibration_lesions: Option<usize>,
    /// What they did when they were loaded; nothing for those that the server started with.
    pub warm_up: Option<WarmUp>,
}

/// A bundle and who serves it, with the threads of all.
struct Held {
    bundle: Digest,
    training_cases: Option<usize>,
    calibration_lesions: Option<usize>,
    warm_up: Option<WarmUp>,
    streams: Arc<Streams>,
}

#[derive(Default)]
struct Places {
    held: BTreeMap<String, Held>,
    active: String,
    previous: Option<String>,
    /// Models that were released while streams of theirs were open.
    released: Vec<Weak<Maker>>,
}

/// What a shelf is made of.
pub struct ShelfParts {
    /// The store.
    pub cases: Arc<dyn Cases>,
    /// The recipe by which loaded models are tried.
    pub default_recipe: Recipe,
    /// Where models are found.
    pub source: Box<dyn ModelSource>,
}

/// Serves streams from several bundles over one store.
pub struct Shelf {
    parts: ShelfParts,
    places: RwLock<Places>,
    started_with: Digest,
    /// One activation at a time, until it is kept.
    activating: Mutex<()>,
    /// One load at a time: each may take gigabytes.
    loading: Mutex<()>,
}

impl Shelf {
    /// Starts with the models that are active from the beginning.
    pub fn new(parts: ShelfParts, name: &str, streams: Arc<Streams>) -> Arc<Self> {
        let mut places = Places {
            active: name.to_owned(),
            ..Places::default()
        };
        let held = Held::new(streams, None);
        let started_with = held.bundle;
        places.held.insert(name.to_owned(), held);
        Arc::new(Self {
            parts,
            places: RwLock::new(places),
            started_with,
            activating: Mutex::default(),
            loading: Mutex::default(),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Places> {
        self.places.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Places> {
        self.places.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists every bundle that is held or could be loaded.
    pub fn list(&self) -> Vec<ModelEntry> {
        // Before the lock: the folder may be far away, and streams must not wait for it.
        let others = self.parts.source.names();
        let places = self.read();
        let mut entries: Vec<_> = places.held.keys().filter_map(|name| places.entry(name)).collect();
        entries.extend(
            others
                .into_iter()
                .filter(|name| !places.held.contains_key(name))
                .map(|name| ModelEntry {
                    name,
                    state: ModelState::Available,
                    bundle: None,
                    training_cases: None,
                    calibration_lesions: None,
                    warm_up: None,
                }),
        );
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        entries
    }

    /// Loads models beside the active ones and tries them on the default recipe; nothing changes for anybody else.
    ///
    /// # Errors
    /// [`ModelsError`] says what is wrong with them, or that there is no place.
    pub fn load(&self, name: &str) -> Result<ModelEntry, ModelsError> {
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = self.read().entry(name) {
            return Ok(entry);
        }
        if self.write().in_memory() >= MAX_HELD {
            return Err(ModelsError::Full);
        }
        let started = Instant::now();
        let bundle = self.parts.source.load(name)?;
        let streams = self.active().beside(Arc::new(bundle))?;
        let tried = warm_up(&streams, &self.parts.default_recipe);
        let mut warm_up = tried.map_err(|source| ModelsError::FailsDefaultRecipe {
            name: name.into(),
            source: source.into(),
        })?;
        warm_up.seconds = started.elapsed().as_secs_f64();
        tracing::info!(name, ?warm_up, "models were loaded");
        let mut places = self.write();
        places.held.insert(name.to_owned(), Held::new(streams, Some(warm_up)));
        places.entry(name).ok_or_else(|| ModelsError::NotHeld(name.into()))
    }

    /// Returns the name under which models of a hash are held.
    pub fn name_of(&self, bundle: Digest) -> Option<String> {
        let places = self.read();
        let mut held = places.held.iter();
        held.find(|(_, held)| held.bundle == bundle)
            .map(|(name, _)| name.clone())
    }

    /// Lets recipes that name no models get these from now on. Streams that are open keep theirs.
    ///
    /// # Errors
    /// [`ModelsError::NotHeld`].
    pub fn activate(&self, name: &str) -> Result<ModelEntry, ModelsError> {
        let _one = self.activating.lock().unwrap_or_else(PoisonError::into_inner);
        let mut places = self.write();
        let held = places.held.get(name).ok_or_else(|| ModelsError::NotHeld(name.into()))?;
        let activation = Activation {
            name: name.to_owned(),
            bundle: held.bundle,
        };
        let is_new = places.active != name;
        if is_new {
            let before = std::mem::replace(&mut places.active, name.to_owned());
            places.previous = Some(before);
            tracing::info!(name, "models were activated");
        }
        let entry = places.entry(name).ok_or_else(|| ModelsError::NotHeld(name.into()));
        drop(places);
        if is_new && let Err(error) = self.parts.source.remember(self.started_with, &activation) {
            tracing::warn!(%error, name, "the activation cannot be kept: the next start is with the models of the command line");
        }
        entry
    }

    /// Loads and activates what was active last on a server that had been started with the same models.
    ///
    /// # Errors
    /// [`ModelsError`] says what is wrong with them; those that the server started with stay active.
    pub fn take_up(&self) -> Result<(), ModelsError> {
        let kept = self.parts.source.remembered(self.started_with);
        let Some(Activation { name, bundle }) = kept.filter(|kept| kept.bundle != self.started_with) else {
            return Ok(());
        };
        if self.load(&name)?.bundle != Some(bundle) {
            self.release(&name)?;
            return Err(ModelsError::Replaced { name, bundle });
        }
        self.activate(&name).map(drop)
    }

    /// Activates the models that were active before.
    ///
    /// # Errors
    /// [`ModelsError::NoPrevious`], also where they were released since.
    pub fn roll_back(&self) -> Result<ModelEntry, ModelsError> {
        let previous = self.read().previous.clone().ok_or(ModelsError::NoPrevious)?;
        self.activate(&previous)
    }

    /// Forgets models that are not active; cursors that name them are then refused as gone. Open streams keep them alive.
    ///
    /// # Errors
    /// [`ModelsError::NotHeld`] or [`ModelsError::Active`].
    pub fn release(&self, name: &str) -> Result<(), ModelsError> {
        let mut places = self.write();
        if places.active == name {
            return Err(ModelsError::Active(name.into()));
        }
        let Some(held) = places.held.remove(name) else {
            return Err(ModelsError::NotHeld(name.into()));
        };
        places.released.push(held.streams.use_of_models());
        places.previous = places.previous.take().filter(|previous| previous != name);
        tracing::info!(name, "models were released");
        Ok(())
    }

    fn active(&self) -> Arc<Streams> {
        let places = self.read();
        places.held[&places.active].streams.clone()
    }

    /// Returns who serves a recipe that names models by name or hash, or none.
    fn serving(&self, named: Option<&str>) -> Result<Arc<Streams>, StreamError> {
        let Some(named) = named else {
            return Ok(self.active());
        };
        let places = self.read();
        let hash = named.parse::<Digest>().ok();
        let mut held = places.held.iter();
        let found = held.find(|(name, held)| name.as_str() == named || Some(held.bundle) == hash);
        match (found, hash) {
            (Some((_, held)), _) => Ok(held.streams.clone()),
            (None, Some(hash)) => Err(StreamError::BundleGone(hash)),
            (None, None) => Err(StreamError::Infeasible {
                field: "bundle",
                what: format!("no models {:?} are held", named.chars().take(80).collect::<String>()),
            }),
        }
    }
}

impl Held {
    fn new(streams: Arc<Streams>, warm_up: Option<WarmUp>) -> Self {
        let bundle = streams.bundle();
        Self {
            bundle: bundle.map(|bundle| bundle.hash).unwrap_or_default(),
            calibration_lesions: bundle.and_then(|bundle| bundle.calibration.lesions()),
            training_cases: bundle
                .filter(|bundle| bundle.provenance.known)
                .map(|bundle| bundle.provenance.source_hashes.len()),
            warm_up,
            streams,
        }
    }
}

impl Places {
    /// Counts the bundles in memory: those held, and those released that open streams still use.
    fn in_memory(&mut self) -> usize {
        self.released.retain(|models| models.strong_count() > 0);
        self.held.len() + self.released.len()
    }

    fn entry(&self, name: &str) -> Option<ModelEntry> {
        let held = self.held.get(name)?;
        let is_active = self.active == name;
        Some(ModelEntry {
            name: name.to_owned(),
            state: if is_active {
                ModelState::Active
            } else {
                ModelState::Held
            },
            bundle: Some(held.bundle),
            training_cases: held.training_cases,
            calibration_lesions: held.calibration_lesions,
            warm_up: held.warm_up.clone(),
        })
    }
}

/// Makes a few patches: kernels are compiled, and models that cannot work say so before a client hears of it.
fn warm_up(streams: &Streams, recipe: &Recipe) -> Result<WarmUp, StreamError> {
    let mut tried = WarmUp::default();
    for patch in streams.make_aside(recipe.clone(), WARM_UP_PATCHES)? {
        tried.patches += 1;
        tried.attempts += u64::from(patch.meta.attempts);
        tried.accepted += u64::from(patch.meta.outcome == Outcome::Accepted);
    }
    Ok(tried)
}

impl PatchService for Shelf {
    fn plan(&self) -> &Plan {
        self.parts.cases.plan()
    }

    fn resolve(&self, mut recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        let named = recipe.bundle.take();
        self.serving(named.as_deref())?.resolve(recipe)
    }

    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        let needs_models = recipe.bundle != Digest::default();
        let named = needs_models.then(|| recipe.bundle.to_string());
        self.serving(named.as_deref())?.open(recipe, delivery)
    }

    fn failure(&self) -> Option<String> {
        // Open streams keep the models that they began with, whichever are active now.
        self.read().held.values().find_map(|held| held.streams.failure())
    }

    fn has_waiting_readers(&self) -> bool {
        self.active().has_waiting_readers()
    }

    fn holder(&self, models: Digest) -> Result<Option<Arc<dyn PatchService>>, StreamError> {
        if models == Digest::default() {
            return Ok(None);
        }
        Ok(Some(self.serving(Some(&models.to_string()))?))
    }

    fn shelf(&self) -> Option<&Shelf> {
        Some(self)
    }
}
