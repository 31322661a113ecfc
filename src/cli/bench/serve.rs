//! `freetumor bench serve`: what the way from a patch in memory to a client costs.

use std::io::Read;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ndarray::Array3;

use crate::cli::{say, say_json};
use crate::digest::Digest;
use crate::http::{Server, ServerConfig};
use crate::rng::{Purpose, Rng};
use crate::sampler::Pool;
use crate::stream::delivery::{Codec, Delivery, ImageType};
use crate::stream::encoded::Encoded;
use crate::stream::patch::{Outcome, PatchMeta, StreamedPatch};
use crate::stream::recipe::{REVISION, Recipe};
use crate::stream::{Batch, PatchService, PatchStream, Resolved, StreamError};
use crate::volume::{Affine, Plan, Region};
use crate::wire::reader::{self, Message};

/// How many different patches are sent in turn: more than any cache holds of 96^3.
const PREPARED: usize = 16;
/// The most memory for patches that are sent once.
const MAX_ONCE_BYTES: usize = 8 << 30;
/// Batches that fill buffers before the clock starts.
const WARM_UP: usize = 20;

/// Measure the wire: patches that lie ready in memory go through encoder, HTTP and loopback to one client
///
/// The client reads every frame and checks every CRC-32. With --listen, the server waits for other clients, such as
/// benches/peers/serve.py, until its standard input ends.
///
/// Example: freetumor bench serve --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Voxels along each side of a patch
    #[arg(long, default_value_t = 96)]
    side: usize,
    /// Patches in a batch
    #[arg(long, default_value_t = 2)]
    batch_size: u32,
    /// Patches to take
    #[arg(long, default_value_t = 4000)]
    patches: usize,
    /// Send f32 instead of f16 images
    #[arg(long)]
    single: bool,
    /// Compress with zstd
    #[arg(long)]
    zstd: bool,
    /// Convert and hash every patch, as those that one stream alone takes: all are prepared beforehand, in 3 bytes a voxel, for
    /// one client. Otherwise 16 are sent again and again, converted and hashed the first time
    #[arg(long)]
    once: bool,
    /// Print the address and serve other clients until standard input ends
    #[arg(long)]
    listen: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    ensure!(
        (1..=192).contains(&args.side),
        "--side: expected 1 to 192, got {}",
        args.side
    );
    let once_bytes = sent(args) * args.side.pow(3) * 3;
    ensure!(
        !args.once || once_bytes <= MAX_ONCE_BYTES,
        "--patches: with --once, expected what 8 GiB hold, got {} GiB",
        once_bytes >> 30
    );
    let config = ServerConfig {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        ..ServerConfig::default()
    };
    let server = Server::start(config, Recipe::default(), Arc::new(Ready::new(args)))?;
    let url = format!("http://{}", server.address());
    if args.listen {
        say(&url);
        std::io::stdin().lock().read_to_end(&mut Vec::new())?;
    } else {
        let measured = measure(args, &url)?;
        tell(args, &measured)?;
    }
    server.drain().start();
    server.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the batches that are measured.
fn batches(args: &Args) -> usize {
    args.patches.div_ceil(args.batch_size.max(1) as usize).max(1)
}

/// Returns the patches of all batches, those before the clock starts too.
fn sent(args: &Args) -> usize {
    (batches(args) + WARM_UP) * args.batch_size as usize
}

/// What a client saw.
struct Measured {
    patches: usize,
    bytes: u64,
    took: Duration,
    /// Between batches, sorted.
    waits: Vec<Duration>,
}

fn measure(args: &Args, url: &str) -> anyhow::Result<Measured> {
    let batches = batches(args);
    let delivery = Delivery {
        batch_size: args.batch_size,
        count: Some((batches + WARM_UP) as u64),
        image: if args.single { ImageType::F32 } else { ImageType::F16 },
        codec: if args.zstd { Codec::Zstd } else { Codec::Raw },
        ..Delivery::default()
    };
    let body = serde_json::json!({ "delivery": delivery }).to_string();
    let response = ureq::post(format!("{url}/v1/stream")).send(body)?;
    let mut frames = response.into_body().into_reader();
    let mut waits = Vec::with_capacity(batches);
    let (mut bytes, mut last, mut seen) = (0, Instant::now(), 0);
    while let Some(message) = reader::read(&mut frames)? {
        if let Message::Batch { tensors, .. } = message {
            seen += 1;
            if seen > WARM_UP {
                waits.push(last.elapsed());
                bytes += tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum::<u64>();
            }
            last = Instant::now();
        }
    }
    ensure!(waits.len() == batches, "the stream ended after {seen} batches");
    let took = waits.iter().sum();
    waits.sort_unstable();
    Ok(Measured {
        patches: batches * args.batch_size as usize,
        bytes,
        took,
        waits,
    })
}

fn tell(args: &Args, measured: &Measured) -> anyhow::Result<()> {
    let Measured {
        patches,
        bytes,
        took,
        waits,
    } = measured;
    let seconds = took.as_secs_f64();
    let (per_s, mb_per_s) = (*patches as f64 / seconds, *bytes as f64 / seconds / 1e6);
    let wait_ms = |percent: usize| {
        let at = (waits.len() * percent / 100).min(waits.len() - 1);
        waits.get(at).map(|wait| wait.as_secs_f64() * 1e3)
    };
    let (p50, p99) = wait_ms(50).zip(wait_ms(99)).context("no batch was measured")?;
    if args.json {
        return say_json(&serde_json::json!({
            "patches_per_s": per_s, "mb_per_s": mb_per_s, "batch_p50_ms": p50, "batch_p99_ms": p99,
            "side": args.side, "batch_size": args.batch_size,
            "image": if args.single { "f32" } else { "f16" }, "codec": if args.zstd { "zstd" } else { "raw" },
        }));
    }
    say(&format!(
        "{per_s:.0} patches/s of {}^3, {mb_per_s:.0} MB/s, a batch every {p50:.2} ms (p99 {p99:.2} ms)",
        args.side
    ));
    Ok(())
}

