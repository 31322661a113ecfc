//! What other programs call the parameters of a network.

use crate::checkpoint::{Architecture, CheckpointError, Weight, Weights};
use crate::nn::{MonaiUnetConfig, NnunetConfig};

/// Buffers of the layouts: statistics that the published networks never use, and counters.
const UNUSED: [&str; 3] = ["running_mean", "running_var", "num_batches_tracked"];
/// Where MONAI's SwinUNETR has its encoders.
const SWIN_ENCODERS: [&str; 5] = ["1", "2", "3", "4", "10"];

/// Renames the tensors of a file to ours; `ours` holds our names and shapes.
///
/// # Errors
/// [`CheckpointError::Tensor`] names the file's tensor that is missing, superfluous or of another shape.
pub(super) fn renamed(
    architecture: &Architecture,
    ours: &Weights,
    mut theirs: Weights,
) -> Result<Weights, CheckpointError> {
    let mut out = Weights::new();
    for (name, Weight { shape, .. }) in ours {
        let source = source_name(architecture, name);
        match theirs.remove(&source) {
            Some(weight) if weight.shape == *shape => drop(out.insert(name.clone(), weight)),
            other => {
                return Err(CheckpointError::Tensor {
                    name: source,
                    expected: format!("{shape:?}"),
                    got: other.map_or("nothing".into(), |weight| format!("{:?}", weight.shape)),
                });
            }
        }
    }
    // The other layouts have instance norms: there, statistics are those of a batch norm, which has the same parameters.
    let has_unused = matches!(architecture, Architecture::Published(_));
    let is_unused = |name: &str| has_unused && UNUSED.contains(&name.rsplit('.').next().unwrap_or_default());
    match theirs.into_iter().find(|(name, _)| !is_unused(name)) {
        None => Ok(out),
        Some((name, weight)) => Err(CheckpointError::Tensor {
            expected: match name.ends_with("running_mean") || name.ends_with("running_var") {
                true => "an instance norm, which keeps no statistics".into(),
                false => "no such tensor".into(),
            },
            name,
            got: format!("{:?}", weight.shape),
        }),
    }
}

/// Returns what the layout of an architecture calls one of our parameters.
pub fn source_name(architecture: &Architecture, ours: &str) -> String {
    let parts: Vec<&str> = ours.split('.').collect();
    let found = match architecture {
        Architecture::Published(_) => published(&parts),
        Architecture::SwinUnetr(_) => swin_unetr(&parts),
        Architecture::Nnunet(config) => nnunet(config, &parts),
        Architecture::MonaiUnet(config) => monai_unet(config, &parts),
        Architecture::Unet(_) | Architecture::Generator(_) => None,
    };
    found.unwrap_or_else(|| ours.to_string())
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok()
}

/// Names of `UNet3D` of the released code.
fn published(parts: &[&str]) -> Option<String> {
    let pair = |block: String, which: &str, rest: &[&str]| {
        let op = usize::from(which == "second");
        let leaf = match rest {
            ["conv", leaf] => format!("conv1.{leaf}"),
            ["gamma"] => "bn1.weight".into(),
            ["beta"] => "bn1.bias".into(),
            _ => return None,
        };
        Some(format!("{block}.ops.{op}.{leaf}"))
    };
    match parts {
        ["down", i, which, rest @ ..] => pair(format!("down_tr{}", 64 << number(i)?), which, rest),
        ["up", i, "up", leaf] => Some(format!("up_tr{}.up_conv.{leaf}", 256 >> number(i)?)),
        ["up", i, "conv", which, rest @ ..] => pair(format!("up_tr{}", 256 >> number(i)?), which, rest),
        ["head", leaf] => Some(format!("out_tr.final_conv.{leaf}")),
        _ => None,
    }
}

