//! The device thread: the only owner of the models, fed through a bounded channel.
//!
//! Requests of one network and shape that wait together, of whatever streams, are one batch (continuous batching). On the CPU no lesion's
//! numbers depend on its batch mates (promise P1): ours are the same bit for bit, other critics see the cubes of a batch one by one.
//! On a GPU they may in the last digits, and a decision of the gate that hangs on those is `borderline`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use metrics::{counter, gauge};
use ndarray::Array3;

use super::device::{self, Answer, HostLook, Task};
use super::{Cancelled, LesionCube, SynthError};
use crate::checkpoint::Bundle;
use crate::panic::panic_text;
use crate::rng::{Purpose, Rng};
use crate::telemetry::metrics::{DEVICE_BATCHES_TOTAL, DEVICE_CUBES_TOTAL, DEVICE_MEMORY_BYTES, Stage};

/// The most voxels of a batch of more than one cube: it bounds what activations take.
const MAX_BATCH_VOXELS: usize = 2 * 96 * 96 * 96;

struct Request {
    task: Task,
    cancelled: Cancelled,
    asked: Instant,
    reply: Sender<Result<Answer, SynthError>>,
}

impl Request {
    fn reply(self, answer: Result<Answer, SynthError>) {
        // Who asked may be gone; then nobody misses the answer.
        drop(self.reply.send(answer));
    }
}

/// Requests that fail one after the other before the device counts as lost: a fault of one lesion does not repeat on others,
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
    requests: Sender<Request>,
    health: Arc<Health>,
}

impl Engine {
    /// Starts the device thread, which accepts `waiting` requests before those who ask have to wait, and makes batches of at most `most`.
    ///
    /// # Errors
    /// The operating system's, where it refuses the thread.
    pub fn start(bundle: Arc<Bundle>, waiting: usize, most: usize) -> std::io::Result<Self> {
        let (requests, queue) = bounded(waiting.max(1));
        let health = Arc::<Health>::default();
        let ends_with = EndsWith(health.clone());
        std::thread::Builder::new()
            .name("freetumor-device".into())
            .spawn(move || {
                let mut waiting = Waiting {
                    queue,
                    most,
                    requests: VecDeque::new(),
                };
                while let Some(batch) = waiting.next_batch() {
                    serve(&bundle, batch, &ends_with.0);
                }
            })?;
        Ok(Self { requests, health })
    }

    /// Tells why the device can do no more work; nothing while it can.
    pub fn failure(&self) -> Option<String> {
        if self.health.is_ended.load(Ordering::Acquire) {
            return Some("the device thread has ended".into());
        }
        let failures = self.health.failures_in_a_row.load(Ordering::Acquire);
        (failures >= LOST_AFTER).then(|| format!("the last {failures} requests of the device failed"))
    }

    /// Returns the generator's residual in HU.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone, the bundle has no generator, or the device fails.
    pub fn paint(&self, cube: &LesionCube) -> Result<Array3<f32>, SynthError> {
        let [seed, index, attempt] = cube.key;
        // Drawn here, by as many threads as ask: the device waits for nothing that it does not compute.
        let noise = Rng::keyed(seed, index, attempt, Purpose::Noise).normals(cube.image.len());
        match self.ask(Task::Paint(cube.clone(), noise), cube.cancelled.clone())? {
            Answer::Residual(residual) => Ok(residual),
            _ => Err(SynthError::Ended),
        }
    }

    /// Returns the published generator's residual in HU for a texture of the cube's shape.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone, the bundle has no such generator, or the device fails.
    pub fn paint_published(&self, cube: &LesionCube, texture: Array3<f32>) -> Result<Array3<f32>, SynthError> {
        match self.ask(Task::PaintPublished(cube.clone(), texture), cube.cancelled.clone())? {
            Answer::Residual(residual) => Ok(residual),
            _ => Err(SynthError::Ended),
        }
    }

    /// Returns the label ids that a critic (see `stream::judges`) gives a cube in HU, before or after synthesis.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone or the device fails.
    pub fn judge(
        &self,
        image: Array3<i16>,
        judge: Option<usize>,
        cancelled: &Cancelled,
    ) -> Result<Array3<u8>, SynthError> {
        match self.ask(Task::Judge(image, judge), cancelled.clone())? {
            Answer::Classes(classes) => Ok(classes),
            _ => Err(SynthError::Ended),
        }
    }

    /// Returns how probably real rather than painted the discriminator finds a cube in HU, voxel by voxel.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone, the bundle has no discriminator, or the device fails.
    pub fn discriminate(&self, image: Array3<i16>, cancelled: &Cancelled) -> Result<Array3<f32>, SynthError> {
        match self.ask(Task::Discriminate(image), cancelled.clone())? {
            Answer::Real(real) => Ok(real),
            _ => Err(SynthError::Ended),
        }
    }

    /// Returns what the critic says of a cube of an untouched host in HU.
    ///
    /// # Errors
    /// [`SynthError`] where the stream is gone or the device fails.
    pub fn look(&self, image: Array3<i16>, cancelled: &Cancelled) -> Result<HostLook, SynthError> {
        match self.ask(Task::Look(image), cancelled.clone())? {
            Answer::HostLook(look) => Ok(look),
            _ => Err(SynthError::Ended),
        }
    }

