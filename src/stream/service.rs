//! The in-process service: preparation threads, the device thread, and the streams they serve.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::course::Course;
use super::delivery::{Delivery, OnFailed};
use super::fair::Weights;
use super::leak::Seen;
use super::make::{Maker, PatchOrder};
use super::negatives::UnlabelledNegatives;
use super::open::Opened;
use super::patch::StreamedPatch;
use super::recipe::Recipe;
use super::resolve::{Prepared, resolve};
use super::room::Limits;
use super::scheduler::{Key, Opening, Scheduler};
use super::stats::StreamStats;
use super::{PatchService, PatchStream, Resolved, StreamError};
use crate::checkpoint::Bundle;
use crate::digest::Digest;
use crate::panic::panic_text;
use crate::store::Cases;
use crate::synth::{Cancelled, Engine, GridBridge};
use crate::volume::{Plan, Shape};

/// How many threads prepare patches, and how many patches may wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamConfig {
    /// Threads that read, plant, compose and augment; 0: two for every core, because half of them wait for the device.
    pub preparation_threads: usize,
    /// Lesions of whatever streams that go over the device together, while as many wait; the threads above bound how many do.
    pub device_batch: usize,
    /// Patches that one stream may be ahead of its reader; fewer where many streams share `max_patches`, or ask for larger ones than the
    /// plan's: a patch of k times the plan's voxels counts as k, here and below.
    pub window: usize,
    /// Patches that all streams together may be ahead of their readers, beside one for each.
    pub max_patches: usize,
    /// Patches kept in all for streams of the same recipe that are behind: made once, sent to each. A stream further
    /// behind gets them made again. 0 keeps none.
    pub share_patches: usize,
    /// Shares of the threads and of the device while several kinds of work wait.
    pub weights: Weights,
}

impl Default for StreamConfig {
    fn default() -> Self {
        Self {
            preparation_threads: 0,
            device_batch: 16,
            window: 8,
            max_patches: 64,
            share_patches: 32,
            weights: Weights::default(),
        }
    }
}

impl StreamConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`StartError::Config`] names the key and its range.
    pub fn check(&self) -> Result<(), StartError> {
        let check =
            |key, ok: bool, expected, got: usize| ok.then_some(()).ok_or(StartError::Config { key, expected, got });
        let threads = self.preparation_threads;
        check(
            "preparation_threads",
            threads <= 1024,
            "1 to 1024, or 0 for two per core",
            threads,
        )?;
        let batch = self.device_batch;
        check("device_batch", (1..=256).contains(&batch), "1 to 256", batch)?;
        check("window", (1..=1024).contains(&self.window), "1 to 1024", self.window)?;
        let most = 1..=65_536;
        check(
            "max_patches",
            most.contains(&self.max_patches),
            "1 to 65536",
            self.max_patches,
        )?;
        check(
            "share_patches",
            self.share_patches <= 65_536,
            "0 to 65536",
            self.share_patches,
        )?;
        let Weights {
            preview,
            stream,
            training,
        } = self.weights;
        for (key, weight) in [
            ("weights.preview", preview),
            ("weights.stream", stream),
            ("weights.training", training),
        ] {
            check(key, (1..=1000).contains(&weight), "1 to 1000", weight as usize)?;
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        match self.preparation_threads {
            0 => 2 * std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            window: self.window,
            max_patches: self.max_patches,
            share_patches: self.share_patches,
            weights: self.weights,
        }
    }
}

/// Why the service cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A configuration key outside its range.
    #[error("stream.{key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// The allowed range.
        expected: &'static str,
        /// What was found.
        got: usize,
    },
    /// Models and store that do not fit each other.
    #[error("plan.{field}: the models have {models}, the store has {store}")]
    PlanMismatch {
        /// The field; of `spacing_mm`, by more than [`crate::synth::MAX_GRID_RATIO`].
        field: &'static str,
        /// What the models were trained on.
        models: String,
        /// What the store holds.
        store: String,
    },
    /// The operating system refused a thread.
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
}

/// What a preparation thread needs beside the index.
#[derive(Clone)]
pub(super) struct Work {
    maker: Arc<Maker>,
    prepared: Arc<Prepared>,
    on_failed: OnFailed,
}

