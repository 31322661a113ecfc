//! The two networks of stage 2 that learn against each other, and what updates, saves and watches them.

use std::time::Duration;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::adversary::lesion_means;
use super::guard::{Guard, Seen};
use super::models::under;
use super::numbers::{check_finite, metrics, scalar};
use super::{LearnError, Metrics, Optimizer, OptimizerSettings, SynthesizerConfig};
use crate::checkpoint::{Weights, collect, fill};

/// Generator and discriminator at work.
pub(super) struct Rivals<G, D> {
    pub generator: G,
    pub discriminator: D,
    /// With gradients.
    pub device: Device,
    /// How long the steps so far have waited for their cubes.
    pub waited: Duration,
    optimizer: Optimizer,
    discriminator_optimizer: Optimizer,
    guard: Guard,
    settings: [OptimizerSettings; 2],
    steps: u64,
}

impl<G: Module, D: Module> Rivals<G, D> {
    /// Puts fresh networks on a device with gradients to work.
    pub fn new(config: &SynthesizerConfig, (generator, discriminator): (G, D), device: Device) -> Self {
        Self {
            generator,
            discriminator,
            device,
            waited: Duration::ZERO,
            optimizer: Optimizer::new(config.optimizer.clone()),
            discriminator_optimizer: Optimizer::new(config.discriminator_optimizer.clone()),
            guard: Guard::new(config.guard.clone()),
            settings: [config.optimizer.clone(), config.discriminator_optimizer.clone()],
            steps: config.steps,
        }
    }

    /// Updates the generator alone.
    pub fn teach_generator(&mut self, step: u64, loss: Tensor<1>) -> Result<Metrics, LearnError> {
        let value = scalar(loss.clone());
        check_finite(step, "generator_loss", value)?;
        let rate = self.settings[0].rate(step, self.steps);
        let (generator, norm) = self.optimizer.step(self.generator.clone(), &loss.backward(), rate);
        check_finite(step, "generator_gradient_norm", norm)?;
        self.generator = generator;
        Ok(metrics([("generator_loss", value), ("generator_gradient_norm", norm)]))
    }

    /// Updates the discriminator alone, and lets the guard see what it said before.
    pub fn teach_discriminator(&mut self, step: u64, loss: Tensor<1>, seen: &Seen) -> Result<Metrics, LearnError> {
        let value = scalar(loss.clone());
        check_finite(step, "discriminator_loss", value)?;
        let rate = self.settings[1].rate(step, self.steps);
        let gradients = loss.backward();
        let (discriminator, norm) = (self.discriminator_optimizer).step(self.discriminator.clone(), &gradients, rate);
        check_finite(step, "discriminator_gradient_norm", norm)?;
        self.discriminator = discriminator;
        let mut measured = metrics([("discriminator_loss", value), ("discriminator_gradient_norm", norm)]);
        measured.extend(self.guard.observe(step, seen)?);
        Ok(measured)
    }

    /// Copies everything that the next step depends on.
    pub fn state(&self) -> Weights {
        let named = |weights: Weights, prefix: &'static str| {
            weights.into_iter().map(move |(name, w)| (format!("{prefix}{name}"), w))
        };
        let mut state = self.optimizer.state("optimizer");
        state.extend(self.discriminator_optimizer.state("discriminator"));
        state.extend(named(collect(&self.generator), "generator/"));
        state.extend(named(collect(&self.discriminator), "discriminator/"));
        state.extend(self.guard.state());
        state
    }

    /// Goes on from a state saved after `steps` steps.
    pub fn restore(&mut self, state: &Weights, steps: u64) -> Result<(), LearnError> {
        self.optimizer.restore("optimizer", state, steps, &self.device);
        (self.discriminator_optimizer).restore("discriminator", state, steps, &self.device);
        self.guard.restore(state);
        self.generator = fill(self.generator.clone(), under(state, "generator/"))?;
        self.discriminator = fill(self.discriminator.clone(), under(state, "discriminator/"))?;
        Ok(())
    }

    /// Copies the weights that would become the generator.
    pub fn model(&self) -> Weights {
        collect(&self.optimizer.averaged(self.generator.clone()))
    }

    /// Copies those that would become the discriminator.
    pub fn judge(&self) -> Weights {
        collect(&self.discriminator_optimizer.averaged(self.discriminator.clone()))
    }
}

/// Collects the discriminator's view of every lesion: the first cubes of a batch are painted, the others real.
///
/// # Shape
/// log odds of real over painted `[B, 1, D, H, W]`, masks (1 inside) of the painted and of the real ones.
pub(super) fn seen(odds: Tensor<5>, [painted, real]: [Tensor<5>; 2], diversity: Option<f64>) -> Seen {
    let hosts = painted.dims()[0];
    let count = odds.dims()[0] - hosts;
    let means = |values: Tensor<5>, masks: Tensor<5>| -> Vec<f32> {
        let data = lesion_means(values, masks).into_data().convert::<f32>();
        data.try_to_vec().expect("converted to this type")
    };
    Seen {
        real: means(odds.clone().narrow(0, hosts, count), real),
        painted: means(odds.narrow(0, 0, hosts), painted),
        diversity,
    }
}
