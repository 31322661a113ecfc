//! Which network a file holds, by the names and shapes of its tensors.

use super::ImportRequest;
use crate::checkpoint::{Architecture, Weights};
use crate::nn::{MonaiUnetConfig, PublishedConfig, SwinUnetrConfig};

/// Resolutions of a MONAI U-Net, at most.
const MAX_LEVELS: usize = 8;

/// A file's tensors, asked for their sizes.
struct Sizes<'a>(&'a Weights);

impl Sizes<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn of(&self, name: &str, axis: usize) -> Result<usize, String> {
        let shape = self.0.get(name).map(|weight| &weight.shape);
        let size = shape.and_then(|shape| shape.get(axis)).copied();
        size.ok_or_else(|| match shape {
            Some(shape) => format!("tensor {name}: expected more than {axis} axes, got {shape:?}"),
            None => format!("tensor {name}: missing"),
        })
    }

    fn count(&self, start: &str, end: &str) -> usize {
        let names = self
            .0
            .keys()
            .filter(|name| name.starts_with(start) && name.ends_with(end));
        names.count()
    }
}

/// Tells the architecture of a file by the names in it.
///
/// # Errors
/// A sentence that names what is missing, or what was found instead.
pub(super) fn detected(theirs: &Weights, request: &ImportRequest) -> Result<Architecture, String> {
    let sizes = Sizes(theirs);
    if sizes.has("model.0.conv.unit0.conv.weight") || sizes.has("model.0.conv.weight") {
        return monai_unet(&sizes, request);
    }
    if request.strides.is_some() {
        return Err("strides: expected none, as the network is not MONAI's UNet".into());
    }
    if sizes.has("down_tr64.ops.0.conv1.weight") {
        return Ok(Architecture::Published(PublishedConfig {
            width: sizes.of("down_tr64.ops.0.conv1.weight", 0)?,
            in_channels: sizes.of("down_tr64.ops.0.conv1.weight", 1)?,
            out_channels: sizes.of("out_tr.final_conv.weight", 0)?,
            activation: request.activation,
        }));
    }
    if sizes.has("swinViT.patch_embed.proj.weight") {
        return swin_unetr(&sizes, request);
    }
    if sizes.has("decoder.seg_layers.0.weight") {
        return nnunet(&sizes, request);
    }
    let names: Vec<&String> = theirs.keys().take(3).collect();
    Err(format!(
        "expected the published networks, MONAI's SwinUNETR or UNet, or nnU-Net's U-Nets, got {} tensors such as {names:?}",
        theirs.len()
    ))
}

fn swin_unetr(sizes: &Sizes, request: &ImportRequest) -> Result<Architecture, String> {
    let stage = |i: usize| format!("swinViT.layers{}.0.blocks.", i + 1);
    let heads = |i: usize| sizes.of(&format!("{}0.attn.relative_position_bias_table", stage(i)), 1);
    Ok(Architecture::SwinUnetr(SwinUnetrConfig {
        in_channels: sizes.of("swinViT.patch_embed.proj.weight", 1)?,
        out_channels: sizes.of("out.conv.conv.weight", 0)?,
        feature_size: sizes.of("swinViT.patch_embed.proj.weight", 0)?,
        depths: std::array::from_fn(|i| sizes.count(&stage(i), ".attn.proj.weight")),
        heads: [heads(0)?, heads(1)?, heads(2)?, heads(3)?],
        stage_convolutions: sizes.has("swinViT.layers1c.0.layer.conv1.conv.weight"),
        merging: request.merging,
    }))
}

fn nnunet(sizes: &Sizes, request: &ImportRequest) -> Result<Architecture, String> {
    let plans = request
        .nnunet
        .ok_or("an nnU-Net network needs its plans.json and dataset.json")?;
    let mut network = plans.network.clone();
    let stem = "encoder.stem.convs.0.conv.weight";
    let first = if sizes.has(stem) {
        stem
    } else {
        "encoder.stages.0.0.convs.0.conv.weight"
    };
    network.in_channels = sizes.of(first, 1)?;
    network.out_channels = sizes.of("decoder.seg_layers.0.weight", 0)?;
    Ok(Architecture::Nnunet(network))
}

fn monai_unet(sizes: &Sizes, request: &ImportRequest) -> Result<Architecture, String> {
    let at = |level: usize| format!("model.{}", "1.submodule.".repeat(level));
    let residual_units = sizes.count("model.0.conv.unit", ".conv.weight");
    let conv = if residual_units > 0 {
        "conv.unit0.conv.weight"
    } else {
        "conv.weight"
    };
    let (mut widths, mut strides) = (Vec::new(), Vec::new());
    for level in 0..MAX_LEVELS {
        let down = format!("{}0.", at(level));
        if !sizes.has(&format!("{down}{conv}")) {
            break;
        }
        widths.push(sizes.of(&format!("{down}{conv}"), 0)?);
        // A unit that keeps the resolution projects with a kernel of 1, or not at all; by how much another one reduces it, its kernel
        // does not tell.
        let residual = sizes.of(&format!("{down}residual.weight"), 2);
        strides.push(if residual_units == 0 || residual == Ok(3) { 2 } else { 1 });
    }
    widths.push(sizes.of(&format!("{}{conv}", at(widths.len())), 0)?);
    if let Some(given) = request.strides {
        if given.len() != strides.len() || (residual_units > 0 && given != strides) {
            return Err(match residual_units {
                0 => format!("strides: expected {} numbers, got {given:?}", strides.len()),
                _ => format!("strides: expected {strides:?}, as its residual projections have it, got {given:?}"),
            });
        }
        strides = given.to_vec();
    }
    let out_channels = match residual_units {
        0 => sizes.of("model.2.conv.weight", 1)?,
        _ => sizes.of("model.2.1.conv.unit0.conv.weight", 0)?,
    };
    Ok(Architecture::MonaiUnet(MonaiUnetConfig {
        in_channels: sizes.of(&format!("model.0.{conv}"), 1)?,
        out_channels,
        widths,
        strides,
        residual_units,
    }))
}
