//! Optimizers against PyTorch's.

use serde_json::Value;

use super::*;

#[derive(Module, Debug)]
struct Point {
    x: Param<Tensor<1>>,
}

impl Point {
    fn values(&self) -> Vec<f64> {
        self.x.val().into_data().iter::<f64>().collect()
    }
}

/// What PyTorch made of the same quadratic (`tests/golden/optimizer/make.py`).
fn golden() -> Value {
    serde_json::from_str(include_str!("../../tests/golden/optimizer/golden.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn settings(rule: Rule) -> OptimizerSettings {
    OptimizerSettings {
        rule,
        schedule: Schedule::Polynomial,
        learning_rate: 0.05,
        warmup: 0,
        beta_2: 0.99,
        weight_decay: 0.01,
        max_norm: 3.0,
        ..OptimizerSettings::default()
    }
}

/// Steps whose weights are compared, one after another.
struct Run {
    golden: Value,
    point: Point,
    optimizer: Optimizer,
    settings: OptimizerSettings,
}

impl Run {
    fn new(settings: &OptimizerSettings) -> Self {
        let golden = golden();
        let device = Device::flex().autodiff();
        let start = TensorData::new(numbers(&golden["start"]), [4]).convert::<f32>();
        Self {
            point: Point {
                x: Param::from_tensor(Tensor::from_data(start, &device).require_grad()),
            },
            optimizer: Optimizer::new(settings.clone()),
            settings: settings.clone(),
            golden,
        }
    }

    fn step(&mut self, step: usize) {
        let device = Device::flex().autodiff();
        let vector = |name: &str| -> Tensor<1> {
            Tensor::from_data(
                TensorData::new(numbers(&self.golden[name]), [4]).convert::<f32>(),
                &device,
            )
        };
        let away = self.point.x.val() - vector("centre") - 0.1 * (step % 3) as f64;
        let loss = (vector("curvature") * away.powi_scalar(2)).sum() / 2.0;
        let rate = match self.settings.rule {
            Rule::Adam => 0.05,
            Rule::Sgd => self.settings.rate(step as u64, 12),
        };
        self.point = self.optimizer.step(self.point.clone(), &loss.backward(), rate).0;
    }

    #[track_caller]
    fn is_at(&self, of: &str, kind: &str, step: usize) {
        let got = match kind {
            "mean" => self.optimizer.averaged(self.point.clone()).values(),
            _ => self.point.values(),
        };
        for (got, want) in got.iter().zip(numbers(&self.golden[of][kind][step])) {
            // Single precision over twelve steps; the golden values are in double.
            assert!(
                (got - want).abs() < 2e-6 * (1.0 + want.abs()),
                "{of} {kind} {step}: {got} {want}"
            );
        }
    }
}

#[test]
fn each_rule_makes_the_steps_that_pytorch_makes() {
    for (name, rule) in [("adam", Rule::Adam), ("sgd", Rule::Sgd)] {
        let mut run = Run::new(&settings(rule));
        for step in 0..12 {
            run.step(step);
            run.is_at(name, "x", step);
        }
    }
}

#[test]
fn accumulated_gradients_and_averaged_weights_are_pytorch_s_also_after_a_resume() {
    let accumulate = OptimizerSettings {
        accumulate: 3,
        ..settings(Rule::Adam)
    };
    let average = OptimizerSettings {
        ema: 0.8,
        ..settings(Rule::Sgd)
    };
    for (name, kind, settings) in [("adam_accumulated", "x", accumulate), ("sgd_averaged", "mean", average)] {
        // The seventh step is the first of three whose gradients are summed.
        for resumed_at in [0, 7] {
            let mut run = Run::new(&settings);
            for step in 0..12 {
                if step == resumed_at {
                    let state = run.optimizer.state("o");
                    run.optimizer = Optimizer::new(settings.clone());
                    run.optimizer
                        .restore("o", &state, step as u64, &Device::flex().autodiff());
                }
                run.step(step);
                run.is_at(name, kind, step);
            }
        }
    }
}

#[test]
fn rates_rise_and_fall() {
    let cosine = OptimizerSettings {
        warmup: 10,
        ..OptimizerSettings::default()
    };
    let at = |step| cosine.rate(step, 110) / cosine.learning_rate;
    assert!((at(0) - 0.1).abs() < 1e-12 && (at(9) - 1.0).abs() < 1e-12);
    assert!((at(60) - 0.51).abs() < 1e-12 && (at(110) - 0.02).abs() < 1e-12);
    let polynomial = OptimizerSettings {
        schedule: Schedule::Polynomial,
        ..cosine
    };
    assert!((polynomial.rate(60, 110) / polynomial.learning_rate - 0.5_f64.powf(0.9)).abs() < 1e-12);
}
