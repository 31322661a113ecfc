//! The in-process service: preparation threads, the device thread, and the streams they serve.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use super::delivery::Delivery;
use super::leak::Seen;
use super::make::{Maker, Order};
use super::open::{Course, Opened};
use super::patch::StreamedPatch;
use super::recipe::Recipe;
use super::resolve::resolve;
use super::stats::StreamStats;
use super::window::OrderedWindow;
use super::{PatchService, PatchStream, Resolved, StreamError};
use crate::checkpoint::Bundle;
use crate::panic::panic_text;
use crate::store::Cases;
use crate::synth::{Engine, GridBridge};
use crate::volume::Plan;

/// How many threads prepare patches, and how many patches may wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamConfig {
    /// Threads that read, plant, compose and augment.
    pub preparation_threads: usize,
    /// Patches that one stream may be ahead of its reader.
    pub window: usize,
    /// Patches that all streams together may be ahead of their readers; each may always be ahead by one.
    pub max_patches: usize,
}

impl Default for StreamConfig {
    fn default() -> Self {
        Self {
            preparation_threads: 2,
            window: 8,
            max_patches: 64,
        }
    }
}

impl StreamConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`StartError::Config`] names the key and its range.
    pub fn check(&self) -> Result<(), StartError> {
        let check = |key, most: usize, expected, got: usize| {
            let ok = (1..=most).contains(&got);
            ok.then_some(()).ok_or(StartError::Config { key, expected, got })
        };
        check("preparation_threads", 1024, "1 to 1024", self.preparation_threads)?;
        check("window", 1024, "1 to 1024", self.window)?;
        check("max_patches", 65_536, "1 to 65536", self.max_patches)
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

/// A patch to be made, and where it goes.
pub(super) struct Task {
    pub(super) order: Order,
    pub(super) ordinal: u64,
    pub(super) window: Arc<OrderedWindow<Result<StreamedPatch, StreamError>>>,
}

/// What every stream shares. When the service and the last stream are gone, so is the queue, and the threads end.
pub(super) struct Core {
    pub(super) config: StreamConfig,
    pub(super) tasks: Sender<Task>,
    pub(super) in_flight: AtomicUsize,
    pub(super) stopped: AtomicBool,
}

/// Serves streams from a store and, where given, a bundle of models.
pub struct Streams {
    core: Arc<Core>,
    maker: Arc<Maker>,
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
        if let Some(bundle) = &bundle {
            check_plans(&bundle.plan, cases.plan())?;
        }
        let engine = bundle
            .as_ref()
            .map(|bundle| Engine::start(bundle.clone(), config.preparation_threads))
            .transpose()?;
        let stats = StreamStats::new(&cases.plan().labels.organs());
        let maker = Arc::new(Maker {
            cases,
            bundle,
            engine: engine.map(Arc::new),
            stats,
        });
        let (tasks, queue) = bounded(config.max_patches);
        for number in 0..config.preparation_threads {
            let (maker, queue) = (maker.clone(), queue.clone());
            std::thread::Builder::new()
                .name(format!("freetumor-prepare-{number}"))
                .spawn(move || prepare(&maker, &queue))?;
        }
        let core = Core {
            config,
            tasks,
            in_flight: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        };
        Ok(Arc::new(Self {
            core: Arc::new(core),
            maker,
            seen: Seen::default(),
        }))
    }

    /// Returns the models, if there are any.
    pub fn bundle(&self) -> Option<&Bundle> {
        self.maker.bundle.as_deref()
    }

    /// Returns the running counts of all streams.
    pub fn stats(&self) -> &StreamStats {
        &self.maker.stats
    }

    /// Returns how many patches streams are ahead of their readers.
    pub fn in_flight(&self) -> usize {
        self.core.in_flight.load(Ordering::Relaxed)
    }

    /// Ends every stream with [`StreamError::Stopped`] at its next patch.
    pub fn stop(&self) {
        self.core.stopped.store(true, Ordering::Release);
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
fn prepare(maker: &Maker, queue: &Receiver<Task>) {
    for Task { order, ordinal, window } in queue {
        let made = if order.cancelled.is_set() {
            Err(StreamError::Stopped)
        } else {
            let make = AssertUnwindSafe(|| maker.make(&order));
            catch_unwind(make).unwrap_or_else(|panic| {
                Err(StreamError::Failed {
                    index: order.index,
                    what: format!("internal error: {}", panic_text(&*panic)),
                })
            })
        };
        window.put(ordinal, made);
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
        let opened = Opened::new(self.core.clone(), Arc::new(prepared), course, delivery.clone());
        Ok(Box::new(opened))
    }
}
