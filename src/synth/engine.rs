//! The device thread: the only owner of the models, fed through a bounded channel.
//!
//! Each job runs as a batch of its own, so that no lesion's numbers can depend on its batch mates (promise P1).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData, activation};
use crossbeam_channel::{Receiver, Sender, bounded};
use metrics::gauge;
use ndarray::Array3;

use super::{Cancelled, LesionCube, SynthError};
use crate::checkpoint::Bundle;
use crate::nn::{Condition, PublishedScene, published_residual};
use crate::panic::panic_text;
use crate::rng::{Purpose, Rng};
use crate::telemetry::metrics::{DEVICE_MEMORY_BYTES, Stage};
use crate::volume::HuWindow;

/// What is asked of a cube in which the critic recognises a lesion.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The critic's label ids before synthesis.
    pub before: Array3<u8>,
    /// The discriminator's probability of "real tumour" after it, where the bundle has one.
    pub real: Option<Array3<f32>>,
}

enum Task {
    Paint(LesionCube),
    /// By the published equation, with a texture.
    PaintPublished(LesionCube, Array3<f32>),
    Judge(Array3<i16>),
    Compare([Array3<i16>; 2]),
    Look(Array3<i16>),
}

enum Answer {
    Residual(Array3<f32>),
    Comparison(Comparison),
    Classes(Array3<u8>),
}

struct Job {
    task: Task,
    cancelled: Cancelled,
    asked: Instant,
    reply: Sender<Result<Answer, SynthError>>,
}

/// Jobs that fail one after the other before the device counts as lost: a fault of one lesion does not repeat on others,
/// that of a device does.
const LOST_AFTER: u32 = 16;

/// How the device thread is.
#[derive(Default)]
struct Health {
    failures_in_a_row: AtomicU32,
    is_ended: AtomicBool,
}

/// Marks the thread as ended, however it ends.
struct EndsWith(Arc<Health>);

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.0.is_ended.store(true, Ordering::Release);
    }
}

/// The way to the device thread. The thread ends when the last handle is dropped.
pub struct Engine {
    jobs: Sender<Job>,
    health: Arc<Health>,
}

impl Engine {
    /// Starts the device thread, which accepts `waiting` jobs before those who ask have to wait.
    ///
    /// # Errors
    /// The operating system's, where it refuses the thread.
    pub fn start(bundle: Arc<Bundle>, waiting: usize) -> std::io::Result<Self> {
        let (jobs, queue) = bounded(waiting.max(1));
        let health = Arc::<Health>::default();
        let ends_with = EndsWith(health.clone());
        std::thread::Builder::new()
            .name("freetumor-device".into())
            .spawn(move || serve(&bundle, &queue, &ends_with.0))?;
        Ok(Self { jobs, health })
    }

    /// Tells why the device can do no more work; nothing while it can.
    pub fn failure(&self) -> Option<String> {
        if self.health.is_ended.load(Ordering::Acquire) {
            return Some("the device thread has ended".into());
        }
        let failures = self.health.failures_in_a_row.load(Ordering::Acquire);
        (failures >= LOST_AFTER).then(|| format!("the last {failures} jobs of the device failed"))
    }

    /// Returns the generator's residual in HU.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone, the bundle has no generator, or the device fails.
    pub fn paint(&self, cube: &LesionCube) -> Result<Array3<f32>, SynthError> {
        match self.ask(Task::Paint(cube.clone()), cube.cancelled.clone())? {
            Answer::Residual(residual) => Ok(residual),
            Answer::Comparison(_) | Answer::Classes(_) => Err(SynthError::Ended),
        }
    }

    /// Returns the published generator's residual in HU for a texture of the cube's shape.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone, the bundle has no such generator, or the device fails.
    pub fn paint_published(&self, cube: &LesionCube, texture: Array3<f32>) -> Result<Array3<f32>, SynthError> {
        match self.ask(Task::PaintPublished(cube.clone(), texture), cube.cancelled.clone())? {
            Answer::Residual(residual) => Ok(residual),
            Answer::Comparison(_) | Answer::Classes(_) => Err(SynthError::Ended),
        }
    }

