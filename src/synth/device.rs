//! What the device thread computes: batches of alike cubes.

use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use ndarray::Array3;

use super::{LesionCube, SynthError};
use crate::checkpoint::Bundle;
use crate::nn::{Condition, Network, PublishedScene, REAL, SYNTHETIC, published_residual};
use crate::rng::{Purpose, Rng};
use crate::telemetry::metrics::Stage;

/// What is asked of a cube in which the critic recognises a lesion.
#[derive(Clone, Debug)]
pub struct SecondLook {
    /// The critic's label ids before synthesis.
    pub before: Array3<u8>,
    /// How probably real rather than painted the discriminator finds each voxel after it, where the bundle has one.
    pub real: Option<Array3<f32>>,
}

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
    Paint(LesionCube),
    /// By the published equation, with a texture.
    PaintPublished(LesionCube, Array3<f32>),
    /// A critic's opinion after synthesis.
    Judge(Array3<i16>, Option<usize>),
    /// A critic's opinion before synthesis, and the discriminator's after it.
    Compare([Array3<i16>; 2], Option<usize>),
    /// The critic's opinion of an untouched host.
    Look(Array3<i16>),
    /// The discriminator's opinion after synthesis.
    Discriminate(Array3<i16>),
}

/// What came of a task.
pub(super) enum Answer {
    Residual(Array3<f32>),
    SecondLook(SecondLook),
    HostLook(HostLook),
    Classes(Array3<u8>),
    /// How real it looks, voxel by voxel.
    Real(Array3<f32>),
}

type Dim = (usize, usize, usize);

impl Task {
    fn dim(&self) -> Dim {
        match self {
            Self::Paint(cube) | Self::PaintPublished(cube, _) => cube.image.dim(),
            Self::Judge(image, _) | Self::Compare([image, _], _) | Self::Look(image) | Self::Discriminate(image) => {
                image.dim()
            }
        }
    }

    /// Returns which inner fold's critic is asked; nothing for the bundle's own.
    fn judge(&self) -> Option<usize> {
        match self {
            Self::Judge(_, judge) | Self::Compare(_, judge) => *judge,
            Self::Paint(_) | Self::PaintPublished(..) | Self::Look(_) | Self::Discriminate(_) => None,
        }
    }

    /// Returns what tasks have in common that can be one batch.
    pub fn kind(&self) -> (std::mem::Discriminant<Self>, Option<usize>, Dim) {
        (std::mem::discriminant(self), self.judge(), self.dim())
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
    let batch = Batch {
        bundle,
        critic: bundle.critic_of(tasks[0].judge()),
        device: bundle.device(),
        dim: tasks[0].dim(),
        size: tasks.len(),
    };
    let cubes = || {
        tasks.iter().filter_map(|task| match task {
            Task::Paint(cube) | Task::PaintPublished(cube, _) => Some(cube),
            _ => None,
        })
    };
    let images = |nth: usize| -> Vec<&Array3<i16>> {
        let found = tasks.iter().filter_map(|task| match task {
            Task::Judge(image, _) | Task::Look(image) | Task::Discriminate(image) => Some(image),
            Task::Compare(images, _) => Some(&images[nth]),
            Task::Paint(_) | Task::PaintPublished(..) => None,
        });
        found.collect()
    };
    let residuals = |residuals: Vec<Array3<f32>>| residuals.into_iter().map(Answer::Residual).collect();
    let classes = |classes: Vec<Array3<u8>>| classes.into_iter().map(Answer::Classes).collect();
    Ok(match tasks[0] {
        Task::Paint(_) => residuals(Stage::Synthesize.time(|| batch.paint(&cubes().collect::<Vec<_>>()))?),
        Task::PaintPublished(..) => {
            let textures = tasks.iter().filter_map(|task| match task {
                Task::PaintPublished(_, texture) => Some(texture),
                _ => None,
            });
            let work: Vec<_> = cubes().zip(textures).collect();
            residuals(Stage::Synthesize.time(|| batch.paint_published(&work))?)
        }
        Task::Judge(..) => classes(Stage::Gate.time(|| batch.classes(&images(0)))),
        Task::Look(_) => {
            let looks = Stage::Look.time(|| batch.look(&images(0)));
            looks.into_iter().map(Answer::HostLook).collect()
        }
        Task::Discriminate(_) => {
            let real = Stage::Gate.time(|| batch.real(&images(0)));
            let real = real.ok_or(SynthError::NoModel("discriminator"))?;
            real.into_iter().map(Answer::Real).collect()
        }
        Task::Compare(..) => {
            let compared = Stage::Gate.time(|| batch.compare(&images(0), &images(1)));
            compared.into_iter().map(Answer::SecondLook).collect()
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
        let values: Vec<f32> = values.into_data().iter::<f32>().collect();
        let cubes = values.chunks_exact(values.len() / self.size);
        cubes
            .map(|cube| Array3::from_shape_vec(self.dim, cube.to_vec()).expect("networks keep the cube's shape"))
            .collect()
    }

    fn paint(&self, cubes: &[&LesionCube]) -> Result<Vec<Array3<f32>>, SynthError> {
        let generator = (self.bundle.generator.as_ref()).ok_or(SynthError::NoModel("generator"))?;
        let noise = cubes.iter().flat_map(|cube| {
            let [seed, index, attempt] = cube.key;
            Rng::keyed(seed, index, attempt, Purpose::Noise).normals(cube.image.len())
        });
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
            self.tensor(noise),
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

    fn compare(&self, before: &[&Array3<i16>], after: &[&Array3<i16>]) -> Vec<SecondLook> {
        let mut real = self.real(after).map(Vec::into_iter);
        let before = self.classes(before).into_iter();
        before
            .map(|before| SecondLook {
                before,
                real: real.as_mut().and_then(Iterator::next),
            })
            .collect()
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

    /// Returns the critic's label ids.
    fn classes(&self, images: &[&Array3<i16>]) -> Vec<Array3<u8>> {
        self.ids(self.logits(images).argmax(1))
    }

    /// Returns the critic's label ids, and where it takes tumours for possible.
    fn look(&self, images: &[&Array3<i16>]) -> Vec<HostLook> {
        let logits = self.logits(images);
        let without = |classes| HostLook {
            classes,
            possible: Vec::new(),
        };
        let mut looks: Vec<_> = self.ids(logits.clone().argmax(1)).into_iter().map(without).collect();
        for organ in self.bundle.plan.labels.organs() {
            let Some(level) = self.bundle.calibration.suspect_from(&organ.name) else {
                continue;
            };
            let id = organ.tumour_id;
            let possible = match level {
                // Everything is, whatever the critic says.
                0.0 => vec![Array3::ones(self.dim); self.size],
                level => {
                    let probable = activation::softmax(logits.clone(), 1).narrow(1, usize::from(id), 1);
                    self.ids(probable.greater_equal_elem(level as f32).int())
                }
            };
            looks
                .iter_mut()
                .zip(possible)
                .for_each(|(look, possible)| look.possible.push((id, possible)));
        }
        looks
    }

    /// Takes a tensor of one channel of ids apart.
    fn ids(&self, ids: Tensor<5, Int>) -> Vec<Array3<u8>> {
        let ids = ids.into_data();
        let ids: Vec<u8> = ids.iter::<i64>().map(|id| id as u8).collect();
        let cubes = ids.chunks_exact(ids.len() / self.size);
        cubes
            .map(|cube| Array3::from_shape_vec(self.dim, cube.to_vec()).expect("networks keep the cube's shape"))
            .collect()
    }
}
