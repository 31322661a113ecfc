//! Every metric, declared once: name, kind, labels and meaning.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Patches sent, by `outcome`, `pool`, `organ`, and the first lesion's `size` and `contrast` (`none` without one).
pub const PATCHES_TOTAL: &str = "freetumor_patches_total";
/// Patches that could not be made and were sent marked `failed`.
pub const PATCHES_FAILED_TOTAL: &str = "freetumor_patches_failed_total";
/// Patches that were made once and sent to more than one stream, counted for each but the first.
pub const PATCHES_REUSED_TOTAL: &str = "freetumor_patches_reused_total";
/// Patches taken back from streams.
pub const PATCHES_TAKEN_BACK_TOTAL: &str = "freetumor_patches_taken_back_total";
/// Synthesis attempts behind the patches sent, by `organ`.
pub const ATTEMPTS_TOTAL: &str = "freetumor_attempts_total";
/// Lesions that passed the gate, by `organ`, and the `size` and `contrast` that were asked for.
pub const GATE_ACCEPTED_TOTAL: &str = "freetumor_gate_accepted_total";
/// Attempts that the gate refused, likewise.
pub const GATE_REJECTED_TOTAL: &str = "freetumor_gate_rejected_total";
/// Attempts whose place the critic had called tumour before, by `organ`.
pub const HOST_SUSPECT_TOTAL: &str = "freetumor_host_suspect_total";
/// Voxels of unlabelled hosts that `unlabelled_negatives` turned into ignore, by the patch's `organ`.
pub const IGNORED_VOXELS_TOTAL: &str = "freetumor_ignored_voxels_total";
/// Patches whose organ had no place for the lesion, by `organ`.
pub const UNPLACEABLE_TOTAL: &str = "freetumor_unplaceable_total";
/// Patches near enough to a threshold that another numerics class might decide otherwise.
pub const BORDERLINE_TOTAL: &str = "freetumor_borderline_total";
/// Bytes of a GPU's memory, by `kind`: `in_use` by tensors, `reserved` by the allocator.
pub const DEVICE_MEMORY_BYTES: &str = "freetumor_device_memory_bytes";
/// Patches that streams have asked for and not yet taken: being made, or ready.
pub const PATCHES_IN_FLIGHT: &str = "freetumor_patches_in_flight";
/// Streams open now.
pub const STREAMS_OPEN: &str = "freetumor_streams_open";
/// Streams ended, by `reason`.
pub const STREAMS_ENDED_TOTAL: &str = "freetumor_streams_ended_total";
/// Bytes handed to connections.
pub const SENT_BYTES_TOTAL: &str = "freetumor_sent_bytes_total";
/// Requests answered, by `route`, `method` and `status`.
pub const HTTP_REQUESTS_TOTAL: &str = "freetumor_http_requests_total";
/// Requests refused because too many were open, by `route`.
pub const REFUSED_TOTAL: &str = "freetumor_refused_total";
/// Seconds to the first byte of an answer, by `route`.
pub const HTTP_REQUEST_SECONDS: &str = "freetumor_http_request_seconds";
/// Connections open now.
pub const CONNECTIONS_OPEN: &str = "freetumor_connections_open";
/// Connections closed before a request, by `reason`: `limit` or `handshake`.
pub const CONNECTIONS_REFUSED_TOTAL: &str = "freetumor_connections_refused_total";
/// Always 1; the code's `version` and `revision`.
pub const BUILD_INFO: &str = "freetumor_build_info";
/// Always 1; hashes of models and store behind the default recipe, and the class of its numerics.
pub const MODELS_INFO: &str = "freetumor_models_info";
/// A training's loss at its last report, by `stage`.
pub const TRAINING_LOSS: &str = "freetumor_training_loss";
/// What a training's last step measured, by `stage` and `name`, as in its lines of metrics.
pub const TRAINING_MEASURE: &str = "freetumor_training_measure";
/// A training's mean Dice score on held-out cases at its last validation, by `class`.
pub const TRAINING_DICE: &str = "freetumor_training_dice";
/// Share of true lesions that a segmentor in training found at its last validation, by `organ` and `size`.
pub const TRAINING_SENSITIVITY: &str = "freetumor_training_sensitivity";
/// Number of the mix that a steered training learns from; 0 is the recipe as it was configured.
pub const TRAINING_MIX: &str = "freetumor_training_mix";
/// Shares of a steered training's mix, by `of` (`organ` or `size`) and `name`.
pub const TRAINING_MIX_SHARE: &str = "freetumor_training_mix_share";
/// Patches that the hosted training learnt from per second since its last report; 0 while none runs.
pub const TRAINING_PATCHES_PER_SECOND: &str = "freetumor_training_patches_per_second";
/// Hosted trainings at work: 0 or 1.
pub const TRAININGS_RUNNING: &str = "freetumor_trainings_running";
/// Hosted trainings that wait for their turn.
pub const TRAININGS_QUEUED: &str = "freetumor_trainings_queued";
/// Passes over the device: each is a batch of lesions.
pub const DEVICE_BATCHES_TOTAL: &str = "freetumor_device_batches_total";
/// Lesions in those batches.
pub const DEVICE_CUBES_TOTAL: &str = "freetumor_device_cubes_total";
/// Seconds spent in a stage of the work, by `stage`.
pub const STAGE_SECONDS: &str = "freetumor_stage_seconds";

