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
}

impl Counter {
    /// Starts counting to `total`.
    pub(super) fn new(total: usize, what: &str) -> Self {
        let bar = bar(total as u64);
        bar.set_message(what.to_string());
        Self { bar }
    }

    /// Counts one more, named on a plain line where nobody sees the bar.
    pub(super) fn done(&self, item: &str) {
        self.bar.inc(1);
        if self.bar.is_hidden() {
            say_error(&format!(
                "[{}/{}] {item}",
                self.bar.position(),
                self.bar.length().unwrap_or(0)
            ));
        }
    }
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
