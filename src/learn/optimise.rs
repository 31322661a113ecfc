//! Optimizers and their learning rate schedules; the state is plain arrays, so that a resumed run continues bit for bit.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Weight, Weights};

/// The rule by which gradients move weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Adam (Kingma and Ba, arXiv 1412.6980) with decoupled weight decay (arXiv 1711.05101).
    #[default]
    Adam,
    /// Stochastic gradient descent with Nesterov's momentum, weight decay added to the gradient: PyTorch's, as nnU-Net uses it.
    Sgd,
}

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine down to `final_share`.
    #[default]
    Cosine,
    /// (1 - steps done / steps) to the power of 0.9, as nnU-Net's.
    Polynomial,
}

/// The optimizer's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSettings {
    /// The rule.
    pub rule: Rule,
    /// How the learning rate falls.
    pub schedule: Schedule,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Steps over which it rises from 0.
    pub warmup: u64,
    /// Share of the largest rate that is left at the end of the cosine.
    pub final_share: f64,
    /// Adam: decay of the mean of gradients.
    pub beta_1: f64,
    /// Adam: decay of the mean of their squares.
    pub beta_2: f64,
    /// Sgd: decay of the sum of gradients.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Gradients of larger norm are scaled down to it.
    pub max_norm: f64,
    /// Steps whose gradients are averaged before weights move.
    pub accumulate: u64,
    /// Decay of the running mean of weights that is kept as the result; 0 keeps the last weights.
    pub ema: f64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            rule: Rule::default(),
            schedule: Schedule::default(),
            learning_rate: 1e-3,
            warmup: 20,
            final_share: 0.02,
            beta_1: 0.9,
            beta_2: 0.999,
            momentum: 0.99,
            weight_decay: 1e-5,
            max_norm: 12.0,
            accumulate: 1,
            ema: 0.0,
        }
    }
}

/// The power of the polynomial schedule.
const POWER: f64 = 0.9;

impl OptimizerSettings {
    /// Returns the learning rate of a step: linear warm-up, then the schedule.
    pub fn rate(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.learning_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let share = (step - self.warmup) as f64 / (steps.saturating_sub(self.warmup)).max(1) as f64;
        let left = match self.schedule {
            Schedule::Cosine => {
                let cosine = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * share.min(1.0)));
                self.final_share + (1.0 - self.final_share) * cosine
            }
            Schedule::Polynomial => libm::pow(1.0 - share.min(1.0), POWER),
        };
        self.learning_rate * left
    }
}

/// Moves a module's weights; what it remembers of earlier steps is its state.
pub struct Optimizer {
    settings: OptimizerSettings,
    /// Steps seen, whether weights moved or not.
    steps: u64,
    /// What each parameter's rule remembers, in the module's order, flattened; empty before the first move.
    memory: Vec<Memory>,
    /// Sums of gradients since weights last moved; empty where there are none.
    sums: Vec<Option<Tensor<1>>>,
}

/// What is remembered of one parameter.
#[derive(Clone)]
struct Memory {
    /// Adam: mean of gradients; Sgd: decaying sum.
    first: Tensor<1>,
    /// Adam: mean of squares; Sgd: nothing.
    second: Option<Tensor<1>>,
    /// The running mean of the weights; nothing without `ema`.
    average: Option<Tensor<1>>,
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
    optimizer: &'a mut Optimizer,
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
            let value: Tensor<1> = tensor.inner().flatten(0, D - 1);
            self.optimizer.remember(position, &value);
            let gradient = gradient.map(|gradient| gradient * self.scale);
            let updated = self.optimizer.moved(position, value, gradient, self.rate);
            Tensor::from_inner(updated.reshape(shape)).require_grad()
        })
    }
}

/// Replaces parameters by their running means.
struct Averages<'a>(std::slice::Iter<'a, Memory>);

impl ModuleMapper for Averages<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let average = self.0.next().and_then(|memory| memory.average.clone());
        param.map(|tensor| match average {
            Some(average) => Tensor::from_inner(average.reshape(tensor.dims())).require_grad(),
            None => tensor,
        })
    }
}