/// A stage of the work behind a patch, the label of [`STAGE_SECONDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading a crop from the store.
    Read,
    /// A lesion's form, place and soft mask.
    Lesion,
    /// The synthesizer, on the device.
    Synthesize,
    /// The gate's critic and discriminator, on the device, with looks at hosts that were in the same batch.
    Gate,
    /// The critic's look at untouched hosts, on the device, where no lesion was judged with them.
    Look,
    /// An optimizer's step, on the device.
    Learn,
    /// Scoring held-out cases while a training runs, on the device.
    Validate,
    /// Augmentation.
    Augment,
    /// A lesion waiting for the device.
    WaitForDevice,
    /// A stream waiting for its next batch.
    WaitForBatch,
    /// Windowing, compression and checksums of a batch.
    Encode,
    /// A stream waiting for its client.
    WaitForClient,
}

impl Stage {
    /// Returns the label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Lesion => "lesion",
            Self::Synthesize => "synthesize",
            Self::Gate => "gate",
            Self::Look => "look",
            Self::Learn => "learn",
            Self::Validate => "validate",
            Self::Augment => "augment",
            Self::WaitForDevice => "wait_for_device",
            Self::WaitForBatch => "wait_for_batch",
            Self::Encode => "encode",
            Self::WaitForClient => "wait_for_client",
        }
    }

    /// Runs `work` within a span and records how long it took.
    pub fn time<T>(self, work: impl FnOnce() -> T) -> T {
        let _span = tracing::debug_span!("stage", name = self.name()).entered();
        let start = Instant::now();
        let result = work();
        self.since(start);
        result
    }

    /// Records what began at `start` and ends now.
    pub fn since(self, start: Instant) {
        self.took(start.elapsed());
    }

    /// Records how long it took.
    pub fn took(self, time: Duration) {
        histogram!(STAGE_SECONDS, "stage" => self.name()).record(time);
    }
}

/// Upper bounds of [`STAGE_SECONDS`] and [`HTTP_REQUEST_SECONDS`]: from a memory-mapped read to a slow batch on a CPU.
const SECONDS_BUCKETS: [f64; 12] = [0.0005, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// What a metric counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// A metric's declaration.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it counts.
    pub kind: MetricKind,
    /// In what.
    pub unit: Unit,
    /// Its labels, each with few values that no client chooses.
    pub labels: &'static [&'static str],
    /// Its meaning.
    pub help: &'static str,
}

impl Metric {
    const fn new(name: &'static str, kind: MetricKind, labels: &'static [&'static str], help: &'static str) -> Self {
        Self {
            name,
            kind,
            unit: Unit::Count,
            labels,
            help,
        }
    }

    const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self::new(name, MetricKind::Counter, labels, help)
    }

    const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self::new(name, MetricKind::Gauge, labels, help)
    }

    const fn seconds(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self::new(name, MetricKind::Histogram, labels, help).measured_in(Unit::Seconds)
    }

    const fn measured_in(mut self, unit: Unit) -> Self {
        self.unit = unit;
        self
    }
}

