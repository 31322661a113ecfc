//! The configuration: every module's own settings under one roof. Defaults < one TOML file < environment < flags.

mod load;

use serde::{Deserialize, Serialize};

use crate::experiment::ExperimentConfig;
use crate::http::ServerConfig;
use crate::ingest::IngestConfig;
use crate::jobs::JobsConfig;
use crate::learn::{CriticConfig, SegmentorConfig, SynthesizerConfig};
use crate::phantom::PhantomSettings;
use crate::store::StoreConfig;
use crate::stream::StreamConfig;
use crate::stream::recipe::Recipe;
use crate::telemetry::log::LogConfig;
use crate::volume::Plan;

pub use load::{ConfigError, ENVIRONMENT_PREFIX, load};

/// Everything that can be configured; each section belongs to the module that reads it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The grid, labels and window of store and models.
    pub plan: Plan,
    /// The HTTP server.
    pub server: ServerConfig,
    /// Log lines.
    pub log: LogConfig,
    /// Threads and windows of streams.
    pub stream: StreamConfig,
    /// Patients of `freetumor phantom`.
    pub phantom: PhantomSettings,
    /// What becomes of unusual files.
    pub ingest: IngestConfig,
    /// How stores are read.
    pub store: StoreConfig,
    /// What a client gets that names no recipe.
    pub recipe: Recipe,
    /// Stage 1.
    pub critic: CriticConfig,
    /// Stage 2.
    pub synthesizer: SynthesizerConfig,
    /// Stage 3.
    pub segmentor: SegmentorConfig,
    /// Trainings inside the server.
    pub jobs: JobsConfig,
    /// Which runs `freetumor experiment` compares.
    pub experiment: ExperimentConfig,
}

impl Config {
    /// Tells what is wrong with a value that its own type cannot refuse, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let recipe = || self.recipe.validate().err().map(|error| error.to_string());
        let organs = || {
            let mut names = self.recipe.organs.iter().flat_map(|organs| organs.keys());
            names
                .find_map(|name| self.plan.labels.organ(name).err())
                .map(|error| format!("recipe.organs: {error}"))
        };
        let log = || self.log.filter().err().map(|error| error.to_string());
        let stream = || self.stream.check().err().map(|error| error.to_string());
        let stages = || {
            let checked = self.critic.check().and_then(|()| self.synthesizer.check());
            let checked = checked.and_then(|()| self.segmentor.check());
            checked.err().map(|error| error.to_string())
        };
        let server = || self.server.refusal();
        let store = || self.store.refusal();
        let jobs = || self.jobs.refusal();
        let phantom = || self.phantom.refusal();
        let experiment = || self.experiment.check().err().map(|error| error.to_string());
        let sections = [
            &server as &dyn Fn() -> Option<String>,
            &recipe,
            &organs,
            &log,
            &stream,
            &stages,
            &store,
            &jobs,
            &phantom,
            &experiment,
        ];
        self.plan
            .refusal()
            .or_else(|| sections.iter().find_map(|refusal| refusal()))
    }
}
