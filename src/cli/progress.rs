//! Progress of long work: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::say_error;
use crate::learn::{Metrics, Progress};

/// How often work that is not watched on a terminal says where it is.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Counts finished items.
pub(super) struct Counter {
    bar: ProgressBar,
    started: Instant,
}

impl Counter {
    /// Starts counting to `total`.
    pub(super) fn new(total: usize, what: &str) -> Self {
        let bar = bar(total as u64);
        bar.set_message(what.to_string());
        Self {
            bar,
            started: Instant::now(),
        }
    }

    /// Counts one more, named on a plain line where nobody sees the bar.
    pub(super) fn done(&self, item: &str) {
        self.bar.inc(1);
        if self.bar.is_hidden() {
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let pace = pace(done, total, self.started.elapsed());
            say_error(&format!("[{done}/{total}] {item}  {pace}"));
        }
    }
}

/// Says how fast items were done so far, and how long the rest takes at that pace.
fn pace(done: u64, total: u64, elapsed: Duration) -> String {
    let seconds_each = elapsed.as_secs_f64() / done.max(1) as f64;
    let left = (seconds_each * total.saturating_sub(done) as f64).ceil() as u64;
    let eta = match (left / 3600, left / 60 % 60, left % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m {seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h {minutes:02}m"),
    };
    format!("{seconds_each:.1} s each, eta {eta}")
}

fn bar(total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
    }
    let style =
        ProgressStyle::with_template("{msg:24} {bar:40} {pos}/{len} {per_sec} eta {eta}").expect("a valid template");
    ProgressBar::new(total).with_style(style)
}

/// Shows a training run and listens for SIGTERM and SIGINT.
pub(super) struct Training {
    bar: Option<ProgressBar>,
    said: Option<Instant>,
    stop: Arc<AtomicBool>,
}

impl Training {
    /// Starts watching.
    pub(super) fn new() -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        Ok(Self {
            bar: None,
            said: None,
            stop,
        })
    }
}

fn short(metrics: &Metrics) -> String {
    let parts: Vec<String> = metrics
        .iter()
        .map(|(name, value)| format!("{name} {value:.4}"))
        .collect();
    parts.join("  ")
}

impl Progress for Training {
    fn on_step(&mut self, stage: &str, step: u64, steps: u64, metrics: &Metrics) {
        let bar = self.bar.get_or_insert_with(|| bar(steps));
        // One after the other, runs may be of different lengths.
        bar.set_length(steps);
        bar.set_position(step);
        bar.set_message(format!("{stage}  {}", short(metrics)));
        let due = self.said.is_none_or(|said| said.elapsed() >= LINE_EVERY) || step == steps;
        if bar.is_hidden() && due {
            self.said = Some(Instant::now());
            say_error(&format!("{stage} step {step}/{steps}  {}", short(metrics)));
        }
    }

    fn on_note(&mut self, note: &str) {
        say_error(note);
    }

    fn should_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_says_what_one_took_and_what_is_left() {
        let after = |seconds| Duration::from_secs(seconds);
        assert_eq!(pace(2, 5, after(3)), "1.5 s each, eta 5s");
        assert_eq!(pace(10, 100, after(20)), "2.0 s each, eta 3m 00s");
        assert_eq!(pace(1, 1001, after(30)), "30.0 s each, eta 8h 20m");
        assert_eq!(pace(4, 4, after(2)), "0.5 s each, eta 0s");
    }
}
