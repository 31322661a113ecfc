//! What the device thread computes: batches of alike cubes.

use burn::tensor::{Device, Element, Int, Tensor, TensorData, activation};
use ndarray::Array3;

use super::{LesionCube, SynthError};
use crate::checkpoint::Bundle;
use crate::nn::{Condition, Network, PublishedScene, REAL, SYNTHETIC, published_residual};
use crate::telemetry::metrics::Stage;

/// What the critic says of an untouched host.
#[derive(Clone, Debug)]
pub struct HostLook {
    /// Its label ids.
    pub classes: Array3<u8>,
    /// Of each tumour class for which the critic's calibration has a level, where it is as probable: 1 there.
    pub possible: Vec<(u8, Array3<u8>)>,
}

/// Work on one cube, in HU.
pub(super) enum Task {
    /// With a standard normal number for every voxel.
    Paint(LesionCube, Vec<f32>),
    /// By the published equation, with a texture.
    PaintPublished(LesionCube, Array3<f32>),
    /// A critic's opinion of a cube before or after synthesis.
    Judge(Array3<i16>, Option<usize>),
    /// The critic's opinion of an untouched host.
    Look(Array3<i16>),
    /// The discriminator's opinion after synthesis.
    Discriminate(Array3<i16>),
}

/// The network that a task needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NetworkKind {
    Generator,
    Published,
    /// The bundle's own, or that of an inner fold.
    Critic(Option<usize>),
    Discriminator,
}

/// What came of a task.
pub(super) enum Answer {
    Residual(Array3<f32>),
    HostLook(HostLook),
    Classes(Array3<u8>),
    /// How real it looks, voxel by voxel.
    Real(Array3<f32>),
}

type Dim = (usize, usize, usize);

impl Task {
    fn dim(&self) -> Dim {
        match self {
            Self::Paint(cube, _) | Self::PaintPublished(cube, _) => cube.image.dim(),
            Self::Judge(image, _) | Self::Look(image) | Self::Discriminate(image) => image.dim(),
        }
    }

    fn network(&self) -> NetworkKind {
        match self {
            Self::Paint(..) => NetworkKind::Generator,
            Self::PaintPublished(..) => NetworkKind::Published,
            Self::Judge(_, judge) => NetworkKind::Critic(*judge),
            Self::Look(_) => NetworkKind::Critic(None),
            Self::Discriminate(_) => NetworkKind::Discriminator,
        }
    }

    /// Returns what tasks have in common that can be one batch.
    pub fn kind(&self) -> (NetworkKind, Dim) {
        (self.network(), self.dim())
    }

    pub fn voxels(&self) -> usize {
        let (d, h, w) = self.dim();
        d * h * w
    }
}

/// Computes tasks of one kind together, in their order.
///
/// # Errors
/// [`SynthError::NoModel`] where the bundle lacks the network.
pub(super) fn answer(bundle: &Bundle, tasks: &[&Task]) -> Result<Vec<Answer>, SynthError> {
    let network = tasks[0].network();
    let judge = match network {
        NetworkKind::Critic(judge) => judge,
        _ => None,
    };
    let batch = Batch {
        bundle,
        critic: bundle.critic_of(judge),
        device: bundle.device(),
        dim: tasks[0].dim(),
        size: tasks.len(),
    };
    let cubes = || {
        tasks.iter().filter_map(|task| match task {
            Task::Paint(cube, _) | Task::PaintPublished(cube, _) => Some(cube),
            _ => None,
        })
    };
    let images = || -> Vec<&Array3<i16>> {
        let found = tasks.iter().filter_map(|task| match task {
            Task::Judge(image, _) | Task::Look(image) | Task::Discriminate(image) => Some(image),
            Task::Paint(..) | Task::PaintPublished(..) => None,
        });
        found.collect()
    };
    let residuals = |residuals: Vec<Array3<f32>>| residuals.into_iter().map(Answer::Residual).collect();
    Ok(match network {
        NetworkKind::Generator => {
            let noise = tasks.iter().filter_map(|task| match task {
                Task::Paint(_, noise) => Some(noise),
                _ => None,
            });
            let cubes: Vec<_> = cubes().collect();
            residuals(Stage::Synthesize.time(|| batch.paint(&cubes, noise.collect()))?)
        }
        NetworkKind::Published => {
            let textures = tasks.iter().filter_map(|task| match task {
                Task::PaintPublished(_, texture) => Some(texture),
                _ => None,
            });
            let work: Vec<_> = cubes().zip(textures).collect();
            residuals(Stage::Synthesize.time(|| batch.paint_published(&work))?)
        }
        NetworkKind::Critic(_) => {
            let judges = tasks.iter().any(|task| matches!(task, Task::Judge(..)));
            let stage = if judges { Stage::Gate } else { Stage::Look };
            stage.time(|| batch.opinions(&images(), tasks))
        }
        NetworkKind::Discriminator => {
            let real = Stage::Gate.time(|| batch.real(&images()));
            let real = real.ok_or(SynthError::NoModel("discriminator"))?;
            real.into_iter().map(Answer::Real).collect()
        }
    })
}

