//! Our stage 2: a generator that is told mask, organ, size and contrast.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Tensor, TensorData, activation};
use ndarray::Array3;

use super::LearnError;
use super::adversary::{class_weights, discriminator_classes, log_odds, unsteadiness};
use super::cubes::{Catalogue, Cube, normalise, stack};
use super::drawing::Drawing;
use super::fit::{Fitted, Metrics, Progress, Trainee, fit};
use super::numbers::{metrics, scalar};
use super::painted::{Host, HostBatch, draw_noise};
use super::painting::{Brush, score_painting};
use super::rivals::{Rivals, seen};
use super::synthesizer::{Made, StageTwo};
use super::synthesizer_settings::{LossWeights, SynthesizerConfig};
use super::texture::{Texture, Textures, diversity, edge, per_lesion, roughness, strength};
use crate::checkpoint::{Architecture, Bundle, Role, Weights, fill};
use crate::nn::{Generator, GeneratorConfig, Network, REAL, Unet, UnetConfig, weighted_cross_entropy};
use crate::rng::{Purpose, Rng};
use crate::volume::ContrastBin;

struct ConditionalTrainee<'a> {
    config: &'a SynthesizerConfig,
    catalogue: Catalogue<'a>,
    bundle: &'a Bundle,
    /// On the device with gradients, its own parameters without.
    critic: Network,
    rivals: Rivals<Generator, Unet>,
    textures: Textures,
}

