//! Which network a stage trains.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::LearnError;
use super::check::Section;
use crate::checkpoint::{Architecture, MAX_WEIGHTS_BYTES};
use crate::nn::{Encoder, Merging, MonaiUnetConfig, Network, NnunetConfig, NnunetStage, SwinUnetrConfig, UnetConfig};

/// The most parameters of a network: what more of them weigh could not be loaded again.
pub(super) const MAX_PARAMETERS: u64 = MAX_WEIGHTS_BYTES / 4;

/// A network other than the plain U-Net of `widths`. Channels in and out follow from the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NetworkChoice {
    /// nnU-Net's plain or residual-encoder U-Net, trained with deep supervision.
    Nnunet {
        /// How the encoder is built.
        encoder: Encoder,
        /// Its resolutions, finest first.
        stages: Vec<NnunetStage>,
        /// Convolutions at each resolution of the decoder, coarsest first: one fewer than stages.
        decoder_blocks: Vec<usize>,
    },
    /// SwinUNETR version 2, as the published critic: 48 features are 72.76 million parameters.
    SwinUnetr {
        /// Channels at the finest resolution, a multiple of 12.
        feature_size: usize,
    },
    /// MONAI's `UNet`.
    MonaiUnet {
        /// Channels at each resolution, finest first.
        widths: Vec<usize>,
        /// How much coarser each resolution is than the one before, one fewer than widths.
        strides: Vec<usize>,
        /// Convolutions of a residual unit; 0 for plain convolutions.
        residual_units: usize,
    },
}

impl NetworkChoice {
    fn architecture(&self, out_channels: usize) -> Architecture {
        let in_channels = 1;
        match self.clone() {
            Self::Nnunet {
                encoder,
                stages,
                decoder_blocks,
            } => Architecture::Nnunet(NnunetConfig {
                encoder,
                in_channels,
                out_channels,
                stages,
                decoder_blocks,
            }),
            Self::SwinUnetr { feature_size } => Architecture::SwinUnetr(SwinUnetrConfig {
                feature_size,
                // A network trained here has no reason to leave two tokens of eight out.
                merging: Merging::Corrected,
                ..SwinUnetrConfig::published(out_channels)
            }),
            Self::MonaiUnet {
                widths,
                strides,
                residual_units,
            } => Architecture::MonaiUnet(MonaiUnetConfig {
                in_channels,
                out_channels,
                widths,
                strides,
                residual_units,
            }),
        }
    }
}

/// Returns the shape of a stage's network: the chosen one, or the plain U-Net.
pub(super) fn architecture(choice: Option<&NetworkChoice>, widths: &[usize], out_channels: usize) -> Architecture {
    match choice {
        Some(choice) => choice.architecture(out_channels),
        None => Architecture::Unet(UnetConfig {
            in_channels: 1,
            out_channels,
            widths: widths.to_vec(),
            condition: 0,
        }),
    }
}

/// Makes the network of a shape that was checked.
pub(super) fn fresh(architecture: &Architecture, device: &Device, seed: u64) -> Network {
    architecture
        .network(device, seed)
        .expect("stages choose among segmenting networks alone")
}

/// Returns the voxels that a network really computes for one cube of these sides, filled up with air to multiples of its stride.
pub(super) fn filled_voxels(architecture: &Architecture, sides: [usize; 3]) -> u64 {
    let filled = sides.into_iter().zip(architecture.stride());
    filled
        .map(|(side, stride)| side.next_multiple_of(stride) as u64)
        .product()
}

/// Refuses a choice that cannot be built, or one with deep supervision that cannot halve the sides it will see as often as it does;
/// other networks fill sides up with air.
pub(super) fn check_sides(
    (section, key): (&Section, &str),
    architecture: &Architecture,
    sides: &[[usize; 3]],
) -> Result<(), LearnError> {
    if let Some(what) = architecture.refusal() {
        return section.check("network", false, "a network that can be built", what);
    }
    let parameters = architecture.parameters();
    let expected = format!("at most {MAX_PARAMETERS} parameters");
    section.check("network", parameters <= MAX_PARAMETERS, &expected, parameters)?;
    let stride = architecture.stride();
    let fits = |side: &[usize; 3]| {
        side.iter()
            .zip(stride)
            .all(|(side, stride)| side.is_multiple_of(stride))
    };
    match sides.iter().find(|side| !fits(side)) {
        Some(side) if matches!(architecture, Architecture::Nnunet(_)) => {
            let expected = format!("sides that are all multiples of {stride:?} for this network");
            section.check(key, false, &expected, side)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_filled_up_to_what_a_network_can_halve() {
        let halves_twice = architecture(None, &[4, 8, 8], 2);
        assert_eq!(filled_voxels(&halves_twice, [5, 8, 9]), 8 * 8 * 12);
    }
}
