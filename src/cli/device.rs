//! Where networks run (`auto`, `cpu` or `cuda:N`) and what they compute in.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::ensure;
use burn::tensor::Device;
use clap::ValueEnum;

use crate::kernel::ComputeDtype;

/// The device a user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceChoice {
    /// The first GPU if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("expected auto, cpu or cuda:N, got {text:?}")),
        }
    }
}

impl DeviceChoice {
    /// Opens the device.
    fn open(self) -> anyhow::Result<Device> {
        let gpus = gpus();
        match self {
            Self::Cpu => Ok(Device::flex()),
            Self::Auto => Ok(gpus.into_iter().next().unwrap_or_else(Device::flex)),
            Self::Cuda(number) => {
                let found = gpus.len();
                gpus.into_iter().nth(number).ok_or_else(|| missing(number, found))
            }
        }
    }
}

/// What networks compute in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DtypeChoice {
    /// Bfloat16 where the GPU has it, else single precision.
    Auto,
    /// Single precision; a GPU's tensor cores round products to TF32.
    F32,
    /// Bfloat16 between single-precision weights, norms and losses; GPUs only.
    Bf16,
}

/// Where and in what networks compute.
#[derive(clap::Args)]
pub(super) struct DeviceArgs {
    /// Where networks run: auto, cpu, cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// What networks compute in; weights, norms, optimiser and losses are single precision anyway
    #[arg(long, value_enum, default_value = "auto")]
    compute_dtype: DtypeChoice,
    /// Where a GPU's compiled and tuned kernels are kept [default: the user's cache folder]
    #[arg(long, value_name = "DIR", env = "FREETUMOR_KERNEL_CACHE")]
    kernel_cache: Option<PathBuf>,
}

/// A device and what it computes in.
#[derive(Clone)]
pub(super) struct Compute {
    /// Where.
    pub(super) device: Device,
    /// In what.
    pub(super) dtype: ComputeDtype,
}

impl Compute {
    /// The CPU.
    pub(super) fn cpu() -> Self {
        Self {
            device: Device::flex(),
            dtype: ComputeDtype::F32,
        }
    }

    /// Returns the name of the GPU, or that it is the CPU.
    pub(super) fn device_name(&self) -> String {
        #[cfg(feature = "cuda")]
        if let Some(identity) = self.device.identity() {
            return identity.name;
        }
        "the CPU".into()
    }
}

impl DeviceArgs {
    /// Opens the device.
    ///
    /// # Errors
    /// An absent device, a type that the device cannot compute in, or a cache folder that cannot be made.
    pub(super) fn open(&self) -> anyhow::Result<Compute> {
        // Before the first device: the runtime reads its settings once.
        keep_kernels(self.kernel_cache.as_deref())?;
        let device = self.device.open()?;
        let best = ComputeDtype::best(&device);
        let dtype = match self.compute_dtype {
            DtypeChoice::Auto => best,
            DtypeChoice::F32 => ComputeDtype::F32,
            DtypeChoice::Bf16 => ComputeDtype::Bf16,
        };
        ensure!(
            dtype == ComputeDtype::F32 || best == ComputeDtype::Bf16,
            "--compute-dtype bf16: expected a GPU with bfloat16, got {device:?}; use f32"
        );
        tracing::info!(device = ?device, numerics = dtype.numerics(&device), "computing");
        Ok(Compute { device, dtype })
    }
}

fn missing(number: usize, found: usize) -> anyhow::Error {
    if cfg!(feature = "cuda") {
        anyhow::anyhow!("device cuda:{number}: {found} CUDA devices found; use --device cpu, or check the driver")
    } else {
        anyhow::anyhow!("device cuda:{number}: this binary was built without CUDA; build it with --features cuda")
    }
}

#[cfg(feature = "cuda")]
fn gpus() -> Vec<Device> {
    Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec()
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Vec<Device> {
    Vec::new()
}

/// Tells the GPU's runtime where to keep what it compiled and tuned, so that it does both once per machine. A
/// `cubecl.toml` in the working folder still decides everything else.
#[cfg(feature = "cuda")]
fn keep_kernels(folder: Option<&Path>) -> anyhow::Result<()> {
    use cubecl::config::cache::CacheConfig;
    use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    config.compilation.cache = true;
    config.environment.path = match folder {
        Some(folder) => {
            fs_err::create_dir_all(folder)?;
            CacheConfig::Directory(folder.into())
        }
        None => CacheConfig::Global,
    };
    if !CubeClRuntimeConfig::try_set(config) {
        tracing::warn!("the GPU's runtime was already set up; --kernel-cache is not used");
    }
    Ok(())
}

/// Without a GPU nothing is compiled; a folder that is named is made all the same, so that a wrong one shows.
#[cfg(not(feature = "cuda"))]
fn keep_kernels(folder: Option<&Path>) -> anyhow::Result<()> {
    Ok(folder.map_or(Ok(()), fs_err::create_dir_all)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_absent_devices_refused() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert!("tpu".parse::<DeviceChoice>().unwrap_err().contains("tpu"));
        assert!(
            DeviceChoice::Cuda(63)
                .open()
                .unwrap_err()
                .to_string()
                .contains("cuda:63")
        );
    }
    #[test]
    fn the_cpu_computes_in_single_precision_alone() {
        let args = |dtype| DeviceArgs {
            device: DeviceChoice::Cpu,
            compute_dtype: dtype,
            kernel_cache: None,
        };
        assert_eq!(args(DtypeChoice::Auto).open().unwrap().dtype, ComputeDtype::F32);
        let error = args(DtypeChoice::Bf16).open().err().unwrap();
        assert!(error.to_string().contains("--compute-dtype bf16"), "{error}");
    }
}
