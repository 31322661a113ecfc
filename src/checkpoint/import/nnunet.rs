//! The network that nnU-Net's plans describe, and how it wants intensities.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::nn::{Encoder, NnunetConfig, NnunetStage, Standardised};
use crate::volume::HuWindow;

/// Stages of a network, at most; a plans file with more is refused before anything is built.
const MAX_STAGES: usize = 8;

/// What one configuration of a plans file and the data set's description say.
#[derive(Clone, Debug)]
pub struct NnunetPlans {
    /// The network, but for its channels in and out, which the weights tell.
    pub network: NnunetConfig,
    /// The axis of (z, y, x) that each of the network's axes is.
    pub axes: [usize; 3],
    /// Intensities as nnU-Net's CT normalisation has them, in HU.
    pub intensity_hu: Standardised,
    /// Names of the network's outputs, in order.
    pub classes: Vec<String>,
}

impl NnunetPlans {
    /// Reads a configuration (with what it inherits), the whole plans file and the data set's description.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn parse(configuration: &Value, plans: &Value, dataset: &Value) -> Result<Self, String> {
        Ok(Self {
            network: network(configuration)?,
            axes: get(plans, "transpose_forward")?,
            intensity_hu: intensity(plans)?,
            classes: classes(dataset)?,
        })
    }

    /// Returns how the network wants intensities in units of a window.
    ///
    /// # Errors
    /// A sentence, where the window cuts off what the network tells apart.
    pub(super) fn intensity(&self, window: HuWindow) -> Result<Standardised, String> {
        let (low, width) = (f64::from(window.low), f64::from(window.high) - f64::from(window.low));
        let hu = &self.intensity_hu;
        if hu.low < low || hu.high > f64::from(window.high) {
            return Err(format!(
                "plan.window_hu: expected a window around the {} to {} HU that the network tells apart, got {} to {}",
                hu.low, hu.high, window.low, window.high
            ));
        }
        let within = |value: f64| (value - low) / width;
        Ok(Standardised {
            low: within(hu.low),
            high: within(hu.high),
            mean: within(hu.mean),
            sd: hu.sd / width,
        })
    }
}

fn get<T: DeserializeOwned>(from: &Value, key: &str) -> Result<T, String> {
    T::deserialize(&from[key]).map_err(|error| format!("{key}: {error}"))
}

/// One number for all stages, or one for each.
#[derive(Deserialize)]
#[serde(untagged)]
enum PerStage {
    All(usize),
    Each(Vec<usize>),
}

impl PerStage {
    fn of(self, stages: usize) -> Vec<usize> {
        match self {
            Self::All(number) => vec![number; stages],
            Self::Each(numbers) => numbers,
        }
    }
}

fn network(configuration: &Value) -> Result<NnunetConfig, String> {
    let architecture = &configuration["architecture"];
    if architecture.is_null() {
        return old_network(configuration);
    }
    let class: String = get(architecture, "network_class_name").map_err(|what| format!("architecture.{what}"))?;
    let encoder = encoder(class.rsplit('.').next().unwrap_or_default())?;
    let kwargs = &architecture["arch_kwargs"];
    let in_kwargs = |what: String| format!("architecture.arch_kwargs.{what}");
    let supported = [
        ("conv_op", "torch.nn.modules.conv.Conv3d"),
        ("norm_op", "torch.nn.modules.instancenorm.InstanceNorm3d"),
        ("nonlin", "torch.nn.LeakyReLU"),
    ];
    for (key, expected) in supported {
        if kwargs[key].as_str() != Some(expected) {
            return Err(in_kwargs(format!("{key}: expected {expected}, got {}", kwargs[key])));
        }
    }
    let norm = &kwargs["norm_op_kwargs"];
    if norm["eps"].as_f64() != Some(1e-5) || norm["affine"].as_bool() != Some(true) {
        return Err(in_kwargs(format!(
            "norm_op_kwargs: expected eps 1e-5 and affine, got {norm}"
        )));
    }
    if kwargs["conv_bias"].as_bool() != Some(true) {
        return Err(in_kwargs(format!(
            "conv_bias: expected true, got {}",
            kwargs["conv_bias"]
        )));
    }
    nonlinearity(kwargs).map_err(in_kwargs)?;
    let blocks = match encoder {
        Encoder::Plain => "n_conv_per_stage",
        Encoder::Residual => "n_blocks_per_stage",
    };
    let widths: Vec<usize> = get(kwargs, "features_per_stage").map_err(in_kwargs)?;
    let parts = Parts {
        kernels: get(kwargs, "kernel_sizes").map_err(in_kwargs)?,
        strides: get(kwargs, "strides").map_err(in_kwargs)?,
        blocks: get::<PerStage>(kwargs, blocks).map_err(in_kwargs)?.of(widths.len()),
        decoder_blocks: get::<PerStage>(kwargs, "n_conv_per_stage_decoder")
            .map_err(in_kwargs)?
            .of(widths.len().saturating_sub(1)),
        widths,
    };
    parts.network(encoder).map_err(in_kwargs)
}