impl ConditionalTrainee<'_> {
    /// Draws a step's hosts in pairs: what another noise field changes is seen in a pair alone. Neighbours are the same lesion and
    /// differ in their noise.
    fn hosts(&self, step: u64) -> Result<Vec<Host>, LearnError> {
        let hosts = self.drawing().hosts(step)?;
        Ok(hosts.into_iter().flat_map(|host| [host.clone(), host]).collect())
    }

    fn drawing(&self) -> Drawing<'_> {
        Drawing {
            config: self.config,
            catalogue: &self.catalogue,
            each: 2,
        }
    }

    fn noise(&self, step: u64, hosts: &[Host]) -> Tensor<5> {
        let fields: Vec<Array3<f32>> = (0..hosts.len())
            .map(|slot| draw_noise(self.config.seed, step, slot as u64, hosts[0].image.dim().0))
            .collect();
        stack(fields.iter(), &self.rivals.device)
    }

    /// The recall that the critic shall reach on a lesion.
    fn wanted_recall(&self, host: &Host) -> f32 {
        let organ = &self.catalogue.organs[host.organ].name;
        let bin = ContrastBin::of_contrast(host.contrast_hu);
        let thresholds = self.bundle.calibration.thresholds(organ, host.size(), bin);
        let recall = thresholds.map_or(0.7, |thresholds| thresholds.recall);
        // A critic that misses a tenth of the real lesions, or was shown few, calibrates to 0, and would ask for nothing.
        (recall + self.config.recall_margin).clamp(self.config.least_recall, 0.95) as f32
    }

    /// Draws strength and edge of every host's texture from real lesions, and 1 where there is an edge, else 0; neighbours share one.
    fn wanted_textures(&self, step: u64, hosts: &[Host]) -> [Tensor<1>; 3] {
        let draw = |slot: usize| {
            let mut rng = Rng::keyed(self.config.seed, step, 2000 + slot as u64 / 2, Purpose::Training);
            let host = &hosts[slot];
            self.textures.draw(&mut rng, host.organ, host.size())
        };
        let wanted: Vec<Option<Texture>> = (0..hosts.len()).map(draw).collect();
        let of = |of: fn(Texture) -> f32| {
            let values: Vec<f32> = wanted.iter().map(|texture| texture.map_or(0.0, of)).collect();
            Tensor::from_data(TensorData::new(values, [hosts.len()]), &self.rivals.device)
        };
        [
            of(|texture| texture.strength),
            of(|texture| texture.edge.unwrap_or(0.0)),
            of(|texture| f32::from(u8::from(texture.edge.is_some()))),
        ]
    }

    /// Returns the critic's losses: recall below the wanted one, and tumour around the lesion that was not there before.
    fn critic_losses(&self, hosts: &[Host], batch: &HostBatch, fake: Tensor<5>) -> (Tensor<1>, Tensor<1>) {
        let b = hosts.len();
        let chances = activation::softmax(self.critic.forward(fake), 1);
        let classes = chances.dims()[1];
        let (mut own, mut any) = (vec![0.0_f32; b * classes], vec![0.0_f32; b * classes]);
        for (i, host) in hosts.iter().enumerate() {
            own[i * classes + usize::from(self.catalogue.organs[host.organ].tumour_id)] = 1.0;
            for organ in &self.catalogue.organs {
                any[i * classes + usize::from(organ.tumour_id)] = 1.0;
            }
        }
        let select = |chosen: Vec<f32>, chances: Tensor<5>| -> Tensor<5> {
            let chosen = Tensor::<5>::from_data(TensorData::new(chosen, [b, classes, 1, 1, 1]), &self.rivals.device);
            (chances * chosen).sum_dim(1)
        };
        let size = per_lesion(batch.lesion.clone()).clamp_min(1.0);
        let recall = per_lesion(select(own, chances.clone()) * batch.lesion.clone()) / size.clone();
        let wanted: Vec<f32> = hosts.iter().map(|host| self.wanted_recall(host)).collect();
        let wanted = Tensor::<1>::from_data(TensorData::new(wanted, [b]), &self.rivals.device);
        let missing = activation::relu(wanted.clone() - recall) / wanted;

        let plain = self.bundle.plan.window_hu;
        let before = activation::softmax(self.critic.forward(normalise(batch.image_hu.clone(), &plain)), 1);
        let new = activation::relu(select(any.clone(), chances) - select(any, before).detach());
        let around: Vec<Array3<f32>> = hosts.iter().map(|host| host.around(&self.catalogue)).collect();
        let alarm = per_lesion(new * stack(around.iter(), &self.rivals.device)) / size;
        (missing.mean(), alarm.mean())
    }

    /// Returns the parts of the generator's loss, and by how much the pairs differ.
    fn generator_losses(
        &self,
        step: u64,
        hosts: &[Host],
        (batch, residual, fake): (&HostBatch, &Tensor<5>, &Tensor<5>),
    ) -> (GeneratorLosses, f64) {
        let (recall, alarm) = self.critic_losses(hosts, batch, fake.clone());
        // The discriminator's parameters take no part in this graph: they can receive nothing from it.
        let frozen = self.rivals.discriminator.clone().no_grad();
        let share = 1.0 / hosts.len() as f32;
        let real = hosts.iter().flat_map(|host| {
            let classes: Vec<_> = host.lesion.iter().map(|l| (*l == 1).then_some(REAL)).collect();
            class_weights(&classes, share)
        });
        let weights = self.weights_tensor(real.collect(), fake.dims());
        let [wanted, wanted_edge, has_edge] = self.wanted_textures(step, hosts);
        let painted_hu = batch.image_hu.clone() + residual.clone();
        let strength = strength(painted_hu.clone(), batch.lesion.clone());
        let [edge, has_core] = edge(painted_hu, batch.lesion.clone());
        let diversity = diversity(batch, residual.clone(), wanted.clone());
        let losses = GeneratorLosses {
            recall,
            alarm,
            adversarial: weighted_cross_entropy(frozen.forward(fake.clone(), None), weights),
            roughness: roughness(batch, &self.rivals.generator, residual.clone()),
            texture: (strength - wanted).abs().mean() / 10.0,
            edge: ((edge - wanted_edge).abs() * has_core * has_edge).mean() / 10.0,
            sameness: activation::relu(diversity.clone().neg() + self.config.diversity).mean(),
        };
        (losses, scalar(diversity.mean()))
    }

    /// Updates the generator alone; returns what it painted, cut off from it.
    fn generator_step(&mut self, step: u64, hosts: &[Host]) -> Result<Painted, LearnError> {
        let batch = HostBatch::new(hosts, self.catalogue.organs.len(), &self.rivals.device);
        let window = self.bundle.plan.window_hu;
        let residual = batch.residual(&self.rivals.generator, &window, self.noise(step, hosts));
        let fake = normalise(batch.image_hu.clone() + residual.clone(), &window);
        let (losses, diversity) = self.generator_losses(step, hosts, (&batch, &residual, &fake));
        let loss = losses.weighted(&self.config.loss);
        let mut measured = self.rivals.teach_generator(step, loss)?;
        measured.extend(losses.metrics());
        Ok(Painted {
            cubes: Tensor::from_inner(fake.inner()),
            lesions: batch.lesion,
            diversity,
            measured,
        })
    }

    fn weights_tensor(&self, weights: Vec<f32>, like: [usize; 5]) -> Tensor<5> {
        let [b, _, d, h, w] = like;
        Tensor::from_data(TensorData::new(weights, [b, 3, d, h, w]), &self.rivals.device)
    }

    /// Returns the weights of what the discriminator shall say, hosts first, then cubes around real tumours.
    fn judgements(&self, hosts: &[Host], reals: &[Cube]) -> Result<Vec<f32>, LearnError> {
        let share = 1.0 / (hosts.len() + reals.len()) as f32;
        let mut weights = Vec::new();
        for host in hosts {
            let cube = Cube {
                case: host.case,
                image: Array3::zeros((0, 0, 0)),
                labels: host.labels.clone(),
            };
            let classes = discriminator_classes(&self.catalogue, &cube, Some(&host.lesion))?;
            weights.extend(class_weights(&classes, share));
        }
        for cube in reals {
            let classes = discriminator_classes(&self.catalogue, cube, None)?;
            weights.extend(class_weights(&classes, share));
        }
        Ok(weights)
    }

    /// Updates the discriminator alone, on painted cubes that no longer know of the generator and on real tumours, with
    /// gradients that this step alone has filled (the released code adds the generator's; section 7, item 8).
    fn discriminator_step(
        &mut self,
        step: u64,
        (hosts, reals): (&[Host], &[Cube]),
        painted: &Painted,
    ) -> Result<Metrics, LearnError> {
        let images = stack(reals.iter().map(|cube| &cube.image), &self.rivals.device);
        let images = normalise(images, &self.bundle.plan.window_hu);
        let images = Tensor::cat(vec![painted.cubes.clone(), images], 0);
        let weights = self.weights_tensor(self.judgements(hosts, reals)?, images.dims());
        let logits = self.rivals.discriminator.forward(images.clone(), None);
        let real = weights.clone().narrow(1, REAL, 1).greater_elem(0.0).float();
        let loss = weighted_cross_entropy(logits.clone(), weights);
        let penalty = match self.config.r1 > 0.0 {
            true => {
                let mut rng = Rng::keyed(self.config.seed, step, 3000, Purpose::Training);
                let seen = [images, logits.clone(), real.clone()].map(|x| x.narrow(0, hosts.len(), reals.len()));
                unsteadiness(&self.rivals.discriminator, seen, &mut rng)
            }
            false => Tensor::zeros([1], &self.rivals.device),
        };
        let real = real.narrow(0, hosts.len(), reals.len());
        let seen = seen(
            log_odds(logits),
            [painted.lesions.clone(), real],
            Some(painted.diversity),
        );
        let loss = loss + penalty.clone() * self.config.r1;
        let mut measured = self.rivals.teach_discriminator(step, loss, &seen)?;
        measured.extend(metrics([("unsteadiness", scalar(penalty))]));
        Ok(measured)
    }
}