impl Optimizer {
    /// Starts without history.
    pub fn new(settings: OptimizerSettings) -> Self {
        Self {
            settings,
            steps: 0,
            memory: Vec::new(),
            sums: Vec::new(),
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
        let found = match self.settings.accumulate {
            0 | 1 => collector.found,
            _ => self.summed(collector.found),
        };
        let norm = norm(&found);
        if !norm.is_finite() {
            return (module, norm);
        }
        self.steps += 1;
        let accumulate = self.settings.accumulate.max(1);
        if !self.steps.is_multiple_of(accumulate) {
            self.sums = found;
            // Of the mean so far: what is bounded where the step is made.
            return (module, norm / (self.steps % accumulate) as f64);
        }
        self.sums.clear();
        // The mean's norm is what is bounded.
        let share = 1.0 / accumulate as f64;
        let scale = share * (self.settings.max_norm / (norm * share).max(EPSILON)).min(1.0);
        let mut updater = Updater {
            gradients: found.into_iter(),
            optimizer: self,
            position: 0,
            scale,
            rate,
        };
        (module.map(&mut updater), norm * share)
    }

    /// Adds the sums of earlier steps to gradients.
    fn summed(&self, found: Vec<Option<Tensor<1>>>) -> Vec<Option<Tensor<1>>> {
        let add = |(at, gradient): (usize, Option<Tensor<1>>)| match (gradient, self.sums.get(at).cloned().flatten()) {
            (Some(gradient), Some(sum)) => Some(gradient + sum),
            (gradient, sum) => gradient.or(sum),
        };
        found.into_iter().enumerate().map(add).collect()
    }

    /// Makes room for a parameter that is seen for the first time.
    fn remember(&mut self, at: usize, value: &Tensor<1>) {
        if self.memory.len() == at {
            let zeros = || Tensor::zeros(value.dims(), &value.device());
            self.memory.push(Memory {
                first: zeros(),
                second: (self.settings.rule == Rule::Adam).then(zeros),
                average: (self.settings.ema > 0.0).then(|| value.clone()),
            });
        }
    }

    fn moved(&mut self, at: usize, value: Tensor<1>, gradient: Option<Tensor<1>>, rate: f64) -> Tensor<1> {
        let moves = self.steps / self.settings.accumulate.max(1);
        let memory = &mut self.memory[at];
        let value = match gradient {
            None => value,
            Some(gradient) => match self.settings.rule {
                Rule::Adam => memory.adam(&self.settings, value, gradient, (rate, moves)),
                Rule::Sgd => memory.sgd(&self.settings, value, gradient, rate),
            },
        };
        let decay = self.settings.ema;
        if let Some(average) = &mut memory.average {
            *average = average.clone() * decay + value.clone() * (1.0 - decay);
        }
        value
    }

    /// Returns the module with the running means of its weights, where they are kept.
    pub fn averaged<M: Module>(&self, module: M) -> M {
        module.map(&mut Averages(self.memory.iter()))
    }

    /// Copies the state to memory, names beginning with `prefix`.
    pub fn state(&self, prefix: &str) -> Weights {
        let named = |kind: &str, i: usize, tensor: Option<&Tensor<1>>| {
            let data = tensor?.clone().into_data().convert::<f32>();
            let values: Vec<f32> = data.try_to_vec().expect("converted to this type");
            let shape = vec![values.len()];
            Some((format!("{prefix}.{kind}.{i:04}"), Weight { shape, values }))
        };
        let memory = self.memory.iter().enumerate().flat_map(|(i, memory)| {
            [
                named("first", i, Some(&memory.first)),
                named("second", i, memory.second.as_ref()),
                named("average", i, memory.average.as_ref()),
            ]
        });
        let sums = self
            .sums
            .iter()
            .enumerate()
            .map(|(i, sum)| named("sum", i, sum.as_ref()));
        memory.chain(sums).flatten().collect()
    }

    /// Goes on from a state saved after `steps` steps of a module with `parameters` parameters.
    pub fn restore(&mut self, prefix: &str, state: &Weights, steps: u64, device: &Device) {
        let array = |kind: &str, i: usize| {
            let weight = state.get(&format!("{prefix}.{kind}.{i:04}"))?;
            let data = TensorData::new(weight.values.clone(), [weight.values.len()]);
            Some(Tensor::<1>::from_data(data, &device.clone().inner()))
        };
        self.steps = steps;
        let memory = |i| {
            Some(Memory {
                first: array("first", i)?,
                second: array("second", i),
                average: array("average", i),
            })
        };
        self.memory = (0..).map_while(memory).collect();
        let prefix = format!("{prefix}.sum.");
        let last = state
            .keys()
            .filter_map(|name| name.strip_prefix(&prefix)?.parse::<usize>().ok())
            .max();
        self.sums = last.map_or(Vec::new(), |last| (0..=last).map(|i| array("sum", i)).collect());
    }
}

impl Memory {
    fn adam(
        &mut self,
        settings: &OptimizerSettings,
        value: Tensor<1>,
        gradient: Tensor<1>,
        (rate, moves): (f64, u64),
    ) -> Tensor<1> {
        let (beta_1, beta_2) = (settings.beta_1, settings.beta_2);
        let second = self.second.take().expect("Adam remembers squares");
        let first = self.first.clone() * beta_1 + gradient.clone() * (1.0 - beta_1);
        let second = second * beta_2 + gradient.powi_scalar(2) * (1.0 - beta_2);
        // 2^31 moves are more than any run has.
        let moves = moves as f64;
        let mean = first.clone() / (1.0 - libm::pow(beta_1, moves));
        let spread = (second.clone() / (1.0 - libm::pow(beta_2, moves))).sqrt() + EPSILON;
        (self.first, self.second) = (first, Some(second));
        value * (1.0 - rate * settings.weight_decay) - mean / spread * rate
    }

    fn sgd(&mut self, settings: &OptimizerSettings, value: Tensor<1>, gradient: Tensor<1>, rate: f64) -> Tensor<1> {
        let gradient = gradient + value.clone() * settings.weight_decay;
        self.first = self.first.clone() * settings.momentum + gradient.clone();
        value - (gradient + self.first.clone() * settings.momentum) * rate
    }
}

/// Larger tensors are summed part by part: the CPU backend sums more than 2^22 elements in the order in which threads are free.
const SUMMED_AT_ONCE: usize = 1 << 21;

/// Returns the norm over all parameters' gradients.
fn norm(gradients: &[Option<Tensor<1>>]) -> f64 {
    let parts = gradients.iter().flatten().flat_map(|gradient| {
        let gradient = gradient.clone();
        if gradient.dims()[0] > SUMMED_AT_ONCE {
            gradient.split(SUMMED_AT_ONCE, 0)
        } else {
            vec![gradient]
        }
    });
    let sums: Vec<Tensor<1>> = parts.map(|part| part.powi_scalar(2).sum()).collect();
    if sums.is_empty() {
        return 0.0;
    }
    libm::sqrt(f64::from(Tensor::cat(sums, 0).sum().into_scalar::<f32>()))
}

#[cfg(test)]
#[path = "optimise_tests.rs"]
mod tests;