/// Names of MONAI's `SwinUNETR`.
fn swin_unetr(parts: &[&str]) -> Option<String> {
    Some(match parts {
        ["embed"] => "swinViT.patch_embed.proj.weight".into(),
        ["embed_bias"] => "swinViT.patch_embed.proj.bias".into(),
        ["stages", s, "conv", conv, leaf] => format!("swinViT.layers{}c.0.layer.{conv}.conv.{leaf}", number(s)? + 1),
        ["stages", s, "blocks", i, rest @ ..] => {
            let block = format!("swinViT.layers{}.0.blocks.{i}", number(s)? + 1);
            format!("{block}.{}", swin_block(rest)?)
        }
        ["stages", s, "merge", rest @ ..] => {
            format!("swinViT.layers{}.0.downsample.{}", number(s)? + 1, normed(rest))
        }
        ["encoders", i, conv, leaf] => format!("encoder{}.layer.{conv}.conv.{leaf}", SWIN_ENCODERS.get(number(i)?)?),
        ["decoders", i, "up", leaf] => format!("decoder{}.transp_conv.conv.{leaf}", 5 - number(i)?),
        ["decoders", i, "block", conv, leaf] => format!("decoder{}.conv_block.{conv}.conv.{leaf}", 5 - number(i)?),
        ["head", leaf] => format!("out.conv.conv.{leaf}"),
        _ => return None,
    })
}

fn swin_block(rest: &[&str]) -> Option<String> {
    Some(match rest {
        ["attention", "relative"] => "attn.relative_position_bias_table".into(),
        ["attention", linear, leaf] => format!("attn.{linear}.{leaf}"),
        ["widen", leaf] => format!("mlp.linear1.{leaf}"),
        ["narrow", leaf] => format!("mlp.linear2.{leaf}"),
        [_, _] => normed(rest),
        _ => return None,
    })
}

/// Names of `dynamic_network_architectures`, which nnU-Net builds from its plans.
fn nnunet(config: &NnunetConfig, parts: &[&str]) -> Option<String> {
    let block = |rest: &[&str]| match rest {
        ["gamma"] => "norm.weight".into(),
        ["beta"] => "norm.bias".into(),
        other => other.join("."),
    };
    Some(match parts {
        ["stem", rest @ ..] => format!("encoder.stem.convs.0.{}", block(rest)),
        ["down", s, "convs", i, rest @ ..] => format!("encoder.stages.{s}.0.convs.{i}.{}", block(rest)),
        ["down", s, "blocks", i, which, rest @ ..] => {
            let pools = number(i)? == 0 && config.stages.get(number(s)?)?.stride != [1; 3];
            let which = match *which {
                "first" => "conv1",
                "second" => "conv2",
                // Behind the average pooling, where there is one.
                _ => ["skip.0", "skip.1"][usize::from(pools)],
            };
            format!("encoder.stages.{s}.blocks.{i}.{which}.{}", block(rest))
        }
        ["up", s, "up", leaf] => format!("decoder.transpconvs.{s}.{leaf}"),
        ["up", s, "convs", i, rest @ ..] => format!("decoder.stages.{s}.convs.{i}.{}", block(rest)),
        ["heads", s, leaf] => format!("decoder.seg_layers.{s}.{leaf}"),
        _ => return None,
    })
}

/// Names of MONAI's `UNet`: every resolution lies inside the one above.
fn monai_unet(config: &MonaiUnetConfig, parts: &[&str]) -> Option<String> {
    let at = |level: usize| format!("model.{}", "1.submodule.".repeat(level));
    let leaf = |rest: &[&str]| match rest {
        ["slope"] => "adn.A.weight".into(),
        other => other.join("."),
    };
    let down = |start: String, rest: &[&str]| match rest {
        ["units", i, rest @ ..] if config.residual_units > 0 => Some(format!("{start}conv.unit{i}.{}", leaf(rest))),
        ["units", _, rest @ ..] => Some(format!("{start}{}", leaf(rest))),
        ["residual", leaf] => Some(format!("{start}residual.{leaf}")),
        _ => None,
    };
    match parts {
        ["down", level, rest @ ..] => down(format!("{}0.", at(number(level)?)), rest),
        ["bottom", rest @ ..] => down(at(config.strides.len()), rest),
        ["up", level, "unit", rest @ ..] => Some(format!("{}2.1.conv.unit0.{}", at(number(level)?), leaf(rest))),
        ["up", level, rest @ ..] => {
            let inside = if config.residual_units > 0 { "0." } else { "" };
            let leaf = match rest {
                ["slope"] => "adn.A.weight".into(),
                other => format!("conv.{}", other.join(".")),
            };
            Some(format!("{}2.{inside}{leaf}", at(number(level)?)))
        }
        _ => None,
    }
}

/// Joins a name whose last part may be one of a norm.
fn normed(parts: &[&str]) -> String {
    let name = parts.join(".");
    let norm = |leaf: &str, theirs: &str| name.strip_suffix(leaf).map(|start| format!("{start}{theirs}"));
    norm("gamma", "weight").or_else(|| norm("beta", "bias")).unwrap_or(name)
}