    fn ask(&self, task: Task, cancelled: Cancelled) -> Result<Answer, SynthError> {
        let (reply, answer) = bounded(1);
        let request = Request {
            task,
            cancelled,
            asked: Instant::now(),
            reply,
        };
        self.requests.send(request).map_err(|_| SynthError::Ended)?;
        answer.recv().map_err(|_| SynthError::Ended)?
    }
}

/// Requests that were taken out of the queue and wait for a batch of their kind.
struct Waiting {
    queue: Receiver<Request>,
    most: usize,
    requests: VecDeque<Request>,
}

impl Waiting {
    /// Returns the oldest request and those like it; nothing once nobody can ask any more. Nobody has more than one request here, since all
    /// who ask wait for the answer.
    fn next_batch(&mut self) -> Option<Vec<Request>> {
        if self.requests.is_empty() {
            self.requests.push_back(self.queue.recv().ok()?);
        }
        self.requests.extend(self.queue.try_iter());
        let kind = self.requests[0].task.kind();
        let most = (MAX_BATCH_VOXELS / self.requests[0].task.voxels().max(1)).clamp(1, self.most);
        let (mut batch, mut rest) = (Vec::new(), VecDeque::new());
        for request in self.requests.drain(..) {
            if batch.len() < most && request.task.kind() == kind {
                batch.push(request);
            } else {
                rest.push_back(request);
            }
        }
        self.requests = rest;
        Some(batch)
    }
}

fn serve(bundle: &Bundle, batch: Vec<Request>, health: &Health) {
    batch
        .iter()
        .for_each(|request| Stage::WaitForDevice.since(request.asked));
    let (cancelled, batch): (Vec<Request>, Vec<Request>) =
        batch.into_iter().partition(|request| request.cancelled.is_set());
    for request in cancelled {
        request.reply(Err(SynthError::Cancelled));
    }
    if batch.is_empty() {
        return;
    }
    counter!(DEVICE_BATCHES_TOTAL).increment(1);
    counter!(DEVICE_CUBES_TOTAL).increment(batch.len() as u64);
    let tasks: Vec<&Task> = batch.iter().map(|request| &request.task).collect();
    match attempt(bundle, &tasks, health) {
        Ok(answers) => batch
            .into_iter()
            .zip(answers)
            .for_each(|(request, answer)| request.reply(Ok(answer))),
        // One lesion's fault is not its batch mates': each is tried alone.
        Err(SynthError::Device(_)) if batch.len() > 1 => {
            for request in batch {
                let answer = attempt(bundle, &[&request.task], health);
                request.reply(answer.map(|mut answers| answers.remove(0)));
            }
        }
        Err(error) => batch.into_iter().for_each(|request| request.reply(Err(error.clone()))),
    }
    report_memory(bundle);
}

/// Computes a batch. A panic inside a network costs these lesions, not the server: the models are only read.
fn attempt(bundle: &Bundle, tasks: &[&Task], health: &Health) -> Result<Vec<Answer>, SynthError> {
    let answers = catch_unwind(AssertUnwindSafe(|| device::answer(bundle, tasks)))
        .unwrap_or_else(|panic| Err(SynthError::Device(panic_text(&*panic))));
    match &answers {
        Err(SynthError::Device(_)) => health.failures_in_a_row.fetch_add(1, Ordering::AcqRel),
        _ => health.failures_in_a_row.swap(0, Ordering::AcqRel),
    };
    answers
}

