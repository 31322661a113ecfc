//! `freetumor demo`: everything at once, without data: phantom store, bundled models, server.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use super::device::Compute;
use super::models::{open_models, open_store, start_service};
use super::{phantom, say, say_error};
use crate::config::{self, Config};
use crate::http::Server;
use crate::wire::proto::{BatchHeader, Outcome};
use crate::wire::reader::{self, Message, Tensor};

/// The demo's configuration, the same as `configs/demo.toml`.
const CONFIG: &str = include_str!("../../configs/demo.toml");
/// The bundled models; `docs/demo-models.md` says how they were made.
const MODELS: [(&str, &[u8]); 6] = [
    ("critic.json", include_bytes!("../../assets/demo/critic.json")),
    (
        "critic.safetensors",
        include_bytes!("../../assets/demo/critic.safetensors"),
    ),
    ("generator.json", include_bytes!("../../assets/demo/generator.json")),
    (
        "generator.safetensors",
        include_bytes!("../../assets/demo/generator.safetensors"),
    ),
    (
        "discriminator.json",
        include_bytes!("../../assets/demo/discriminator.json"),
    ),
    (
        "discriminator.safetensors",
        include_bytes!("../../assets/demo/discriminator.safetensors"),
    ),
];
/// Labelled and healthy phantoms of the demo's store. Their seed is not that of the models' training set.
const CASES: [usize; 2] = [4, 8];
const SEED: u64 = 1;
/// Patches that `--check` looks at.
const CHECKED: u64 = 8;

/// Serve a phantom store with the bundled models: everything at once, no data needed
///
/// Examples:
///   freetumor demo
///   freetumor demo --check      streams 8 patches to itself, checks them, prints one JSON line, exits 0
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Stream to ourselves, check that only lesions changed, print one line of JSON and exit
    #[arg(long)]
    check: bool,
    /// Where store and models are put; kept and used again
    #[arg(long, value_name = "DIR", default_value = "freetumor-demo")]
    dir: PathBuf,
    /// Where to listen [default: 127.0.0.1:8080; with --check a free port]
    #[arg(long, value_name = "ADDR")]
    bind: Option<SocketAddr>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let mut config = demo_config(&args.dir)?;
    let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
    config.server.bind = args.bind.unwrap_or_else(|| loopback(if args.check { 0 } else { 8080 }));
    let store_dir = args.dir.join("store");
    let cases = phantom::make(&store_dir, &config, CASES, SEED)?;
    let models_dir = args.dir.join("models");
    unpack_models(&models_dir)?;
    let store = open_store(&store_dir, &config)?;
    let bundle = open_models(Some(&models_dir), &Compute::cpu())?;
    let (service, recipe) = start_service(&config, store.clone(), bundle)?;
    let server = super::serve::start(&config, &store, (service, recipe), None)?;
    if args.check {
        let summary = check(&server, started)?;
        say(&serde_json::to_string(&summary)?);
        return Ok(ExitCode::SUCCESS);
    }
    greet(&server, cases);
    server.wait()?;
    Ok(ExitCode::SUCCESS)
}

fn demo_config(dir: &Path) -> anyhow::Result<Config> {
    fs_err::create_dir_all(dir)?;
    let path = dir.join("demo.toml");
    fs_err::write(&path, CONFIG)?;
    let config = config::load(Some(&path), super::environment()?)?;
    config.log.start()?;
    Ok(config)
}

fn unpack_models(dir: &Path) -> anyhow::Result<()> {
    fs_err::create_dir_all(dir)?;
    for (name, bytes) in MODELS {
        fs_err::write(dir.join(name), bytes)?;
    }
    Ok(())
}

fn greet(server: &Server, cases: usize) {
    let url = format!("http://{}", server.address());
    say(&format!("serving {cases} phantom cases on {url}\n"));
    say(&format!(
        "  curl -o batch.npz '{url}/v1/batch?index=0&batch_size=2&format=npz&outputs=source,soft_mask'\n"
    ));
    say("  pip install ./python");
    say(&format!(
        "  python -c 'import freetumor; [print(b.image.shape, b.meta[0].outcome) for b in freetumor.stream(\"{url}\", count=10)]'\n"
    ));
    say("Ctrl-C ends.");
}

