//! Whose turn the device is: between two steps a training leaves it to streams that wait, for as long as the weights say.
//!
//! The scheduler shares out what makes patches; a step of the optimizer is not its business, and on one device takes from
//! the streams all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::stream::delivery::Delivery;
use crate::stream::recipe::Recipe;
use crate::stream::{Batch, PatchService, PatchStream, Resolved, StreamError, Weights, count_patches};
use crate::volume::Plan;

/// How often a training that gives way looks whether anybody still waits.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// The longest that a training gives way between two steps.
const LONGEST: Duration = Duration::from_secs(30);

/// The service as a training sees it: a batch comes when it is the training's turn.
pub(super) struct Turns {
    /// Whose readers wait.
    pub(super) service: Arc<dyn PatchService>,
    /// Whose patches the training learns from.
    pub(super) patches: Arc<dyn PatchService>,
    pub(super) weights: Weights,
    /// Nobody waits for a job that was asked to stop.
    pub(super) stop: Arc<AtomicBool>,
}

impl PatchService for Turns {
    fn plan(&self) -> &Plan {
        self.service.plan()
    }

    fn resolve(&self, recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        self.patches.resolve(recipe)
    }

    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        Ok(Box::new(TurnStream {
            patches: self.patches.open(recipe, delivery)?,
            service: self.service.clone(),
            share: f64::from(self.weights.stream) / f64::from(self.weights.training),
            stop: self.stop.clone(),
            left: None,
        }))
    }

    fn failure(&self) -> Option<String> {
        self.patches.failure()
    }
}

struct TurnStream {
    patches: Box<dyn PatchStream>,
    service: Arc<dyn PatchService>,
    /// Time that streams get for each second of a step, while they wait.
    share: f64,
    stop: Arc<AtomicBool>,
    /// When the last batch was handed out: the step began.
    left: Option<Instant>,
}

impl TurnStream {
    fn give_way(&self, step: Duration) {
        let until = Instant::now() + step.mul_f64(self.share).min(LONGEST);
        while self.service.has_waiting_readers() && !self.stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(LOOK_EVERY));
        }
    }
}

impl PatchStream for TurnStream {
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
        if let Some(left) = self.left.take() {
            self.give_way(left.elapsed());
        }
        let batch = self.patches.next_batch();
        if let Some(Ok(batch)) = &batch {
            count_patches(batch.patches.iter().map(|patch| &patch.meta));
        }
        self.left = Some(Instant::now());
        batch
    }

    fn batches(&self) -> u64 {
        self.patches.batches()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Busy(AtomicBool);

    impl PatchService for Busy {
        fn plan(&self) -> &Plan {
            unreachable!("nothing is planned")
        }
        fn resolve(&self, _recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
            Err(StreamError::Stopped)
        }
        fn open(&self, _: &Arc<Resolved>, _: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
            Ok(Box::new(Nothing))
        }
        fn has_waiting_readers(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    struct Nothing;

    impl PatchStream for Nothing {
        fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
            None
        }
        fn batches(&self) -> u64 {
            0
        }
    }

    /// A step, then the next batch: returns how long the batch took.
    fn waited(busy: bool, stop: bool) -> Duration {
        let mut stream = TurnStream {
            patches: Box::new(Nothing),
            service: Arc::new(Busy(AtomicBool::new(busy))),
            share: 20.0,
            stop: Arc::new(AtomicBool::new(stop)),
            left: None,
        };
        assert!(stream.next_batch().is_none());
        std::thread::sleep(Duration::from_millis(40));
        let began = Instant::now();
        assert!(stream.next_batch().is_none());
        began.elapsed()
    }

    #[test]
    fn a_training_gives_way_by_the_weights_while_streams_wait() {
        assert!(waited(true, false) >= Duration::from_millis(800));
        // Neither sleeps at all; the bound only tells them from the one above, on a busy machine too.
        assert!(waited(false, false) < Duration::from_millis(800));
        assert!(waited(true, true) < Duration::from_millis(800));
    }
}
