//! The measurements as JSON and as a table.

use serde::Serialize;

use super::measure::Measured;
use crate::cli::device::Compute;

/// Everything that was measured, and on what.
#[derive(Serialize)]
pub(super) struct Report {
    version: &'static str,
    cpu: String,
    cores: usize,
    threads: usize,
    device: String,
    numerics: String,
    rounds: u32,
    peak_gflops: f64,
    entries: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    name: String,
    milliseconds: f64,
    gflops: Option<f64>,
    share_of_peak: Option<f64>,
    resident_before_mib: Option<f64>,
    peak_memory_mib: Option<f64>,
    device_memory_mib: Option<f64>,
}

impl Report {
    /// Puts the measurements (name, billions of operations, result) together.
    pub(super) fn new(
        compute: &Compute,
        peak_gflops: f64,
        rounds: u32,
        measured: &[(String, Option<f64>, Measured)],
    ) -> Self {
        let line = |(name, gflop, measured): &(String, Option<f64>, Measured)| {
            let gflops = gflop.map(|gflop| 1e3 * gflop / measured.milliseconds);
            Line {
                name: name.clone(),
                milliseconds: measured.milliseconds,
                gflops,
                share_of_peak: gflops.map(|gflops| gflops / peak_gflops),
                resident_before_mib: measured.resident_before_mib,
                peak_memory_mib: measured.peak_memory_mib,
                device_memory_mib: measured.device_memory_mib,
            }
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            cpu: cpu(),
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            threads: rayon::current_num_threads(),
            device: compute.device_name(),
            numerics: compute.dtype.numerics(&compute.device),
            rounds,
            peak_gflops,
            entries: measured.iter().map(line).collect(),
        }
    }

    /// Returns a table for people.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{}, {} threads on {} cores, networks on {}, {}, peak {:.0} GFLOP/s, medians of {} rounds\n\n{:26} {:>10} {:>9} {:>8} {:>9}",
            self.cpu,
            self.threads,
            self.cores,
            self.device,
            self.numerics,
            self.peak_gflops,
            self.rounds,
            "entry",
            "ms",
            "GFLOP/s",
            "of peak",
            "peak MiB"
        );
        for line in &self.entries {
            let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
            text += &format!(
                "\n{:26} {:>10.2} {:>9} {:>8} {:>9}",
                line.name,
                line.milliseconds,
                or_dash(line.gflops.map(|v| format!("{v:.0}"))),
                or_dash(line.share_of_peak.map(|v| format!("{:.0} %", 100.0 * v))),
                or_dash(line.peak_memory_mib.map(|v| format!("{v:.0}"))),
            );
        }
        text
    }
}

/// Returns the processor's name, where the system tells it.
fn cpu() -> String {
    let info = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name"));
    name.and_then(|rest| rest.split_once(':'))
        .map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().into())
}
