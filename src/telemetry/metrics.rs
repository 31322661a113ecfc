//! Every metric, declared once: name, kind, labels and meaning.

use std::sync::OnceLock;
use std::time::Instant;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Patches sent, by `outcome`, `pool`, `organ`, and the first lesion's `size` and `contrast` (`none` without one).
pub const PATCHES_TOTAL: &str = "freetumor_patches_total";
/// Patches that could not be made and were sent marked `failed`.
pub const PATCHES_FAILED_TOTAL: &str = "freetumor_patches_failed_total";
/// Patches that were made once and sent to more than one stream, counted for each but the first.
pub const PATCHES_REUSED_TOTAL: &str = "freetumor_patches_reused_total";
/// Synthesis attempts behind the patches sent, by `organ`.
pub const ATTEMPTS_TOTAL: &str = "freetumor_attempts_total";
/// Lesions that passed the gate, by `organ`, `size` and `contrast`.
pub const GATE_ACCEPTED_TOTAL: &str = "freetumor_gate_accepted_total";
/// Attempts that the gate refused, by `organ`.
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
    /// The gate's critic, on the device.
    Gate,
    /// Augmentation.
    Augment,
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
            Self::Augment => "augment",
            Self::WaitForBatch => "wait_for_batch",
            Self::Encode => "encode",
            Self::WaitForClient => "wait_for_client",
        }
    }

    /// Runs `work` and records how long it took.
    pub fn time<T>(self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        histogram!(STAGE_SECONDS, "stage" => self.name()).record(start.elapsed());
        result
    }
}

/// Upper bounds of [`STAGE_SECONDS`]: from a memory-mapped read to a slow batch on a CPU.
const STAGE_BUCKETS: [f64; 12] = [0.0005, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

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

/// Every metric with its kind, labels and meaning; the documentation's table is made from it.
pub const METRICS: [(&str, MetricKind, &[&str], &str); 17] = {
    use MetricKind::{Counter, Gauge, Histogram};
    [
        (
            PATCHES_TOTAL,
            Counter,
            &["outcome", "pool", "organ", "size", "contrast"],
            "patches sent",
        ),
        (PATCHES_FAILED_TOTAL, Counter, &[], "patches that could not be made"),
        (
            PATCHES_REUSED_TOTAL,
            Counter,
            &[],
            "patches sent that had been made for another stream of the same recipe",
        ),
        (
            ATTEMPTS_TOTAL,
            Counter,
            &["organ"],
            "synthesis attempts behind the patches sent",
        ),
        (
            GATE_ACCEPTED_TOTAL,
            Counter,
            &["organ", "size", "contrast"],
            "lesions that passed the gate",
        ),
        (
            GATE_REJECTED_TOTAL,
            Counter,
            &["organ"],
            "attempts that the gate refused",
        ),
        (
            HOST_SUSPECT_TOTAL,
            Counter,
            &["organ"],
            "attempts on a place that the critic already called tumour",
        ),
        (
            IGNORED_VOXELS_TOTAL,
            Counter,
            &["organ"],
            "voxels of unlabelled hosts that may hide a tumour and were sent as ignore",
        ),
        (
            UNPLACEABLE_TOTAL,
            Counter,
            &["organ"],
            "patches whose organ had no place for the lesion",
        ),
        (
            BORDERLINE_TOTAL,
            Counter,
            &[],
            "patches that another numerics class might decide otherwise",
        ),
        (
            DEVICE_MEMORY_BYTES,
            Gauge,
            &["kind"],
            "bytes of a GPU's memory in use by tensors, and reserved",
        ),
        (STREAMS_OPEN, Gauge, &[], "streams open now"),
        (STREAMS_ENDED_TOTAL, Counter, &["reason"], "streams ended"),
        (SENT_BYTES_TOTAL, Counter, &[], "bytes handed to connections"),
        (
            HTTP_REQUESTS_TOTAL,
            Counter,
            &["route", "method", "status"],
            "requests answered",
        ),
        (
            REFUSED_TOTAL,
            Counter,
            &["route"],
            "requests refused because too many were open",
        ),
        (
            STAGE_SECONDS,
            Histogram,
            &["stage"],
            "seconds spent in a stage of the work",
        ),
    ]
};

/// Installs the process's recorder, once, and returns what renders it.
pub fn install() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Full(STAGE_SECONDS.into()), &STAGE_BUCKETS)
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
    for (name, kind, _, text) in METRICS {
        match kind {
            MetricKind::Counter => describe_counter!(name, text),
            MetricKind::Gauge => describe_gauge!(name, text),
            MetricKind::Histogram => describe_histogram!(name, Unit::Seconds, text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_ours() {
        let mut names: Vec<_> = METRICS.iter().map(|metric| metric.0).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), METRICS.len());
        assert!(names.iter().all(|name| name.starts_with("freetumor_")));
        for (name, kind, ..) in METRICS {
            assert_eq!(kind == MetricKind::Counter, name.ends_with("_total"), "{name}");
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
