//! Segmenting networks from their shape, and their weights under the names that files use.

use burn::tensor::Device;

use super::{Architecture, CheckpointError, Weights, collect, fill};
use crate::nn::{Adapter, Body, Network};

impl Architecture {
    /// Makes a segmenting network whose weights follow from `seed` alone; nothing for generators.
    pub fn network(&self, device: &Device, seed: u64) -> Option<Network> {
        let body = match self {
            Self::Unet(config) => Body::Unet(config.init(device, seed)),
            Self::SwinUnetr(config) => Body::SwinUnetr(config.init(device, seed)),
            Self::Nnunet(config) => Body::Nnunet(config.init(device, seed)),
            Self::MonaiUnet(config) => Body::MonaiUnet(config.init(device, seed)),
            Self::Generator(_) | Self::Published(_) => return None,
        };
        Some(Network::new(body, self.stride(), Adapter::default()))
    }
}

/// Copies a network's parameters to memory, under the names of its architecture.
pub fn collect_network(net: &Network) -> Weights {
    match net.body() {
        Body::Unet(net) => collect(net),
        Body::SwinUnetr(net) => collect(net),
        Body::Nnunet(net) => collect(net),
        Body::MonaiUnet(net) => collect(net),
    }
}

/// Gives a network the parameters of a file or a state.
///
/// # Errors
/// [`CheckpointError::Tensor`] for a parameter that is missing, superfluous or of another shape.
pub fn fill_network(net: Network, weights: Weights) -> Result<Network, CheckpointError> {
    net.try_map(|body| {
        Ok(match body {
            Body::Unet(net) => Body::Unet(fill(net, weights)?),
            Body::SwinUnetr(net) => Body::SwinUnetr(fill(net, weights)?),
            Body::Nnunet(net) => Body::Nnunet(fill(net, weights)?),
            Body::MonaiUnet(net) => Body::MonaiUnet(fill(net, weights)?),
        })
    })
}
