//! Stage 2 as it was published: the paper's networks, equation and losses.
//!
//! # Source
//! FreeTumor, released code for the abdomen (method, section 3). Its errors are not repeated: every organ has the generator's
//! channel of its own, the discriminator is told of all organs alike and learns from its own loss alone. Departure: lesion-centred
//! cubes, real tumours in cubes of their own, and the recipe's soft mask (see [`crate::synth::PublishedGan`]).

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use ndarray::Array3;

use super::adversary::log_odds;
use super::cubes::{Catalogue, Cube, normalise, stack};
use super::drawing::Drawing;
use super::fit::{Metrics, Progress, Trainee, fit};
use super::numbers::{metrics, scalar};
use super::painted::Host;
use super::painting::{Brush, score_painting};
use super::rivals::{Rivals, seen};
use super::synthesizer::{Made, StageTwo};
use super::{LearnError, SynthesizerConfig};
use crate::checkpoint::{Architecture, Bundle, Role, Weights, fill};
use crate::lesion::published::texture_crop;
use crate::nn::{
    Network, Published, PublishedConfig, PublishedScene, published_adversarial, published_discrimination,
    published_missing, published_residual,
};
use crate::rng::{Purpose, Rng};
use crate::volume::{HuWindow, Organ};

struct PublishedTrainee<'a> {
    config: &'a SynthesizerConfig,
    catalogue: Catalogue<'a>,
    bundle: &'a Bundle,
    /// On the device with gradients, its own parameters without.
    critic: Network,
    rivals: Rivals<Published, Published>,
}

/// Hosts as the equation takes them.
struct Canvas {
    /// `[B, 1, D, H, W]`, windowed.
    image: Tensor<5>,
    /// `[B, organs, D, H, W]`, 1 in the healthy tissue of the organ that hosts the lesion.
    healthy: Tensor<5>,
    /// `[B, 1, D, H, W]`, 1 in the lesion.
    lesion: Tensor<5>,
    scene: PublishedScene,
}

impl Canvas {
    /// Prepares hosts; the texture of each is that of its key.
    fn new(hosts: &[Host], organs: &[Organ], window: &HuWindow, keys: &[[u64; 3]], device: &Device) -> Self {
        let shape = hosts[0].image.dim();
        let of = |make: &dyn Fn(&Host) -> Array3<f32>| -> Tensor<5> {
            let arrays: Vec<Array3<f32>> = hosts.iter().map(make).collect();
            stack(arrays.iter(), device)
        };
        let host = |host: &Host| (host.labels).map(|id| f32::from(u8::from(*id == organs[host.organ].id)));
        let one_hot = hosts
            .iter()
            .flat_map(|host| (0..organs.len()).map(|organ| f32::from(u8::from(organ == host.organ))));
        let one_hot = TensorData::new(one_hot.collect::<Vec<_>>(), [hosts.len(), organs.len(), 1, 1, 1]);
        let textures = keys.iter().map(|[seed, index, noise]| {
            texture_crop(shape.into(), &mut Rng::keyed(*seed, *index, *noise, Purpose::Texture))
        });
        let textures: Vec<Array3<f32>> = textures.collect();
        let host = of(&host);
        Self {
            image: normalise(of(&|host| host.image.clone()), window),
            healthy: host.clone() * Tensor::from_data(one_hot, device),
            lesion: of(&|host| host.lesion.mapv(f32::from)),
            scene: PublishedScene {
                soft: of(&|host| host.soft.clone()),
                texture: stack(textures.iter(), device),
                host,
            },
        }
    }

    /// Returns what is added to the windowed image.
    fn change(&self, generator: &Published) -> Tensor<5> {
        let generated = generator.forward(self.image.clone());
        self.scene.change(published_residual(generated, self.healthy.clone()))
    }
}

