//! `freetumor predict`: labels by a model for scans, on their own grids.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};

use super::device::{Compute, DeviceArgs};
use super::models::{Network, Segmenting, WindowArgs, open_store};
use super::progress::Counter;
use super::{ConfigArgs, check_folder, say, say_error};
use crate::evaluate::Predictor;
use crate::ingest::{IngestConfig, datalist, labels_on_source, read_planned, write_on_source};
use crate::store::{Cases, check_id};
use crate::volume::Region;

/// Predict the labels of scans with a trained critic or segmentor, as NIfTI on the scans' own grids
///
/// A scan is brought to the model's grid as ingest does, predicted window by window, and the classes' probabilities are
/// interpolated back; every voxel takes the likeliest class. A NIfTI file's header is kept where it says where voxels lie; for
/// DICOM and stored cases the affine is written in double precision, as NIfTI-2. Ids are the model's, which are printed.
///
/// Examples:
///   freetumor predict --models assets/demo --network critic --image ct.nii.gz --out labels.nii.gz
///   freetumor predict --config configs/demo.toml --models models --datalist dataset.json --out predictions
///   freetumor predict --models models --store store --out predictions --flips z,y,x
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["image", "datalist", "store"])))]
pub(super) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The folder of models
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// Which network of the folder [default: the segmentor where there is one, else the critic]
    #[arg(long, value_enum)]
    network: Option<Network>,
    /// One scan: a NIfTI file, or the folder of a DICOM series
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// Medical Segmentation Decathlon JSON; the images of its lists training, validation, unlabeled and test are predicted
    #[arg(long, value_name = "FILE")]
    datalist: Option<PathBuf>,
    /// All cases of a store, on the grids of the files they came from
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Where labels are written: a .nii or .nii.gz file for --image, else a folder that gets one .nii.gz per case
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    #[command(flatten)]
    window: WindowArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let Compute { device, dtype } = args.device.open()?;
    let choice = args.network.unwrap_or_else(|| Network::of_folder(&args.models));
    let network = Segmenting::open(&args.models, choice, &device)
        .with_context(|| format!("cannot load a model from {}", args.models.display()))?;
    let manifest = &network.manifest;
    let predictor = Predictor {
        net: &network.net.clone().with_compute_dtype(dtype),
        plan: &manifest.plan,
        settings: &args.window.over(&config.segmentor.held_out.window),
        device: &device,
    };
    say_error(&format!("model: {}", network.title()));
    let ids: Vec<String> = (manifest.plan.labels.iter())
        .map(|(name, id)| format!("{id} {name}"))
        .collect();
    say_error(&format!("labels: {}", ids.join(", ")));
    let failed = match (&args.image, &args.datalist, &args.store) {
        (Some(image), _, _) => {
            check_name(&args.out, image)?;
            predict_file(&predictor, image, &args.out, &config.ingest)?;
            say(&args.out.display().to_string());
            0
        }
        (_, Some(list), _) => predict_list(&predictor, list, &args.out, &config.ingest)?,
        (_, _, Some(store)) => {
            let store = open_store(store, &config)?;
            network.check_store(store.plan())?;
            predict_store(&predictor, &*store, &args.out)?
        }
        _ => bail!("nothing to predict: name --image, --datalist or --store"),
    };
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Refuses a name that no reader takes for NIfTI, a folder that is not there, and the scan itself.
fn check_name(out: &Path, image: &Path) -> anyhow::Result<()> {
    let name = out.to_string_lossy();
    ensure!(
        name.ends_with(".nii") || name.ends_with(".nii.gz"),
        "--out: expected a name that ends in .nii or .nii.gz, got {name}"
    );
    check_folder("--out", out)?;
    refuse_inputs(&[out.to_path_buf()], &[image])
}

/// Refuses to write over a file that is read, before anything is predicted.
fn refuse_inputs(targets: &[PathBuf], inputs: &[&Path]) -> anyhow::Result<()> {
    // One that is not there yet is none of them.
    let found = |path: &Path| path.canonicalize().ok();
    let inputs: HashSet<PathBuf> = inputs.iter().filter_map(|path| found(path)).collect();
    let over = targets
        .iter()
        .find(|path| found(path).is_some_and(|path| inputs.contains(&path)));
    match over {
        Some(path) => bail!("--out: {} is read from; choose another folder or name", path.display()),
        None => Ok(()),
    }
}

fn predict_file(predictor: &Predictor, image: &Path, out: &Path, options: &IngestConfig) -> anyhow::Result<()> {
    let scan = read_planned(image, predictor.plan, options)?;
    for remark in &scan.remarks {
        say_error(&format!("{}: warning: {remark}", image.display()));
    }
    let labels = labels_on_source(&predictor.probabilities(&scan.image), &scan.grid, &scan.source);
    Ok(write_on_source(out, labels.view(), &scan.source, Some(image))?)
}

/// Returns where the labels of a case are written.
fn target(out: &Path, id: &str) -> PathBuf {
    out.join(format!("{id}.nii.gz"))
}

/// Predicts one scan after another into `ID.nii.gz`; one that cannot be read is reported and stops no other. Returns how many
/// failed.
fn predict_each(
    out: &Path,
    ids: &[&str],
    predict: impl Fn(usize, &Path) -> anyhow::Result<()>,
) -> anyhow::Result<usize> {
    fs_err::create_dir_all(out)?;
    let counter = Counter::new(ids.len(), "predict");
    let mut failed = 0;
    for (at, id) in ids.iter().enumerate() {
        let file = target(out, id);
        // An id becomes a name in the folder and nothing else.
        match check_id(id).map_err(Into::into).and_then(|()| predict(at, &file)) {
            Ok(()) => say(&file.display().to_string()),
            Err(error) => {
                failed += 1;
                say_error(&format!("{id}: refused: {error:#}"));
            }
        }
        counter.done(id);
    }
    Ok(failed)
}

/// Predicts the images of a datalist.
fn predict_list(predictor: &Predictor, list: &Path, out: &Path, options: &IngestConfig) -> anyhow::Result<usize> {
    let entries = datalist::read_with_test(list)?;
    let ids: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
    let targets: Vec<PathBuf> = ids.iter().map(|id| target(out, id)).collect();
    let images = entries.iter().map(|entry| entry.image.as_path());
    let labels = entries.iter().filter_map(|entry| entry.labels.as_deref());
    refuse_inputs(&targets, &images.chain(labels).collect::<Vec<_>>())?;
    predict_each(out, &ids, |at, file| {
        predict_file(predictor, &entries[at].image, file, options)
    })
}

/// Predicts all cases of a store.
fn predict_store(predictor: &Predictor, store: &dyn Cases, out: &Path) -> anyhow::Result<usize> {
    let ids: Vec<&str> = store.records().iter().map(|record| record.id.as_str()).collect();
    predict_each(out, &ids, |case, file| {
        let record = &store.records()[case];
        let image = store.read(case, Region::whole(record.grid.shape))?.image;
        let labels = labels_on_source(&predictor.probabilities(&image), &record.grid, &record.source);
        Ok(write_on_source(file, labels.view(), &record.source, None)?)
    })
}
