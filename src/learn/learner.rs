//! A segmenting network under training: what stages 1 and 3 have in common.

use std::time::Duration;

use burn::tensor::{Device, Tensor};

use super::choice::fresh;
use super::fit::{Job, Metrics};
use super::models::under;
use super::numbers::{check_finite, metrics};
use super::validation::Validator;
use super::{LearnError, Optimizer, OptimizerSettings};
use crate::checkpoint::{Architecture, Weights, collect_network, fill_network};
use crate::evaluate::HeldOut;
use crate::kernel::ComputeDtype;
use crate::nn::Network;

/// How long and by what rule weights move.
pub(super) struct Course<'a> {
    pub optimizer: &'a OptimizerSettings,
    pub steps: u64,
    pub seed: u64,
}

/// The network, its optimizer and what scores it.
pub(super) struct Learner<'a> {
    /// With gradients.
    pub device: Device,
    pub net: Network,
    /// How long steps have waited for their data.
    pub waited: Duration,
    settings: OptimizerSettings,
    steps: u64,
    optimizer: Optimizer,
    validator: Validator<'a>,
    architecture: Architecture,
    dtype: ComputeDtype,
}

impl<'a> Learner<'a> {
    pub fn new(job: &Job, architecture: &Architecture, course: &Course, validator: Validator<'a>) -> Self {
        let device = job.device.clone().autodiff();
        Self {
            net: fresh(architecture, &device, course.seed).with_compute_dtype(job.dtype),
            device,
            waited: Duration::ZERO,
            settings: course.optimizer.clone(),
            steps: course.steps,
            optimizer: Optimizer::new(course.optimizer.clone()),
            validator,
            architecture: architecture.clone(),
            dtype: job.dtype,
        }
    }

    /// Moves the weights down a loss; one that is not finite leaves them as they were.
    pub fn learn(&mut self, step: u64, loss: &Tensor<1>) -> Result<Metrics, LearnError> {
        let value = f64::from(loss.clone().into_scalar::<f32>());
        check_finite(step, "loss", value)?;
        let rate = self.settings.rate(step, self.steps);
        let (net, norm) = self.optimizer.step(self.net.clone(), &loss.backward(), rate);
        check_finite(step, "gradient_norm", norm)?;
        self.net = net;
        Ok(metrics([
            ("loss", value),
            ("gradient_norm", norm),
            ("learning_rate", rate),
        ]))
    }

    pub fn state(&self) -> Weights {
        let mut state = self.optimizer.state("optimizer");
        let net = collect_network(&self.net).into_iter();
        state.extend(net.map(|(name, weight)| (format!("net/{name}"), weight)));
        state
    }

    pub fn restore(&mut self, state: &Weights, steps: u64) -> Result<(), LearnError> {
        self.optimizer.restore("optimizer", state, steps, &self.device);
        self.net = fill_network(self.net.clone(), under(state, "net/"))?;
        Ok(())
    }

    pub fn model(&self) -> Weights {
        collect_network(&self.optimizer.averaged(self.net.clone()))
    }

    /// Scores the weights that would become the model, without gradients.
    pub fn score(&self, stop: &dyn Fn() -> bool) -> Result<HeldOut, LearnError> {
        let net = fill_network(fresh(&self.architecture, &self.validator.device, 0), self.model())?;
        self.validator.score(&net.with_compute_dtype(self.dtype), stop)
    }
}