impl PublishedTrainee<'_> {
    /// Updates the generator alone; returns what it painted, cut off from it, the lesions' masks, and what was measured.
    fn generator_step(&mut self, step: u64, hosts: &[Host]) -> Result<(Tensor<5>, Tensor<5>, Metrics), LearnError> {
        let keys: Vec<[u64; 3]> = (0..hosts.len())
            .map(|slot| [self.config.seed, step, slot as u64])
            .collect();
        let (organs, window) = (&self.catalogue.organs, &self.bundle.plan.window_hu);
        let canvas = Canvas::new(hosts, organs, window, &keys, &self.rivals.device);
        let fake = canvas.image.clone() + canvas.change(&self.rivals.generator);
        let tumours: Vec<usize> = organs.iter().map(|organ| usize::from(organ.tumour_id)).collect();
        let missing = published_missing(self.critic.forward(fake.clone()), &tumours, canvas.lesion.clone());
        // The discriminator's parameters take no part in this graph: they can receive nothing from it.
        let frozen = self.rivals.discriminator.clone().no_grad();
        let adversarial = published_adversarial(frozen.forward(fake.clone()), canvas.lesion.clone());
        let loss = missing.clone() + adversarial.clone() * self.config.published.adversarial;
        let mut measured = self.rivals.teach_generator(step, loss)?;
        measured.extend(metrics([
            ("missing_recall", scalar(missing)),
            ("adversarial", scalar(adversarial)),
        ]));
        Ok((Tensor::from_inner(fake.inner()), canvas.lesion, measured))
    }

    /// Marks the real tumours of cubes, 1 inside.
    fn real_masks(&self, cubes: &[Cube]) -> Tensor<5> {
        let is_tumour = |id: &u8| self.catalogue.organs.iter().any(|organ| organ.tumour_id == *id);
        let masks: Vec<Array3<f32>> = cubes
            .iter()
            .map(|cube| cube.labels.map(|id| f32::from(u8::from(is_tumour(id)))))
            .collect();
        stack(masks.iter(), &self.rivals.device)
    }

    /// Updates the discriminator alone, with gradients that this step alone has filled.
    fn discriminator_step(
        &mut self,
        step: u64,
        (painted, lesion): (Tensor<5>, Tensor<5>),
        reals: &[Cube],
    ) -> Result<Metrics, LearnError> {
        let images = stack(reals.iter().map(|cube| &cube.image), &self.rivals.device);
        let images = normalise(images, &self.bundle.plan.window_hu);
        let real = self.real_masks(reals);
        let logits = self.rivals.discriminator.forward(Tensor::cat(vec![painted, images], 0));
        let lesions = Tensor::cat(vec![lesion.clone(), Tensor::zeros_like(&real)], 0);
        let tumours = Tensor::cat(vec![Tensor::zeros_like(&lesion), real.clone()], 0);
        let loss = published_discrimination(logits.clone(), lesions, tumours);
        self.rivals
            .teach_discriminator(step, loss, &seen(log_odds(logits), [lesion, real], None))
    }

    fn drawing(&self) -> Drawing<'_> {
        Drawing {
            config: self.config,
            catalogue: &self.catalogue,
            each: 1,
        }
    }
}

impl Trainee for PublishedTrainee<'_> {
    fn step(&mut self, step: u64) -> Result<Metrics, LearnError> {
        let began = Instant::now();
        let (hosts, reals) = (self.drawing().hosts(step)?, self.drawing().reals(step)?);
        self.rivals.waited += began.elapsed();
        let (painted, lesion, mut measured) = self.generator_step(step, &hosts)?;
        measured.extend(self.discriminator_step(step, (painted, lesion), &reals)?);
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
    /// Trains the published generator and measures it. The discriminator is not kept: nothing asks it afterwards.
    pub fn published(&self, progress: &mut dyn Progress) -> Result<Made, LearnError> {
        let (config, critic) = (self.config, self.critic);
        let catalogue = Catalogue::new(self.cases, self.training);
        self.note_sizes(&catalogue, progress);
        let organs = catalogue.organs.clone();
        let width = config.published.width;
        let shapes = [
            PublishedConfig::generator(width, organs.len()),
            PublishedConfig::discriminator(width),
        ];
        let device = self.device.clone().autodiff();
        let [generator, discriminator] = &shapes;
        let networks = (
            generator.init(&device, config.seed).with_compute_dtype(self.dtype),
            discriminator
                .init(&device, config.seed + 1)
                .with_compute_dtype(self.dtype),
        );
        let mut trainee = PublishedTrainee {
            config,
            catalogue,
            bundle: critic,
            critic: critic.critic.clone().train().no_grad(),
            rivals: Rivals::new(config, networks, device),
        };
        let mut fitted = fit(&mut trainee, &self.fit_settings(), progress)?;
        let weights = config.precision.rounded(std::mem::take(&mut fitted.model));
        let judge = fill(discriminator.init(self.device, 0), trainee.rivals.judge())?.with_compute_dtype(self.dtype);
        let (device, dtype) = (self.device, self.dtype);
        let painter = self.painter(progress)?;
        let score = |generator: Published| {
            let generator = generator.with_compute_dtype(dtype);
            let window = critic.plan.window_hu;
            let residual = |host: &Host, key: [u64; 3]| {
                let canvas = Canvas::new(std::slice::from_ref(host), &organs, &window, &[key], device);
                canvas.change(&generator) * (window.high - window.low)
            };
            let brush = Brush {
                residual: &residual,
                discriminate: &|image| judge.forward(image),
            };
            score_painting(&painter, &brush)
        };
        let fresh = |seed| generator.init(device, seed);
        let (trained, untrained) = (score(fill(fresh(0), weights.clone())?)?, score(fresh(config.seed))?);
        Ok(Made {
            parameters: shapes.each_ref().map(PublishedConfig::parameters),
            models: vec![(Role::Generator, Architecture::Published(generator.clone()), weights)],
            realism: None,
            trained,
            untrained,
            fitted,
        })
    }
}