/// Refuses another slope than PyTorch's own, and norms after activations.
fn nonlinearity(kwargs: &Value) -> Result<(), String> {
    let slope = &kwargs["nonlin_kwargs"]["negative_slope"];
    if !slope.is_null() && slope.as_f64() != Some(0.01) {
        return Err(format!("nonlin_kwargs.negative_slope: expected 0.01, got {slope}"));
    }
    match kwargs["nonlin_first"].as_bool() {
        Some(true) => Err("nonlin_first: expected false, got true".into()),
        _ => Ok(()),
    }
}

/// Reads the keys that plans had before nnU-Net 2.4.
fn old_network(configuration: &Value) -> Result<NnunetConfig, String> {
    let encoder = encoder(&get::<String>(configuration, "UNet_class_name")?)?;
    let strides: Vec<[usize; 3]> = get(configuration, "pool_op_kernel_sizes")?;
    let base: usize = get(configuration, "UNet_base_num_features")?;
    let most: usize = get(configuration, "unet_max_num_features")?;
    let widths = (0..strides.len().min(MAX_STAGES + 1)).map(|stage| base.saturating_mul(1 << stage).min(most));
    Parts {
        kernels: get(configuration, "conv_kernel_sizes")?,
        blocks: get(configuration, "n_conv_per_stage_encoder")?,
        decoder_blocks: get(configuration, "n_conv_per_stage_decoder")?,
        widths: widths.collect(),
        strides,
    }
    .network(encoder)
}

fn encoder(class: &str) -> Result<Encoder, String> {
    match class {
        "PlainConvUNet" => Ok(Encoder::Plain),
        "ResidualEncoderUNet" => Ok(Encoder::Residual),
        other => Err(format!(
            "network class: expected PlainConvUNet or ResidualEncoderUNet, got {other:?}"
        )),
    }
}

/// Lists of a plans file, an entry per stage.
struct Parts {
    widths: Vec<usize>,
    kernels: Vec<[usize; 3]>,
    strides: Vec<[usize; 3]>,
    blocks: Vec<usize>,
    decoder_blocks: Vec<usize>,
}

impl Parts {
    fn network(self, encoder: Encoder) -> Result<NnunetConfig, String> {
        let count = self.widths.len();
        let lists = [
            self.kernels.len(),
            self.strides.len(),
            self.blocks.len(),
            self.decoder_blocks.len() + 1,
        ];
        if lists != [count; 4] || count > MAX_STAGES {
            return Err(format!(
                "stages: expected at most {MAX_STAGES}, as many in every list, got {count} widths and {lists:?}"
            ));
        }
        let lists = self
            .widths
            .into_iter()
            .zip(self.kernels)
            .zip(self.strides)
            .zip(self.blocks);
        let stages = lists.map(|(((width, kernel), stride), blocks)| NnunetStage {
            width,
            kernel,
            stride,
            blocks,
        });
        Ok(NnunetConfig {
            encoder,
            in_channels: 1,
            out_channels: 1,
            stages: stages.collect(),
            decoder_blocks: self.decoder_blocks,
        })
    }
}

fn intensity(plans: &Value) -> Result<Standardised, String> {
    let of_channel = &plans["foreground_intensity_properties_per_channel"]["0"];
    let get = |key: &str| {
        get(of_channel, key).map_err(|what| format!("foreground_intensity_properties_per_channel.0.{what}"))
    };
    let found = Standardised {
        low: get("percentile_00_5")?,
        high: get("percentile_99_5")?,
        mean: get("mean")?,
        // As nnU-Net guards its division.
        sd: get("std")?.max(1e-8),
    };
    Ok(found)
}

/// Returns the names of the outputs in their order; the label that nnU-Net ignores has none.
fn classes(dataset: &Value) -> Result<Vec<String>, String> {
    let labels: std::collections::BTreeMap<String, usize> =
        get(dataset, "labels").map_err(|what| format!("{what} (regions of several labels are not supported)"))?;
    let mut classes: Vec<(usize, String)> = labels
        .into_iter()
        .filter(|(name, _)| name != "ignore")
        .map(|(name, id)| (id, name))
        .collect();
    classes.sort_unstable();
    if classes.iter().enumerate().any(|(at, (id, _))| at != *id) {
        return Err(format!("labels: expected consecutive numbers from 0, got {classes:?}"));
    }
    Ok(classes.into_iter().map(|(_, name)| name).collect())
}