    /// Returns the label ids that the critic gives a cube in HU after synthesis.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone or the device fails.
    pub fn judge(&self, after: Array3<i16>, cancelled: &Cancelled) -> Result<Array3<u8>, SynthError> {
        self.ask_classes(Task::Judge(after), cancelled)
    }

    /// Returns what the critic says of a cube in HU before synthesis, and the discriminator after it.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone or the device fails.
    pub fn compare(
        &self,
        before: Array3<i16>,
        after: Array3<i16>,
        cancelled: &Cancelled,
    ) -> Result<Comparison, SynthError> {
        match self.ask(Task::Compare([before, after]), cancelled.clone())? {
            Answer::Comparison(comparison) => Ok(comparison),
            Answer::Residual(_) | Answer::Classes(_) => Err(SynthError::Ended),
        }
    }

    /// Returns the label ids that the critic gives a cube in HU.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone or the device fails.
    pub fn classes(&self, image: Array3<i16>, cancelled: &Cancelled) -> Result<Array3<u8>, SynthError> {
        self.ask_classes(Task::Look(image), cancelled)
    }

    fn ask_classes(&self, task: Task, cancelled: &Cancelled) -> Result<Array3<u8>, SynthError> {
        match self.ask(task, cancelled.clone())? {
            Answer::Classes(classes) => Ok(classes),
            Answer::Residual(_) | Answer::Comparison(_) => Err(SynthError::Ended),
        }
    }

    fn ask(&self, task: Task, cancelled: Cancelled) -> Result<Answer, SynthError> {
        let (reply, answer) = bounded(1);
        let job = Job {
            task,
            cancelled,
            asked: Instant::now(),
            reply,
        };
        self.jobs.send(job).map_err(|_| SynthError::Ended)?;
        answer.recv().map_err(|_| SynthError::Ended)?
    }
}

fn serve(bundle: &Bundle, queue: &Receiver<Job>, health: &Health) {
    let device = bundle.device();
    for Job {
        task,
        cancelled,
        asked,
        reply,
    } in queue
    {
        Stage::WaitForDevice.since(asked);
        let answer = if cancelled.is_set() {
            Err(SynthError::Cancelled)
        } else {
            // A panic inside a network costs this lesion, not the server: the models are only read.
            let answer = catch_unwind(AssertUnwindSafe(|| answer(bundle, &device, task)))
                .unwrap_or_else(|panic| Err(SynthError::Device(panic_text(&*panic))));
            match &answer {
                Err(SynthError::Device(_)) => health.failures_in_a_row.fetch_add(1, Ordering::AcqRel),
                _ => health.failures_in_a_row.swap(0, Ordering::AcqRel),
            };
            answer
        };
        report_memory(&device);
        // Who asked may be gone; then nobody misses the answer.
        drop(reply.send(answer));
    }
}

/// Reports a GPU's memory. One job at a time on cubes of few sizes bounds it; the CPU's is the process's own.
fn report_memory(device: &Device) {
    if let Some(usage) = device.memory_pool_usage() {
        gauge!(DEVICE_MEMORY_BYTES, "kind" => "in_use").set(usage.bytes_in_use as f64);
        gauge!(DEVICE_MEMORY_BYTES, "kind" => "reserved").set(usage.bytes_reserved as f64);
    }
}

fn answer(bundle: &Bundle, device: &Device, task: Task) -> Result<Answer, SynthError> {
    match task {
        Task::Paint(cube) => Stage::Synthesize
            .time(|| paint(bundle, device, &cube))
            .map(Answer::Residual),
        Task::PaintPublished(cube, texture) => Stage::Synthesize
            .time(|| paint_published(bundle, device, &cube, &texture))
            .map(Answer::Residual),
        Task::Judge(image) => Ok(Answer::Classes(Stage::Gate.time(|| classes(bundle, &image, device)))),
        Task::Compare(images) => Ok(Answer::Comparison(
            Stage::Gate.time(|| compare(bundle, device, &images)),
        )),
        Task::Look(image) => Ok(Answer::Classes(Stage::Look.time(|| classes(bundle, &image, device)))),
    }
}