/// The parts of the generator's loss.
struct GeneratorLosses {
    recall: Tensor<1>,
    alarm: Tensor<1>,
    adversarial: Tensor<1>,
    roughness: Tensor<1>,
    texture: Tensor<1>,
    edge: Tensor<1>,
    sameness: Tensor<1>,
}

impl GeneratorLosses {
    fn weighted(&self, weights: &LossWeights) -> Tensor<1> {
        self.recall.clone() * weights.recall
            + self.alarm.clone() * weights.false_alarm
            + self.adversarial.clone() * weights.adversarial
            + self.roughness.clone() * weights.roughness
            + self.texture.clone() * weights.texture
            + self.edge.clone() * weights.edge
            + self.sameness.clone() * weights.sameness
    }

    fn metrics(self) -> Metrics {
        metrics([
            ("missing_recall", scalar(self.recall)),
            ("false_alarm", scalar(self.alarm)),
            ("adversarial", scalar(self.adversarial)),
            ("roughness", scalar(self.roughness)),
            ("texture", scalar(self.texture)),
            ("edge", scalar(self.edge)),
            ("sameness", scalar(self.sameness)),
        ])
    }
}

/// What the generator's step leaves to the discriminator's.
struct Painted {
    /// As networks see them, without gradients.
    cubes: Tensor<5>,
    /// 1 in the lesion.
    lesions: Tensor<5>,
    /// Change by another noise field over the wanted strength.
    diversity: f64,
    measured: Metrics,
}

