//! The training stages on a store of toy volumes: a cubic organ with ball-shaped tumours.

mod critic;
mod fitting;
mod segmentor;
mod steering;
mod synthesizer;
#[path = "../toy/mod.rs"]
mod toy;
#[path = "../toy/service.rs"]
mod toy_service;

use std::path::Path;
use std::sync::LazyLock;

use burn::tensor::Device;
use freetumor::checkpoint::Role;
use freetumor::evaluate::HeldOutSettings;
use freetumor::kernel::ComputeDtype;
use freetumor::learn::{CriticConfig, Job, Metrics, Progress};
use freetumor::store::Cases;

/// Stops after a number of steps.
struct StopAfter(u64, u64);

impl Progress for StopAfter {
    fn on_step(&mut self, _stage: &str, step: u64, _steps: u64, _metrics: &Metrics) {
        self.1 = step;
    }
    fn on_note(&mut self, _note: &str) {}
    fn should_stop(&self) -> bool {
        self.1 >= self.0
    }
}

/// Stops once a note begins with some words.
struct StopAt(&'static str, bool);

impl Progress for StopAt {
    fn on_step(&mut self, _stage: &str, _step: u64, _steps: u64, _metrics: &Metrics) {}
    fn on_note(&mut self, note: &str) {
        self.1 |= note.starts_with(self.0);
    }
    fn should_stop(&self) -> bool {
        self.1
    }
}

/// Hears the notes of a run.
struct Notes(Vec<String>);

impl Progress for Notes {
    fn on_step(&mut self, _stage: &str, _step: u64, _steps: u64, _metrics: &Metrics) {}
    fn on_note(&mut self, note: &str) {
        self.0.push(note.into());
    }
    fn should_stop(&self) -> bool {
        false
    }
}

fn critic_config(steps: u64) -> CriticConfig {
    let mut config = CriticConfig {
        widths: vec![4, 8],
        steps,
        voxels_per_step: 2 * 16 * 16 * 16,
        max_cube: 16,
        ..CriticConfig::default()
    };
    config.optimizer.learning_rate = 1e-2;
    config.optimizer.warmup = 2;
    config.held_out = HeldOutSettings {
        cases: 1,
        ..HeldOutSettings::default()
    };
    config.held_out.window.window = [16; 3];
    config
}

fn weights(out: &Path, role: Role) -> Vec<u8> {
    std::fs::read(out.join(format!("{}.safetensors", role.name()))).expect("the stage saved its weights")
}

/// A job on the CPU.
fn job<'a>(cases: &'a dyn Cases, out: &'a Path, resume: bool, progress: &'a mut dyn Progress) -> Job<'a> {
    static DEVICE: LazyLock<Device> = LazyLock::new(Device::flex);
    Job {
        cases,
        out,
        resume,
        device: &DEVICE,
        dtype: ComputeDtype::F32,
        progress,
    }
}