/// What `--check` found.
#[derive(Debug, Default, Serialize)]
struct Summary {
    patches: u64,
    accepted: u64,
    real: u64,
    fallback: u64,
    lesion_voxels: u64,
    attempts: u64,
    seconds_to_first_accepted: Option<f64>,
    seconds: f64,
}

/// Streams patches over HTTP and checks that only lesions changed (promise P5); checksums are checked by the reader.
fn check(server: &Server, started: Instant) -> anyhow::Result<Summary> {
    let url = format!("http://{}/v1/stream", server.address());
    let body = serde_json::json!({"delivery": {
        "batch_size": 1, "count": CHECKED, "image": "i16", "outputs": ["source", "soft_mask"],
    }});
    let answer = ureq::post(&url)
        .header("Content-Type", "application/json")
        .send(body.to_string().as_bytes());
    let mut frames = answer
        .with_context(|| format!("cannot stream from {url}"))?
        .into_body()
        .into_reader();
    let mut summary = Summary::default();
    while let Some(message) = next(&mut frames)? {
        match message {
            Message::Batch { header, tensors } => {
                inspect(&header, &tensors, &mut summary)?;
                if summary.accepted > 0 && summary.seconds_to_first_accepted.is_none() {
                    summary.seconds_to_first_accepted = Some(started.elapsed().as_secs_f64());
                }
                say_error(&format!("patch {}/{CHECKED}", summary.patches));
            }
            Message::Error(error) => bail!("the stream failed: {}: {}", error.title, error.detail),
            Message::End(_) => {
                ensure!(
                    summary.patches == CHECKED,
                    "the stream ended after {} patches",
                    summary.patches
                );
                summary.seconds = started.elapsed().as_secs_f64();
                return Ok(summary);
            }
            Message::Header(_) | Message::Heartbeat(_) => {}
        }
    }
    bail!("the connection was cut after {} patches", summary.patches)
}

fn next(frames: &mut impl Read) -> anyhow::Result<Option<Message>> {
    reader::read(frames).context("a damaged frame")
}

fn inspect(header: &BatchHeader, tensors: &[Tensor], summary: &mut Summary) -> anyhow::Result<()> {
    let meta = header.patches.first().context("a batch without provenance")?;
    let tensor = |name: &str| {
        let found = tensors.iter().find(|tensor| tensor.name == name);
        found
            .map(|tensor| &tensor.bytes[..])
            .with_context(|| format!("no tensor {name}"))
    };
    let (image, source, soft, label) = (
        tensor("image")?,
        tensor("source")?,
        tensor("soft_mask")?,
        tensor("label")?,
    );
    ensure!(
        image.len() == 2 * soft.len() && source.len() == image.len(),
        "tensors of different shapes"
    );
    for (voxel, (mask, pair)) in soft
        .iter()
        .zip(image.chunks_exact(2).zip(source.chunks_exact(2)))
        .enumerate()
    {
        ensure!(
            *mask > 0 || pair.0 == pair.1,
            "patch {}: voxel {voxel} changed outside the lesion",
            meta.index
        );
        // Tumour ids are even in the demo's label map: one above their organ's.
        let is_tumour = label[voxel] != 255 && label[voxel] > 0 && label[voxel] % 2 == 0;
        ensure!(
            *mask < 128 || is_tumour,
            "patch {}: voxel {voxel} of the lesion is not labelled",
            meta.index
        );
    }
    summary.patches += 1;
    summary.attempts += u64::from(meta.attempts);
    summary.lesion_voxels += soft.iter().filter(|mask| **mask >= 128).count() as u64;
    match meta.outcome() {
        Outcome::Accepted => summary.accepted += 1,
        Outcome::Real => summary.real += 1,
        _ => summary.fallback += 1,
    }
    Ok(())
}