/// Every metric; the documentation's table is made from it.
pub const METRICS: &[Metric] = &[
    Metric::counter(
        PATCHES_TOTAL,
        &["outcome", "pool", "organ", "size", "contrast"],
        "patches sent to clients or handed to trainings of this server",
    ),
    Metric::counter(PATCHES_FAILED_TOTAL, &[], "patches that could not be made"),
    Metric::counter(
        PATCHES_REUSED_TOTAL,
        &[],
        "patches sent that had been made for another stream of the same recipe",
    ),
    Metric::counter(
        PATCHES_TAKEN_BACK_TOTAL,
        &[],
        "patches made for readers who stall, taken back for others and to be made again",
    ),
    Metric::counter(ATTEMPTS_TOTAL, &["organ"], "synthesis attempts behind those patches"),
    Metric::counter(
        GATE_ACCEPTED_TOTAL,
        &["organ", "size", "contrast"],
        "lesions that passed the gate, by the size and contrast that were asked for",
    ),
    Metric::counter(
        GATE_REJECTED_TOTAL,
        &["organ", "size", "contrast"],
        "lesions that the gate refused, by the size and contrast that were asked for",
    ),
    Metric::counter(
        HOST_SUSPECT_TOTAL,
        &["organ"],
        "attempts with a recognised lesion on a place that the critic already called tumour",
    ),
    Metric::counter(
        IGNORED_VOXELS_TOTAL,
        &["organ"],
        "voxels of unlabelled hosts that may hide a tumour and were sent as ignore",
    ),
    Metric::counter(
        UNPLACEABLE_TOTAL,
        &["organ"],
        "patches whose organ had no place for the lesion",
    ),
    Metric::counter(
        BORDERLINE_TOTAL,
        &[],
        "patches that another numerics class might decide otherwise",
    ),
    Metric::gauge(
        DEVICE_MEMORY_BYTES,
        &["kind"],
        "bytes of a GPU's memory in use by tensors, and reserved",
    )
    .measured_in(Unit::Bytes),
    Metric::counter(
        DEVICE_BATCHES_TOTAL,
        &[],
        "passes over the device, each for a batch of lesions",
    ),
    Metric::counter(
        DEVICE_CUBES_TOTAL,
        &[],
        "lesions in the batches of passes over the device",
    ),
    Metric::gauge(STREAMS_OPEN, &[], "streams open now"),
    Metric::counter(STREAMS_ENDED_TOTAL, &["reason"], "streams ended"),
    Metric::counter(SENT_BYTES_TOTAL, &[], "bytes of stream frames handed to connections").measured_in(Unit::Bytes),
    Metric::counter(HTTP_REQUESTS_TOTAL, &["route", "method", "status"], "requests answered"),
    Metric::seconds(
        HTTP_REQUEST_SECONDS,
        &["route"],
        "seconds to the first byte of an answer",
    ),
    Metric::counter(
        REFUSED_TOTAL,
        &["route"],
        "requests refused because too many were open, or too much work",
    ),
    Metric::gauge(CONNECTIONS_OPEN, &[], "connections open now"),
    Metric::counter(
        CONNECTIONS_REFUSED_TOTAL,
        &["reason"],
        "connections closed before a request: no place, or no TLS handshake",
    ),
    Metric::seconds(STAGE_SECONDS, &["stage"], "seconds spent in a stage of the work"),
    Metric::gauge(BUILD_INFO, &["version", "revision"], "the code that serves; always 1"),
    Metric::gauge(
        MODELS_INFO,
        &["bundle", "snapshot", "numerics"],
        "1 for the models and store behind the default recipe, 0 for those before them",
    ),
    Metric::gauge(
        PATCHES_IN_FLIGHT,
        &[],
        "patches that streams have asked for and not yet taken",
    ),
    Metric::gauge(TRAINING_LOSS, &["stage"], "a training's loss at its last report"),
    Metric::gauge(
        TRAINING_MEASURE,
        &["stage", "name"],
        "what a training's last step measured, by stage and name, as in its lines of metrics",
    ),
    Metric::gauge(
        TRAINING_DICE,
        &["class"],
        "a training's mean Dice score on held-out cases at its last validation",
    ),
    Metric::gauge(
        TRAINING_SENSITIVITY,
        &["organ", "size"],
        "share of true lesions that a segmentor in training found at its last validation",
    ),
    Metric::gauge(
        TRAINING_MIX,
        &[],
        "number of the mix that a steered training learns from; 0 is the recipe as configured",
    ),
    Metric::gauge(
        TRAINING_MIX_SHARE,
        &["of", "name"],
        "shares of a steered training's mix by organ and by size class",
    ),
    Metric::gauge(
        TRAINING_PATCHES_PER_SECOND,
        &[],
        "patches that the hosted training learnt from per second since its last report; 0 while none runs",
    ),
    Metric::gauge(TRAININGS_RUNNING, &[], "hosted trainings at work: 0 or 1"),
    Metric::gauge(TRAININGS_QUEUED, &[], "hosted trainings that wait for their turn"),
];

/// Installs the process's recorder, once, and returns what renders it.
pub fn install() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS_BUCKETS)
                .expect("the buckets are not empty")
                .build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder is installed; /metrics stays empty");
            }
            describe();
            handle
        })
        .clone()
}

fn describe() {
    for Metric {
        name, kind, unit, help, ..
    } in METRICS.iter().copied()
    {
        match kind {
            MetricKind::Counter => describe_counter!(name, unit, help),
            MetricKind::Gauge => describe_gauge!(name, unit, help),
            MetricKind::Histogram => describe_histogram!(name, unit, help),
        }
    }
    // Alerts look for an increase, which a counter that begins at its first failure does not show.
    counter!(PATCHES_FAILED_TOTAL).increment(0);
    counter!(STREAMS_ENDED_TOTAL, "reason" => "failed").increment(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_follow_the_rules() {
        let mut names: Vec<_> = METRICS.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), METRICS.len());
        for Metric { name, kind, unit, .. } in METRICS.iter().copied() {
            assert!(name.starts_with("freetumor_"), "{name}");
            assert_eq!(kind == MetricKind::Counter, name.ends_with("_total"), "{name}");
            let base = name.trim_end_matches("_total");
            assert_eq!(unit == Unit::Seconds, base.ends_with("_seconds"), "{name}");
            assert_eq!(unit == Unit::Bytes, base.ends_with("_bytes"), "{name}");
        }
    }

    #[test]
    fn a_timed_stage_is_rendered() {
        let handle = install();
        assert_eq!(Stage::Encode.time(|| 7), 7);
        let text = handle.render();
        assert!(
            text.contains("freetumor_stage_seconds_bucket{stage=\"encode\""),
            "{text}"
        );
    }
}