impl Trainee for ConditionalTrainee<'_> {
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError> {
        let began = Instant::now();
        let (hosts, reals) = (self.hosts(step)?, self.drawing().reals(step)?);
        self.rivals.waited += began.elapsed();
        let painted = self.generator_step(step, &hosts)?;
        let mut measured = self.discriminator_step(step, (&hosts, &reals), &painted)?;
        measured.extend(painted.measured);
        Ok(measured)
    }

    fn state(&self) -> Weights {
        self.rivals.state()
    }

    fn restore(&mut self, state: Weights, steps: u64) -> Result<(), LearnError> {
        self.rivals.restore(&state, steps)
    }

    fn model(&self) -> Weights {
        self.rivals.model()
    }

    fn data_wait(&self) -> Duration {
        self.rivals.waited
    }
}

impl StageTwo<'_> {
    /// Trains our generator and measures it.
    pub fn conditional(&self, progress: &mut dyn Progress) -> Result<Made, LearnError> {
        let catalogue = Catalogue::new(self.cases, self.training);
        let organs = catalogue.organs.len();
        let networks = self.config.networks(organs);
        let trained = self.compete((catalogue, &networks), progress)?;
        let painter = self.painter(progress)?;
        let (device, dtype) = (self.device, self.dtype);
        let discriminator = fill(networks.1.init(device, 0), trained.discriminator.clone())?.with_compute_dtype(dtype);
        let score = |generator: Generator| {
            let generator = generator.with_compute_dtype(dtype);
            let residual = |host: &Host, [seed, index, noise]: [u64; 3]| {
                let batch = HostBatch::new(std::slice::from_ref(host), organs, device);
                let field = draw_noise(seed, index, noise, host.image.dim().0);
                let noise = stack(std::iter::once(&field), device);
                batch.residual(&generator, &self.critic.plan.window_hu, noise)
            };
            let discriminate = |image: Tensor<5>| discriminator.forward(image, None);
            score_painting(
                &painter,
                &Brush {
                    residual: &residual,
                    discriminate: &discriminate,
                },
            )
        };
        let discriminate = |image: Tensor<5>| discriminator.forward(image, None);
        let realism = self
            .hosts_are_held_out()
            .then(|| painter.realism(&discriminate))
            .transpose()?;
        let fresh = |seed| networks.0.init(device, seed);
        let (trained_score, untrained) = (
            score(fill(fresh(0), trained.generator.clone())?)?,
            score(fresh(self.config.seed))?,
        );
        let architectures = [Architecture::Generator(networks.0), Architecture::Unet(networks.1)];
        let parameters = architectures.each_ref().map(Architecture::parameters);
        let [generator, discriminator] = architectures;
        Ok(Made {
            models: vec![
                (Role::Generator, generator, trained.generator),
                (Role::Discriminator, discriminator, trained.discriminator),
            ],
            parameters,
            realism,
            trained: trained_score,
            untrained,
            fitted: trained.fitted,
        })
    }

    /// Trains generator and discriminator against each other and the critic.
    fn compete(
        &self,
        (catalogue, networks): (Catalogue, &(GeneratorConfig, UnetConfig)),
        progress: &mut dyn Progress,
    ) -> Result<Trained, LearnError> {
        self.note_sizes(&catalogue, progress);
        let (config, device) = (self.config, self.device.clone().autodiff());
        let (generator, discriminator) = networks;
        let textures = Textures::measure(&catalogue, config.max_cube, self.device)?;
        let networks = (
            generator.init(&device, config.seed).with_compute_dtype(self.dtype),
            discriminator
                .init(&device, config.seed + 1)
                .with_compute_dtype(self.dtype),
        );
        let mut trainee = ConditionalTrainee {
            config,
            catalogue,
            bundle: self.critic,
            critic: self.critic.critic.clone().train().no_grad(),
            rivals: Rivals::new(config, networks, device),
            textures,
        };
        let mut fitted = fit(&mut trainee, &self.fit_settings(), progress)?;
        Ok(Trained {
            generator: config.precision.rounded(std::mem::take(&mut fitted.model)),
            discriminator: config.precision.rounded(trainee.rivals.judge()),
            fitted,
        })
    }
}

/// What a competition ends with.
struct Trained {
    generator: Weights,
    discriminator: Weights,
    /// Its model is taken out.
    fitted: Fitted,
}

#[cfg(test)]
#[path = "conditional_tests.rs"]
mod tests;