/// A service whose patches lie ready.
struct Ready {
    plan: Plan,
    patches: Arc<Source>,
}

impl Ready {
    fn new(args: &Args) -> Self {
        let patches = (0..PREPARED as u64).map(|index| Arc::new(noise(index, args.side)));
        let patches: Vec<_> = patches.collect();
        Self {
            plan: Plan {
                patch: [args.side; 3],
                ..Plan::default()
            },
            patches: Arc::new(if args.once {
                let copies = (0..sent(args)).map(|n| Arc::new(bare_copy(&patches[n % PREPARED])));
                Source::Once(Mutex::new(copies.collect()))
            } else {
                Source::Again(patches)
            }),
        }
    }
}

/// Patches in memory.
enum Source {
    /// Sent in turn.
    Again(Vec<Arc<StreamedPatch>>),
    /// Each sent to one stream and gone.
    Once(Mutex<Vec<Arc<StreamedPatch>>>),
}

impl Source {
    fn batch(&self, first: u64, size: u64) -> Option<Vec<Arc<StreamedPatch>>> {
        match self {
            Self::Again(patches) => Some(
                (first..first + size)
                    .map(|n| patches[n as usize % PREPARED].clone())
                    .collect(),
            ),
            Self::Once(patches) => {
                let mut left = patches.lock().unwrap_or_else(PoisonError::into_inner);
                let rest = left.len().checked_sub(size as usize)?;
                Some(left.split_off(rest))
            }
        }
    }
}

/// Copies image and labels; nobody asks for the rest.
fn bare_copy(patch: &StreamedPatch) -> StreamedPatch {
    StreamedPatch {
        meta: patch.meta.clone(),
        image: patch.image.clone(),
        label: patch.label.clone(),
        source: Array3::zeros([0; 3]),
        soft_mask: Array3::zeros([0; 3]),
        lesion_instance: Array3::zeros([0; 3]),
        undecided: None,
        encoded: Encoded::default(),
    }
}

/// Returns a patch of HU all over the window and beyond, and labels in blocks.
fn noise(index: u64, side: usize) -> StreamedPatch {
    let shape = (side, side, side);
    let mut rng = Rng::keyed(index, 0, 0, Purpose::Test);
    let image = Array3::from_shape_simple_fn(shape, || rng.below(600) as i16 - 300);
    StreamedPatch {
        meta: PatchMeta {
            index,
            case: format!("case-{index}"),
            pool: Pool::LabelledReal,
            organ: "liver".into(),
            region: Region::whole([side; 3]),
            affine: Affine::axis_aligned([1.5; 3], [0.0; 3]),
            outcome: Outcome::Real,
            attempts: 0,
            host_suspect: 0,
            ignored_voxels: 0,
            labels_by: String::new(),
            borderline: false,
            lesions: Vec::new(),
            failed: None,
            asked: None,
        },
        source: image.clone(),
        image,
        label: Array3::from_shape_fn(shape, |(z, y, x)| ((z / 8 + y / 8 + x / 8) % 3) as u8),
        soft_mask: Array3::zeros(shape),
        lesion_instance: Array3::zeros(shape),
        undecided: None,
        encoded: Encoded::default(),
    }
}

impl PatchService for Ready {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn resolve(&self, mut recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        recipe.validate()?;
        let patches_per_epoch = recipe.patches_per_epoch.unwrap_or(1 << 40);
        Ok(Arc::new(Resolved {
            hash: recipe.hash(),
            snapshot: Digest::default(),
            bundle: Digest::default(),
            models: None,
            revision: REVISION,
            patches_per_epoch,
            patch: self.plan.patch,
            labels: self.plan.labels.clone(),
            feasible: std::collections::BTreeMap::new(),
            shortfall: Vec::new(),
            numerics: "none".into(),
            recipe: {
                recipe.patch = Some(self.plan.patch);
                recipe
            },
        }))
    }

    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        Ok(Box::new(ReadyStream {
            patches: self.patches.clone(),
            recipe: recipe.clone(),
            batch: u64::from(delivery.batch_size),
            sent: 0,
            batches: delivery
                .count
                .unwrap_or(recipe.patches_per_epoch / u64::from(delivery.batch_size.max(1))),
        }))
    }
}

struct ReadyStream {
    patches: Arc<Source>,
    recipe: Arc<Resolved>,
    batch: u64,
    sent: u64,
    batches: u64,
}

impl PatchStream for ReadyStream {
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
        if self.sent == self.batches {
            return None;
        }
        let first = self.sent * self.batch;
        let patches = self.patches.batch(first, self.batch)?;
        self.sent += 1;
        Some(Ok(Batch {
            step: self.sent - 1,
            patches,
            reused: Vec::new(),
            shape: self.recipe.patch,
            next: self.recipe.cursor(first + self.batch),
        }))
    }

    fn batches(&self) -> u64 {
        self.batches
    }
}
