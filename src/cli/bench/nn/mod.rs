//! `freetumor bench nn`: what the operators and networks cost on this machine.

mod entries;
mod measure;
mod report;

use std::process::ExitCode;

use anyhow::{Context, ensure};

use self::measure::Measured;
use self::report::Report;
use crate::cli::device::DeviceArgs;
use crate::cli::progress::Counter;
use crate::cli::{say, say_json};

/// Measure operators and networks, forward and in training
///
/// Examples:
///   freetumor bench nn
///   freetumor bench nn --device cuda:0 --compute-dtype bf16
///   freetumor bench nn --json --rounds 9 --only basicunet_96 --only conv3d
///
/// Milliseconds are medians of the rounds after a warm-up; a short run is repeated until its round takes 0.1 s. GFLOP/s
/// count the multiply-adds of direct convolution twice, and those of a training step as three forward passes, whatever
/// the kernels really do: a fast algorithm may show more than the peak. The peak is the best of a few products of
/// matrices. Peak memory is the process's while the entry ran; run an entry alone (--only) to keep what others left out.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Rounds per entry
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[command(flatten)]
    device: DeviceArgs,
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Measure only entries whose names begin so; may be given again
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(threads) = args.threads {
        // The global pool, because that is where the kernels run when the server calls them.
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.into())
            .build_global()
            .context("--threads: the thread pool is already running")?;
    }
    let compute = args.device.open()?;
    let mut entries = entries::all(&compute);
    let names = entries.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>();
    if !args.only.is_empty() {
        entries.retain(|entry| args.only.iter().any(|only| entry.name.starts_with(only.as_str())));
    }
    ensure!(
        !entries.is_empty(),
        "--only: expected the beginning of one of {}, got {}",
        names.join(", "),
        args.only.join(", ")
    );
    let peak_gflops = measure::peak_gflops(&compute);
    let counter = Counter::new(entries.len(), "measuring");
    let mut measured: Vec<(String, Option<f64>, Measured)> = Vec::new();
    for entry in entries {
        let one = measure::measure(&entry, args.rounds, &compute.device);
        counter.done(&entry.name);
        measured.push((entry.name, entry.gflop, one));
    }
    let report = Report::new(&compute, peak_gflops, args.rounds, &measured);
    if args.json {
        say_json(&report)?;
    } else {
        say(&report.table());
    }
    Ok(ExitCode::SUCCESS)
}
