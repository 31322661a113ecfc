//! Where networks run: `auto`, `cpu` or `cuda:N`.

use std::str::FromStr;

use burn::tensor::Device;

/// The device a user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceChoice {
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
    pub(super) fn open(self) -> anyhow::Result<Device> {
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
}