/// Reports a GPU's memory. Batches of few sizes bound it; the CPU's is the process's own.
fn report_memory(bundle: &Bundle) {
    if let Some(usage) = bundle.device().memory_pool_usage() {
        gauge!(DEVICE_MEMORY_BYTES, "kind" => "in_use").set(usage.bytes_in_use as f64);
        gauge!(DEVICE_MEMORY_BYTES, "kind" => "reserved").set(usage.bytes_reserved as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::tensor::Device;

    use super::*;
    use crate::checkpoint::{Calibration, Provenance};
    use crate::digest::Digest;
    use crate::nn::{ContrastOver, CubeSides, GeneratorConfig, PublishedConfig, UnetConfig};
    use crate::volume::Plan;

    fn bundle() -> Bundle {
        let device = Device::flex();
        let unet = |out_channels, seed| {
            let config = UnetConfig {
                in_channels: 1,
                out_channels,
                widths: vec![4, 8],
                condition: 0,
            };
            config.init(&device, seed)
        };
        let generator = GeneratorConfig {
            widths: vec![4, 8],
            organs: 3,
            spread_hu: 30.0,
            contrast_over: ContrastOver::Lesion,
        };
        Bundle {
            hash: Digest::default(),
            plan: Plan::default(),
            cubes: CubeSides::default(),
            critic: unet(7, 1).into(),
            critic_seen: Provenance::default(),
            inner: Vec::new(),
            generator: Some(generator.init(&device, 2)),
            published: Some(PublishedConfig::generator(2, 3).init(&device, 3)),
            discriminator: Some(unet(3, 4)),
            // Of seven classes of an untrained network each is about as probable.
            calibration: Calibration {
                suspect_from: Some(BTreeMap::from([("liver".to_string(), 0.15)])),
                ..Calibration::default()
            },
            realism: None,
            provenance: Provenance::default().into(),
        }
    }

    fn image(seed: u64, side: usize) -> Array3<i16> {
        let mut rng = Rng::keyed(seed, 0, 0, Purpose::Test);
        Array3::from_shape_simple_fn([side; 3], || (60.0 + 40.0 * rng.normal()) as i16)
    }

    fn lesion(index: u64) -> LesionCube {
        let soft = Array3::from_shape_fn([16; 3], |(z, _, x)| (20 * z + x) as u8 * u8::from(x > 4));
        LesionCube {
            image: image(index, 16),
            host: soft.mapv(|soft| u8::from(soft > 0)),
            soft,
            organ: index as usize % 3,
            diameter_mm: 8.0 + index as f64,
            contrast_hu: -40.0,
            spacing_mm: [1.5; 3],
            key: [1, index, 0],
            cancelled: Cancelled::default(),
        }
    }

    type Asked = (Request, Receiver<Result<Answer, SynthError>>);

    fn request(task: Task) -> Asked {
        let (reply, answer) = bounded(1);
        let request = Request {
            task,
            cancelled: Cancelled::default(),
            asked: Instant::now(),
            reply,
        };
        (request, answer)
    }

    /// Every kind of work, of three streams, in turns.
    fn work() -> Vec<Asked> {
        let of = |i: u64| {
            let texture = Array3::from_elem([16; 3], 0.4 + 0.1 * i as f32);
            [
                Task::Paint(lesion(i), vec![0.5; 4096]),
                Task::PaintPublished(lesion(i), texture),
                Task::Judge(image(10 + i, 16), None),
                Task::Judge(image(20 + i, 32), None),
                Task::Look(image(40 + i, 32)),
                Task::Discriminate(image(50 + i, 16)),
            ]
        };
        (0..3).flat_map(of).map(request).collect()
    }

    fn text(answer: Result<Answer, SynthError>) -> String {
        match answer.unwrap() {
            Answer::Residual(values) | Answer::Real(values) => format!("{values:?}"),
            Answer::Classes(ids) => format!("{ids:?}"),
            Answer::HostLook(look) => format!("{look:?}"),
        }
    }

    /// Answers everything in batches of at most `most`; returns the answers and how many were together each time.
    fn answers(most: usize) -> (Vec<String>, Vec<usize>) {
        let (models, health) = (bundle(), Health::default());
        let (requests, replies): (Vec<Request>, Vec<_>) = work().into_iter().unzip();
        let (sender, queue) = bounded(64);
        requests.into_iter().for_each(|request| sender.send(request).unwrap());
        drop(sender);
        let mut waiting = Waiting {
            queue,
            most,
            requests: VecDeque::new(),
        };
        let mut sizes = Vec::new();
        while let Some(batch) = waiting.next_batch() {
            sizes.push(batch.len());
            serve(&models, batch, &health);
        }
        (
            replies.into_iter().map(|reply| text(reply.recv().unwrap())).collect(),
            sizes,
        )
    }

    #[test]
    fn what_waits_together_is_one_batch_and_nobody_gets_another_answer() {
        let (alone, sizes) = answers(1);
        assert_eq!(sizes, [1; 18]);
        let (together, sizes) = answers(16);
        // The critic judges lesions and looks at hosts at once.
        assert_eq!(sizes, [3, 3, 3, 6, 3]);
        assert_eq!(alone, together);
        // A smaller limit: the oldest first, the others in their order.
        let (pairs, sizes) = answers(2);
        assert_eq!(sizes.iter().sum::<usize>(), 18);
        assert!(sizes.iter().all(|size| *size <= 2));
        assert_eq!(alone, pairs);
    }

    #[test]
    fn a_lesion_over_which_a_network_panics_costs_itself_alone() {
        let (models, health) = (bundle(), Health::default());
        let mut wrong = lesion(1);
        wrong.organ = 7;
        let asked = [lesion(0), wrong, lesion(2)].map(|cube| request(Task::Paint(cube, vec![0.5; 4096])));
        let cancelled = request(Task::Paint(lesion(3), vec![0.5; 4096]));
        cancelled.0.cancelled.cancel();
        let (mut batch, mut replies): (Vec<Request>, Vec<_>) = asked.into_iter().unzip();
        batch.push(cancelled.0);
        replies.push(cancelled.1);
        serve(&models, batch, &health);
        let [first, second, third, last] = &replies[..] else {
            unreachable!()
        };
        assert!(first.recv().unwrap().is_ok() && third.recv().unwrap().is_ok());
        assert!(matches!(second.recv().unwrap(), Err(SynthError::Device(_))));
        assert!(matches!(last.recv().unwrap(), Err(SynthError::Cancelled)));
        assert_eq!(health.failures_in_a_row.load(Ordering::Acquire), 0);
    }
}
