//! `freetumor import`: a model of another program becomes one of ours.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ValueEnum;

use super::{ConfigArgs, say, say_json};
use crate::checkpoint::{ImportRequest, ModelManifest, NnunetPlans, Precision, Role, import_pytorch, save_model};
use crate::ingest::nnunet_plans;
use crate::nn::{Merging, OutputActivation};
use crate::volume::Plan;

/// The most bytes of nnU-Net's description of a data set; real ones take some hundreds.
const MAX_DATASET_BYTES: u64 = 1 << 20;

/// Import a PyTorch checkpoint as a critic, generator or segmentor, without executing its pickle
///
/// Understood are the published networks (alone, or a file with netG., netD. and netSeg.), MONAI's SwinUNETR and UNet, and nnU-Net's
/// checkpoint_final.pth with its plans.json and dataset.json. What the model was trained on stays unknown: recipes must
/// set allow_unknown_provenance to use it.
///
/// Example: freetumor import --from checkpoint_final.pth --as segmentor --config configs/abdomen.toml --plans plans.json --dataset dataset.json --out models
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// The file that torch.save wrote
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// What the model shall do
    #[arg(long = "as", value_enum)]
    role: ImportRole,
    #[command(flatten)]
    config: ConfigArgs,
    /// nnU-Net's plans file: the network, spacing, patch and intensities
    #[arg(long, value_name = "FILE", requires = "dataset")]
    plans: Option<PathBuf>,
    /// nnU-Net's dataset.json: the names of the classes
    #[arg(long, value_name = "FILE", requires = "plans")]
    dataset: Option<PathBuf>,
    /// Which configuration of the plans file
    #[arg(long, value_name = "NAME", default_value = "3d_fullres")]
    configuration: String,
    /// Names of the network's outputs in order, in the plan's words [default: dataset.json's, else the plan's classes]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    classes: Option<Vec<String>>,
    /// How a SwinUNETR merges tokens; its weights do not tell
    #[arg(long, value_enum, default_value = "released")]
    merging: MergingArg,
    /// Strides of MONAI's UNet, finest first, such as 1,2,2; without residual units its weights do not tell, and 2 is taken for granted
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    strides: Option<Vec<usize>>,
    /// What the output of the published generator goes through
    #[arg(long, value_enum, default_value = "tanh")]
    activation: ActivationArg,
    /// The folder of models to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the manifest as JSON
    #[arg(long)]
    json: bool,
}

/// What an imported model can do.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ImportRole {
    /// The gate's segmentor.
    Critic,
    /// The published generator.
    Generator,
    /// A segmentor to be evaluated.
    Segmentor,
}

impl From<ImportRole> for Role {
    fn from(role: ImportRole) -> Self {
        match role {
            ImportRole::Critic => Self::Critic,
            ImportRole::Generator => Self::Generator,
            ImportRole::Segmentor => Self::Segmentor,
        }
    }
}

/// [`Merging`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum MergingArg {
    /// MONAI up to 1.3, as published.
    Released,
    /// Later MONAI.
    Corrected,
}

/// [`OutputActivation`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ActivationArg {
    /// The abdominal generator's.
    Tanh,
    /// The chest generator's.
    Sigmoid,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let mut plan = config.plan.clone();
    let mut nnunet = None;
    if let (Some(plans), Some(dataset)) = (&args.plans, &args.dataset) {
        plan = nnunet_plans::apply(plans, &args.configuration, &plan)?;
        nnunet = Some(read_nnunet(plans, &args.configuration, dataset)?);
    }
    let (manifest, weights) = import_pytorch(&args.from, &request(args, &plan, nnunet.as_ref()))?;
    let noted = manifest.imported.iter().find_map(|of| of.notes.get("configuration"));
    if let Some(noted) = noted.filter(|noted| nnunet.is_some() && **noted != args.configuration) {
        bail!(
            "{}: its configuration is {noted:?}, --configuration says {:?}",
            args.from.display(),
            args.configuration
        );
    }
    fs_err::create_dir_all(&args.out)?;
    let manifest = save_model(&args.out, manifest, &weights, Precision::Single)?;
    report(args, &manifest)?;
    Ok(ExitCode::SUCCESS)
}

fn request<'a>(args: &'a Args, plan: &'a Plan, nnunet: Option<&'a NnunetPlans>) -> ImportRequest<'a> {
    ImportRequest {
        role: args.role.into(),
        plan,
        classes: args.classes.as_deref(),
        merging: match args.merging {
            MergingArg::Released => Merging::Released,
            MergingArg::Corrected => Merging::Corrected,
        },
        strides: args.strides.as_deref(),
        activation: match args.activation {
            ActivationArg::Tanh => OutputActivation::Tanh,
            ActivationArg::Sigmoid => OutputActivation::Sigmoid,
        },
        nnunet,
    }
}

fn read_nnunet(plans: &Path, configuration: &str, dataset: &Path) -> anyhow::Result<NnunetPlans> {
    let (whole, configuration) = nnunet_plans::configuration(plans, configuration)?;
    let bytes = fs_err::metadata(dataset)?.len();
    if bytes > MAX_DATASET_BYTES {
        bail!(
            "{}: expected at most {MAX_DATASET_BYTES} bytes, got {bytes}",
            dataset.display()
        );
    }
    let dataset_json =
        serde_json::from_slice(&fs_err::read(dataset)?).with_context(|| format!("{}: not JSON", dataset.display()))?;
    NnunetPlans::parse(&configuration, &whole, &dataset_json)
        .map_err(|what| anyhow::anyhow!("{} or {}: {what}", plans.display(), dataset.display()))
}

fn report(args: &Args, manifest: &ModelManifest) -> anyhow::Result<()> {
    if args.json {
        return say_json(manifest);
    }
    let parameters = manifest.architecture.parameters();
    let role = manifest.role.name();
    say(&format!(
        "{role}: {parameters} parameters from {} in {}",
        args.from.display(),
        args.out.display()
    ));
    say("what it was trained on is unknown: recipes need allow_unknown_provenance to use it");
    Ok(())
}
