//! Adam with decoupled weight decay and its learning rate schedule; the state is plain arrays, so that a resumed run
//! continues bit for bit.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Weight, Weights};

/// The optimizer's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSettings {
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Steps over which it rises from 0.
    pub warmup: u64,
    /// Share of the largest rate that is left at the end of the cosine.
    pub final_share: f64,
    /// Decay of the mean of gradients.
    pub beta_1: f64,
    /// Decay of the mean of their squares.
    pub beta_2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients of larger norm are scaled down to it.
    pub max_norm: f64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            warmup: 20,
            final_share: 0.02,
            beta_1: 0.9,
            beta_2: 0.999,
            weight_decay: 1e-5,
            max_norm: 12.0,
        }
    }
}

impl OptimizerSettings {
    /// Returns the learning rate of a step: linear warm-up, then half a cosine.
    pub fn rate(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.learning_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let share = (step - self.warmup) as f64 / (steps.saturating_sub(self.warmup)).max(1) as f64;
        let cosine = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * share.min(1.0)));
        self.learning_rate * (self.final_share + (1.0 - self.final_share) * cosine)
    }
}

/// Adam (Kingma and Ba, arXiv 1412.6980) with decoupled weight decay (arXiv 1711.05101).
pub struct Adam {
    settings: OptimizerSettings,
    steps: u64,
    /// First and second moments of every parameter in the module's order, flattened; empty before the first step.
    moments: Vec<[Tensor<1>; 2]>,
}

const EPSILON: f64 = 1e-8;

struct GradientCollector<'a> {
    gradients: &'a Gradients,
    found: Vec<Option<Tensor<1>>>,
}

impl ModuleVisitor for GradientCollector<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad(self.gradients);
        self.found.push(gradient.map(|gradient| gradient.flatten(0, D - 1)));
    }
}

struct Updater<'a> {
    adam: &'a mut Adam,
    gradients: std::vec::IntoIter<Option<Tensor<1>>>,
    position: usize,
    scale: f64,
    rate: f64,
}

impl ModuleMapper for Updater<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let gradient = self.gradients.next().expect("one entry per parameter");
        let position = self.position;
        self.position += 1;
        param.map(|tensor| {
            let shape = tensor.dims();
            let value = tensor.inner();
            if self.adam.moments.len() == position {
                let zeros = Tensor::zeros([shape.iter().product::<usize>()], &value.device());
                self.adam.moments.push([zeros.clone(), zeros]);
            }
            let updated = match gradient {
                Some(gradient) => self.adam.updated(position, value, gradient * self.scale, self.rate),
                None => value,
            };
            Tensor::from_inner(updated).require_grad()
        })
    }
}

impl Adam {
    /// Starts without history.
    pub fn new(settings: OptimizerSettings) -> Self {
        Self {
            settings,
            steps: 0,
            moments: Vec::new(),
        }
    }

    /// Moves a module's parameters one step; gradients of other modules' parameters are never looked at. Returns the
    /// module and the norm of its gradients; where that is not finite the module comes back unchanged.
    pub fn step<M: Module>(&mut self, module: M, gradients: &Gradients, rate: f64) -> (M, f64) {
        let mut collector = GradientCollector {
            gradients,
            found: Vec::new(),
        };
        module.visit(&mut collector);
        let squares = collector.found.iter().flatten().map(|g| g.clone().powi_scalar(2).sum());
        let sums: Vec<Tensor<1>> = squares.collect();
        let norm = if sums.is_empty() {
            0.0
        } else {
            libm::sqrt(f64::from(Tensor::cat(sums, 0).sum().into_scalar::<f32>()))
        };
        if !norm.is_finite() {
            return (module, norm);
        }
        self.steps += 1;
        let scale = (self.settings.max_norm / norm.max(EPSILON)).min(1.0);
        let mut updater = Updater {
            gradients: collector.found.into_iter(),
            adam: self,
            position: 0,
            scale,
            rate,
        };
        (module.map(&mut updater), norm)
    }

    fn updated<const D: usize>(&mut self, at: usize, value: Tensor<D>, gradient: Tensor<1>, rate: f64) -> Tensor<D> {
        let OptimizerSettings {
            beta_1,
            beta_2,
            weight_decay,
            ..
        } = self.settings;
        let [first, second] = self.moments[at].clone();
        let first = first * beta_1 + gradient.clone() * (1.0 - beta_1);
        let second = second * beta_2 + gradient.powi_scalar(2) * (1.0 - beta_2);
        self.moments[at] = [first.clone(), second.clone()];
        // 2^31 steps are more than any run has.
        let steps = self.steps as f64;
        let mean = first / (1.0 - libm::pow(beta_1, steps));
        let spread = (second / (1.0 - libm::pow(beta_2, steps))).sqrt() + EPSILON;
        let shape = value.dims();
        let step: Tensor<D> = (mean / spread).reshape(shape);
        value * (1.0 - rate * weight_decay) - step * rate
    }

    /// Copies the state to memory, names beginning with `prefix`.
    pub fn state(&self, prefix: &str) -> Weights {
        let array = |tensor: &Tensor<1>| {
            let data = tensor.clone().into_data().convert::<f32>();
            let values: Vec<f32> = data.try_to_vec().expect("converted to this type");
            Weight {
                shape: vec![values.len()],
                values,
            }
        };
        let moments = self.moments.iter().enumerate().flat_map(|(i, [first, second])| {
            [
                (format!("{prefix}.first.{i:04}"), array(first)),
                (format!("{prefix}.second.{i:04}"), array(second)),
            ]
        });
        moments.collect()
    }

    /// Goes on from a state saved after `steps` steps.
    pub fn restore(&mut self, prefix: &str, state: &Weights, steps: u64, device: &Device) {
        let array = |kind: &str, i: usize| {
            let weight = state.get(&format!("{prefix}.{kind}.{i:04}"))?;
            let data = TensorData::new(weight.values.clone(), [weight.values.len()]);
            Some(Tensor::<1>::from_data(data, &device.clone().inner()))
        };
        self.steps = steps;
        self.moments = (0..)
            .map_while(|i| Some([array("first", i)?, array("second", i)?]))
            .collect();
    }
}