/// Cubes of one shape.
struct Batch<'a> {
    bundle: &'a Bundle,
    critic: &'a Network,
    device: Device,
    dim: Dim,
    size: usize,
}

impl Batch<'_> {
    /// # Shape
    /// values of all cubes -> `[B, 1, D, H, W]`.
    fn tensor(&self, values: impl Iterator<Item = f32>) -> Tensor<5> {
        let (d, h, w) = self.dim;
        let values: Vec<f32> = values.collect();
        Tensor::from_data(TensorData::new(values, [self.size, 1, d, h, w]), &self.device)
    }

    fn normalised(&self, images: &[&Array3<i16>]) -> Tensor<5> {
        let window = self.bundle.plan.window_hu;
        self.tensor(
            images
                .iter()
                .flat_map(|image| image.iter().map(|hu| window.normalise(*hu))),
        )
    }

    /// Takes a tensor of one channel apart.
    fn cubes(&self, values: Tensor<5>) -> Vec<Array3<f32>> {
        let values = numbers::<f32>(values.into_data());
        let cubes = values.chunks_exact(values.len() / self.size);
        cubes
            .map(|cube| Array3::from_shape_vec(self.dim, cube.to_vec()).expect("networks keep the cube's shape"))
            .collect()
    }

    fn paint(&self, cubes: &[&LesionCube], noise: Vec<&Vec<f32>>) -> Result<Vec<Array3<f32>>, SynthError> {
        let generator = (self.bundle.generator.as_ref()).ok_or(SynthError::NoModel("generator"))?;
        let organs = self.bundle.plan.labels.organs().len();
        let conditions = cubes.iter().flat_map(|cube| {
            let condition = Condition {
                organ: cube.organ,
                diameter_mm: cube.diameter_mm,
                contrast_hu: cube.contrast_hu,
            };
            condition.vector(organs)
        });
        let conditions: Vec<f32> = conditions.collect();
        let conditions = TensorData::new(conditions, [self.size, Condition::len(organs)]);
        let contrasts: Vec<f32> = cubes.iter().map(|cube| cube.contrast_hu as f32).collect();
        Ok(self.cubes(generator.forward(
            self.normalised(&cubes.iter().map(|cube| &cube.image).collect::<Vec<_>>()),
            self.masks(cubes.iter().map(|cube| &cube.soft), 255.0),
            self.tensor(noise.into_iter().flatten().copied()),
            Tensor::from_data(TensorData::new(contrasts, [self.size]), &self.device),
            &Tensor::from_data(conditions, &self.device),
        )))
    }

    fn masks<'b>(&self, masks: impl Iterator<Item = &'b Array3<u8>>, scale: f32) -> Tensor<5> {
        self.tensor(masks.flat_map(|mask| mask.iter().map(move |value| f32::from(*value) / scale)))
    }

    fn paint_published(&self, work: &[(&LesionCube, &Array3<f32>)]) -> Result<Vec<Array3<f32>>, SynthError> {
        let net = (self.bundle.published.as_ref()).ok_or(SynthError::NoModel("published generator"))?;
        let images: Vec<_> = work.iter().map(|(cube, _)| &cube.image).collect();
        let generated = net.forward(self.normalised(&images));
        let own = work.iter().enumerate();
        let own = own.map(|(i, (cube, _))| generated.clone().narrow(0, i, 1).narrow(1, cube.organ, 1));
        let own = Tensor::cat(own.collect(), 0);
        let host = self.masks(work.iter().map(|(cube, _)| &cube.host), 1.0);
        let scene = PublishedScene {
            soft: self.masks(work.iter().map(|(cube, _)| &cube.soft), 255.0),
            texture: self.tensor(work.iter().flat_map(|(_, texture)| texture.iter().copied())),
            host: host.clone(),
        };
        let window = self.bundle.plan.window_hu;
        Ok(self.cubes(scene.change(published_residual(own, host)) * (window.high - window.low)))
    }

    /// Returns the discriminator's odds of a real tumour against a painted one, as a probability; nothing where there is no discriminator.
    fn real(&self, images: &[&Array3<i16>]) -> Option<Vec<Array3<f32>>> {
        let discriminator = self.bundle.discriminator.as_ref()?;
        let logits = discriminator.forward(self.normalised(images), None);
        let odds = logits.clone().narrow(1, REAL, 1) - logits.narrow(1, SYNTHETIC, 1);
        Some(self.cubes(activation::sigmoid(odds)))
    }

    /// Returns the critic's logits. One whose numbers would depend on the batch sees the cubes one by one (promise P1).
    fn logits(&self, images: &[&Array3<i16>]) -> Tensor<5> {
        let (critic, seen) = (self.critic, self.normalised(images));
        if critic.ignores_batch_mates() {
            critic.forward(seen)
        } else {
            let alone = (0..self.size).map(|i| critic.forward(seen.clone().narrow(0, i, 1)));
            Tensor::cat(alone.collect(), 0)
        }
    }

    /// Returns the critic's label ids, and for looks at hosts also where it takes tumours for possible.
    fn opinions(&self, images: &[&Array3<i16>], tasks: &[&Task]) -> Vec<Answer> {
        let logits = self.logits(images);
        let classes = self.ids(logits.clone().argmax(1));
        let answers = classes.into_iter().zip(tasks).enumerate();
        answers
            .map(|(nth, (classes, task))| match task {
                Task::Look(_) => Answer::HostLook(HostLook {
                    classes,
                    possible: self.possible(&logits.clone().narrow(0, nth, 1)),
                }),
                _ => Answer::Classes(classes),
            })
            .collect()
    }

    /// Returns where one cube's tumours are as probable as their organs' levels.
    fn possible(&self, logits: &Tensor<5>) -> Vec<(u8, Array3<u8>)> {
        let one = Self {
            size: 1,
            device: self.device.clone(),
            ..*self
        };
        let mut probabilities = None;
        let mut found = Vec::new();
        for organ in self.bundle.plan.labels.organs() {
            let (id, level) = (organ.tumour_id, self.bundle.calibration.suspect_from(&organ.name));
            let possible = match level {
                None => continue,
                // Everything is, whatever the critic says.
                Some(0.0) => Array3::ones(self.dim),
                Some(level) => {
                    let of_all: &Tensor<5> =
                        probabilities.get_or_insert_with(|| activation::softmax(logits.clone(), 1));
                    let healthy = of_all.clone().narrow(1, usize::from(id), 1).lower_elem(level as f32);
                    one.ids(healthy.bool_not().int()).remove(0)
                }
            };
            found.push((id, possible));
        }
        found
    }

    /// Takes a tensor of one channel of ids apart.
    fn ids(&self, ids: Tensor<5, Int>) -> Vec<Array3<u8>> {
        let ids: Vec<u8> = numbers::<i64>(ids.into_data()).into_iter().map(|id| id as u8).collect();
        let cubes = ids.chunks_exact(ids.len() / self.size);
        cubes
            .map(|cube| Array3::from_shape_vec(self.dim, cube.to_vec()).expect("networks keep the cube's shape"))
            .collect()
    }
}

/// Takes a tensor's numbers, which are converted where the device has others.
fn numbers<E: Element>(data: TensorData) -> Vec<E> {
    data.convert::<E>().try_into_vec().expect("the numbers were converted")
}