/// # Shape
/// `[D, H, W]` -> `[1, 1, D, H, W]`.
fn tensor(values: Vec<f32>, shape: (usize, usize, usize), device: &Device) -> Tensor<5> {
    let (d, h, w) = shape;
    Tensor::from_data(TensorData::new(values, [1, 1, d, h, w]), device)
}

fn normalised(image: &Array3<i16>, window: HuWindow, device: &Device) -> Tensor<5> {
    tensor(
        image.iter().map(|hu| window.normalise(*hu)).collect(),
        image.dim(),
        device,
    )
}

fn host_values(values: Tensor<5>, shape: (usize, usize, usize)) -> Array3<f32> {
    let values: Vec<f32> = values.into_data().iter::<f32>().collect();
    Array3::from_shape_vec(shape, values).expect("networks keep the cube's shape")
}

fn paint(bundle: &Bundle, device: &Device, cube: &LesionCube) -> Result<Array3<f32>, SynthError> {
    let generator = bundle.generator.as_ref().ok_or(SynthError::NoModel("generator"))?;
    let [seed, index, attempt] = cube.key;
    let noise = Rng::keyed(seed, index, attempt, Purpose::Noise).normals(cube.image.len());
    let mask = cube.soft.iter().map(|soft| f32::from(*soft) / 255.0).collect();
    let condition = Condition {
        organ: cube.organ,
        diameter_mm: cube.diameter_mm,
        contrast_hu: cube.contrast_hu,
    };
    let vector = condition.vector(bundle.plan.labels.organs().len());
    let length = vector.len();
    let residual = generator.forward(
        normalised(&cube.image, bundle.plan.window_hu, device),
        tensor(mask, cube.soft.dim(), device),
        tensor(noise, cube.image.dim(), device),
        Tensor::from_data(TensorData::new(vec![cube.contrast_hu as f32], [1]), device),
        &Tensor::from_data(TensorData::new(vector, [1, length]), device),
    );
    Ok(host_values(residual, cube.image.dim()))
}

fn paint_published(
    bundle: &Bundle,
    device: &Device,
    cube: &LesionCube,
    texture: &Array3<f32>,
) -> Result<Array3<f32>, SynthError> {
    let net = (bundle.published.as_ref()).ok_or(SynthError::NoModel("published generator"))?;
    let shape = cube.image.dim();
    let values = |mask: &Array3<u8>, scale: f32| -> Vec<f32> { mask.iter().map(|v| f32::from(*v) / scale).collect() };
    let host = tensor(values(&cube.host, 1.0), shape, device);
    let generated = net.forward(normalised(&cube.image, bundle.plan.window_hu, device));
    let residual = published_residual(generated.narrow(1, cube.organ, 1), host.clone());
    let scene = PublishedScene {
        soft: tensor(values(&cube.soft, 255.0), shape, device),
        texture: tensor(texture.iter().copied().collect(), shape, device),
        host,
    };
    let window = bundle.plan.window_hu;
    Ok(host_values(scene.change(residual) * (window.high - window.low), shape))
}

fn compare(bundle: &Bundle, device: &Device, [before, after]: &[Array3<i16>; 2]) -> Comparison {
    let real = bundle.discriminator.as_ref().map(|discriminator| {
        let after = normalised(after, bundle.plan.window_hu, device);
        let probabilities = activation::softmax(discriminator.forward(after, None), 1);
        host_values(probabilities.narrow(1, 1, 1), before.dim())
    });
    Comparison {
        before: classes(bundle, before, device),
        real,
    }
}

/// Returns the critic's label ids.
fn classes(bundle: &Bundle, image: &Array3<i16>, device: &Device) -> Array3<u8> {
    let seen = normalised(image, bundle.plan.window_hu, device);
    let ids = bundle.critic.forward(seen).argmax(1).into_data();
    let ids: Vec<u8> = ids.iter::<i64>().map(|id| id as u8).collect();
    Array3::from_shape_vec(image.dim(), ids).expect("networks keep the cube's shape")
}