/// A patch, or why it could not be made.
pub(super) type Made = Result<Arc<StreamedPatch>, StreamError>;

/// The threads that prepare patches and the scheduler that gives them work, for the streams of any number of bundles. When
/// the services and the last stream are gone, the threads end.
pub(super) struct Core {
    pub(super) scheduler: Arc<Scheduler<Work, Made>>,
    config: StreamConfig,
}

impl Core {
    fn start(config: StreamConfig) -> Result<Arc<Self>, StartError> {
        let core = Arc::new(Self {
            scheduler: Arc::new(Scheduler::new(config.limits())),
            config,
        });
        for number in 0..core.config.threads() {
            let scheduler = core.scheduler.clone();
            std::thread::Builder::new()
                .name(format!("freetumor-prepare-{number}"))
                .spawn(move || prepare(&scheduler))?;
        }
        Ok(core)
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.scheduler.close();
    }
}

/// Serves streams from a store and, where given, a bundle of models.
pub struct Streams {
    core: Arc<Core>,
    maker: Arc<Maker>,
    /// Makes what needs no models, so that such a stream keeps none in memory.
    plain: Arc<Maker>,
    seen: Seen,
}

impl Streams {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`StartError`] names the configuration key, or the field in which models and store differ.
    pub fn start(
        cases: Arc<dyn Cases>,
        bundle: Option<Arc<Bundle>>,
        config: StreamConfig,
    ) -> Result<Arc<Self>, StartError> {
        config.check()?;
        Self::of(Core::start(config)?, cases, bundle)
    }

    /// Starts a service of other models over the same store. It shares the threads, the turns and the bounds of this one.
    ///
    /// # Errors
    /// [`StartError::PlanMismatch`] names the field in which models and store differ.
    pub fn beside(&self, bundle: Arc<Bundle>) -> Result<Arc<Self>, StartError> {
        Self::of(self.core.clone(), self.maker.cases.clone(), Some(bundle))
    }

    fn of(core: Arc<Core>, cases: Arc<dyn Cases>, bundle: Option<Arc<Bundle>>) -> Result<Arc<Self>, StartError> {
        if let Some(bundle) = &bundle {
            check_plans(&bundle.plan, cases.plan())?;
        }
        let (threads, device_batch) = (core.config.threads(), core.config.device_batch);
        let engine = bundle
            .as_ref()
            .map(|bundle| Engine::start(bundle.clone(), threads, device_batch))
            .transpose()?;
        let stats = Arc::new(StreamStats::new(&cases.plan().labels.organs()));
        let plain = Arc::new(Maker {
            cases: cases.clone(),
            bundle: None,
            engine: None,
            stats: stats.clone(),
            judges: OnceLock::new(),
        });
        let maker = Arc::new(Maker {
            cases,
            bundle,
            engine: engine.map(Arc::new),
            stats,
            judges: OnceLock::new(),
        });
        Ok(Arc::new(Self {
            core,
            maker,
            plain,
            seen: Seen::default(),
        }))
    }

    fn maker_of(&self, prepared: &Prepared) -> &Arc<Maker> {
        let Resolved { bundle, recipe, .. } = &*prepared.resolved;
        let looks = recipe.unlabelled_negatives == Some(UnlabelledNegatives::Critic);
        let needs_models = *bundle != Digest::default() || looks;
        if needs_models { &self.maker } else { &self.plain }
    }

    /// Makes the first patches of a recipe on the calling thread: nobody's turn comes later for it.
    pub(super) fn make_aside(&self, recipe: Recipe, patches: u64) -> Result<Vec<StreamedPatch>, StreamError> {
        let models = (self.maker.bundle.as_deref(), &self.seen);
        let prepared = Arc::new(resolve(&*self.maker.cases, models, recipe)?);
        let made = (0..patches).map(|index| {
            self.maker_of(&prepared).make(&PatchOrder {
                prepared: prepared.clone(),
                index,
                on_failed: OnFailed::Error,
                cancelled: Cancelled::default(),
            })
        });
        made.collect()
    }

    /// Returns the models, if there are any.
    pub fn bundle(&self) -> Option<&Bundle> {
        self.maker.bundle.as_deref()
    }

    /// Returns what lives as long as this service or a stream that needs its models.
    pub(super) fn use_of_models(&self) -> Weak<Maker> {
        Arc::downgrade(&self.maker)
    }

    /// Returns the running counts of all streams.
    pub fn stats(&self) -> &StreamStats {
        &self.maker.stats
    }

    /// Returns how many patches streams are ahead of their readers.
    pub fn in_flight(&self) -> usize {
        self.core.scheduler.in_flight()
    }
}

