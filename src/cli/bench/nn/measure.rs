//! Time and memory of one entry, and the speed of a product of matrices to hold them against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};

use super::entries::Entry;
use crate::cli::device::Compute;

/// A round shorter than this repeats its run: single runs of some milliseconds scatter too much.
const MIN_ROUND: Duration = Duration::from_millis(100);

/// What came out for an entry.
pub(super) struct Measured {
    /// Median of the rounds.
    pub(super) milliseconds: f64,
    /// Resident memory before the entry began; nothing where the system does not tell.
    pub(super) resident_before_mib: Option<f64>,
    /// A GPU's memory after it, reserved by the allocator; nothing on the CPU.
    pub(super) device_memory_mib: Option<f64>,
    /// Largest resident memory while it ran, everything in the process included.
    pub(super) peak_memory_mib: Option<f64>,
}

/// Warms up, then runs an entry for a number of rounds.
pub(super) fn measure(entry: &Entry, rounds: u32, device: &Device) -> Measured {
    let resets = reset_peak_memory();
    let resident_before_mib = memory_mib("VmRSS:");
    let mut work = (entry.prepare)();
    let mut run = || {
        work();
        wait(device);
    };
    run();
    let mut milliseconds: Vec<f64> = (0..rounds).map(|_| round(&mut run)).collect();
    milliseconds.sort_by(f64::total_cmp);
    Measured {
        milliseconds: milliseconds[milliseconds.len() / 2],
        resident_before_mib,
        device_memory_mib: (device.memory_pool_usage()).map(|usage| usage.bytes_reserved as f64 / f64::from(1 << 20)),
        peak_memory_mib: resets.then(|| memory_mib("VmHWM:")).flatten(),
    }
}

/// Waits until a GPU has done what it was given; the CPU has.
fn wait(device: &Device) {
    device.sync().expect("a device that works");
}

/// Returns the mean milliseconds of as many runs as a round needs.
fn round(run: &mut dyn FnMut()) -> f64 {
    let (start, mut runs) = (Instant::now(), 0);
    loop {
        run();
        runs += 1;
        let elapsed = start.elapsed();
        if elapsed >= MIN_ROUND {
            return 1e3 * elapsed.as_secs_f64() / f64::from(runs);
        }
    }
}

/// Returns the best speed of products of 2048 x 2048 matrices.
pub(super) fn peak_gflops(compute: &Compute) -> f64 {
    let (side, device) = (2048_usize, &compute.device);
    let matrix = || {
        let ones = compute.dtype.enter(Tensor::ones([1, 1, 1, side, side], device));
        ones.reshape([side, side])
    };
    let (a, b): (Tensor<2>, Tensor<2>) = (matrix(), matrix());
    let mut run = || {
        drop(black_box(a.clone().matmul(b.clone())));
        wait(device);
    };
    run();
    let fastest = (0..5).map(|_| round(&mut run)).fold(f64::INFINITY, f64::min);
    2e-6 * side.pow(3) as f64 / fastest
}

/// Starts the peak of resident memory anew; tells whether the system can.
fn reset_peak_memory() -> bool {
    fs_err::write("/proc/self/clear_refs", "5").is_ok()
}

/// Returns a figure of the system's account of this process, in MiB: `VmRSS:` is what is resident, `VmHWM:` the most that
/// was since the last reset.
fn memory_mib(key: &str) -> Option<f64> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_of_memory_is_seen_after_it_was_given_back() {
        if !reset_peak_memory() {
            return;
        }
        // Other tests of the process take memory and give it back meanwhile: only what is held here is sure.
        let held = black_box(vec![1_u8; 256 << 20]);
        let resident = memory_mib("VmRSS:").unwrap();
        drop(held);
        let peak = memory_mib("VmHWM:").unwrap();
        assert!(resident > 250.0 && peak > resident - 1.0, "{resident} {peak}");
    }
}
