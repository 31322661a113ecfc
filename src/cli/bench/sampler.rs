//! `freetumor bench sampler`: how fast the in-process stream yields real, augmented patches.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::cli::{say, say_json};
use crate::store::{Store, StoreConfig};
use crate::stream::delivery::Delivery;
use crate::stream::recipe::Recipe;
use crate::stream::{PatchService, StreamConfig, Streams};

/// Patches that open the files and fault their pages in.
const WARM_UP: u64 = 100;

/// Measure the whole way of a real patch: schedule, crop around an organ or tumour, read, augment
///
/// Every patch is mirrored or not along each axis, turned by 90 degrees or not, and changed in intensity or not, each with
/// probability 1/2. No lesion is synthesized and nothing is encoded.
///
/// Example: freetumor bench sampler --store store --threads 2 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The store's folder
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Threads that prepare patches
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: usize,
    /// Voxels along each side of a patch
    #[arg(long, default_value_t = 96)]
    side: usize,
    /// Memory for unpacked chunks, in MiB
    #[arg(long, value_name = "MIB", default_value_t = StoreConfig::default().cache_mib)]
    cache_mib: u64,
    /// Patches to take
    #[arg(long, default_value_t = 2000)]
    patches: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let store = Store::open(&args.store).with_context(|| format!("cannot open {}", args.store.display()))?;
    let store = store.with_config(&StoreConfig {
        cache_mib: args.cache_mib,
    });
    let config = StreamConfig {
        preparation_threads: args.threads,
        ..StreamConfig::default()
    };
    let streams = Streams::start(Arc::new(store), None, config)?;
    let side = args.side;
    let recipe: Recipe = serde_json::from_value(serde_json::json!({
        "synthesizer": "analytic",
        "gate": {"enabled": false},
        "pools": {"labelled_real": 1.0},
        "patch": [side, side, side],
        "patches_per_epoch": args.patches + WARM_UP,
        "augment": {"flip": [0.5, 0.5, 0.5], "rotate90": 0.5, "intensity": 0.5},
    }))?;
    let recipe = streams.resolve(recipe)?;
    let mut stream = streams.open(&recipe, &Delivery::default())?;
    let mut take = |patches: u64| -> anyhow::Result<()> {
        let mut taken = 0;
        while taken < patches {
            let Some(batch) = stream.next_batch() else {
                bail!("the stream ended after {taken} of {patches} patches");
            };
            taken += batch?.patches.len() as u64;
        }
        Ok(())
    };
    take(WARM_UP)?;
    let start = Instant::now();
    take(args.patches)?;
    let per_s = args.patches as f64 / start.elapsed().as_secs_f64();
    if args.json {
        say_json(&serde_json::json!({"patches_per_s": per_s, "threads": args.threads, "side": side}))?;
    } else {
        say(&format!("{per_s:.0} patches/s of {side}^3 on {} threads", args.threads));
    }
    Ok(ExitCode::SUCCESS)
}