/// Refuses models whose labels or window differ from the store's, or whose voxels do so much.
fn check_plans(models: &Plan, store: &Plan) -> Result<(), StartError> {
    let mismatch = |field, models: String, store: String| Err(StartError::PlanMismatch { field, models, store });
    let names = |plan: &Plan| format!("{:?}", plan.labels.iter().collect::<Vec<_>>());
    if models.labels != store.labels {
        return mismatch("labels", names(models), names(store));
    }
    if models.window_hu != store.window_hu {
        return mismatch(
            "window_hu",
            format!("{:?}", models.window_hu),
            format!("{:?}", store.window_hu),
        );
    }
    if !GridBridge::spans(store.spacing_mm, models.spacing_mm) {
        return mismatch(
            "spacing_mm",
            format!("{:?}", models.spacing_mm),
            format!("{:?}", store.spacing_mm),
        );
    }
    Ok(())
}

/// A preparation thread: it never waits for a reader, because every window has room for what was asked.
fn prepare(scheduler: &Scheduler<Work, Made>) {
    while let Some(order) = scheduler.next() {
        let began = Instant::now();
        let Work {
            maker,
            prepared,
            on_failed,
        } = order.work.clone();
        let _span = tracing::debug_span!("patch", recipe = %prepared.resolved.hash, index = order.index).entered();
        let wanted = PatchOrder {
            prepared,
            index: order.index,
            on_failed,
            cancelled: order.cancelled.clone(),
        };
        let made = catch_unwind(AssertUnwindSafe(|| maker.make(&wanted))).unwrap_or_else(|panic| {
            Err(StreamError::Failed {
                index: order.index,
                what: format!("internal error: {}", panic_text(&*panic)),
            })
        });
        // What failed may be a passing fault of the device: streams that are behind try again.
        let is_whole = made.as_ref().is_ok_and(|patch| patch.meta.failed.is_none());
        scheduler.finish(&order, made.map(Arc::new), began.elapsed(), is_whole);
    }
}

impl Streams {
    /// Returns as how many patches of the plan's size a patch counts.
    fn room(&self, patch: Shape) -> u64 {
        let voxels = |patch: Shape| patch.iter().map(|side| *side as u64).product::<u64>();
        voxels(patch).div_ceil(voxels(self.plan().patch).max(1))
    }
}

impl PatchService for Streams {
    fn plan(&self) -> &Plan {
        self.maker.cases.plan()
    }

    fn resolve(&self, recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        let models = (self.maker.bundle.as_deref(), &self.seen);
        Ok(resolve(&*self.maker.cases, models, recipe)?.resolved)
    }

    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        let course = Course::new(recipe, delivery)?;
        // The schedule follows from the resolved recipe; making it again costs one pass over the case records.
        let models = (self.maker.bundle.as_deref(), &self.seen);
        let prepared = resolve(&*self.maker.cases, models, recipe.recipe.clone())?;
        let work = Work {
            maker: self.maker_of(&prepared).clone(),
            prepared: Arc::new(prepared),
            on_failed: delivery.on_failed,
        };
        let prepared = work.prepared.clone();
        let lane = self.core.scheduler.open(Opening {
            key: Key {
                models: prepared.resolved.bundle,
                recipe: prepared.resolved.hash,
                skips_failed: delivery.on_failed == OnFailed::Skip,
            },
            work,
            course,
            priority: delivery.priority,
            room: self.room(prepared.resolved.patch),
        });
        Ok(Box::new(Opened::new(self.core.clone(), prepared, course, lane)))
    }

    fn has_waiting_readers(&self) -> bool {
        self.core.scheduler.has_waiting_readers()
    }

    fn failure(&self) -> Option<String> {
        self.maker.engine.as_ref().and_then(|engine| engine.failure())
    }
}
