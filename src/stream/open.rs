//! One rank's stream: which indices, in which batches, and how far ahead they are asked for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::delivery::{Delivery, LastBatch};
use super::make::Order;
use super::patch::StreamedPatch;
use super::resolve::Prepared;
use super::service::{Core, Task};
use super::window::OrderedWindow;
use super::{Batch, PatchStream, Resolved, StreamError};
use crate::synth::Cancelled;

/// The largest batch.
const MAX_BATCH: u32 = 64;
/// The largest index or count a client may name: far beyond any run, far below an overflow.
const MAX_INDEX: u64 = 1 << 48;
/// The largest world.
const MAX_WORLD: u32 = 1 << 16;

/// Which indices a rank gets, as arithmetic on the delivery.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Course {
    rank: u64,
    world: u64,
    batch: u64,
    from: u64,
    steps: u64,
}

impl Course {
    /// Checks a delivery against a recipe.
    ///
    /// # Errors
    /// [`StreamError`] names the field of the delivery or cursor.
    pub(super) fn new(resolved: &Resolved, delivery: &Delivery) -> Result<Self, StreamError> {
        let refuse = |field, expected: String, got: String| Err(StreamError::Delivery { field, expected, got });
        if !(1..=MAX_BATCH).contains(&delivery.batch_size) {
            return refuse(
                "batch_size",
                format!("1 to {MAX_BATCH}"),
                delivery.batch_size.to_string(),
            );
        }
        if !(1..=MAX_WORLD).contains(&delivery.world) {
            return refuse("world", format!("1 to {MAX_WORLD}"), delivery.world.to_string());
        }
        if delivery.rank >= delivery.world {
            let expected = format!("0 to {}, below world", delivery.world - 1);
            return refuse("rank", expected, delivery.rank.to_string());
        }
        if delivery.count.is_some_and(|count| count > MAX_INDEX) {
            return refuse("count", format!("at most {MAX_INDEX}"), format!("{:?}", delivery.count));
        }
        let from = match &delivery.cursor {
            None => delivery.from,
            Some(cursor) => {
                check_cursor(resolved, cursor)?;
                cursor.next_index
            }
        };
        if from > MAX_INDEX {
            return refuse("from", format!("at most {MAX_INDEX}"), from.to_string());
        }
        let (world, batch) = (u64::from(delivery.world), u64::from(delivery.batch_size));
        let epoch = resolved.patches_per_epoch;
        let left = epoch - from % epoch;
        let to_the_end = match delivery.last_batch {
            LastBatch::Fill => left.div_ceil(world * batch),
            LastBatch::Drop => left / (world * batch),
        };
        Ok(Self {
            rank: u64::from(delivery.rank),
            world,
            batch,
            from,
            steps: delivery.count.unwrap_or(to_the_end),
        })
    }

    /// Returns the index of this rank's n-th patch.
    fn index(&self, ordinal: u64) -> u64 {
        self.start(ordinal / self.batch) + ordinal % self.batch * self.world + self.rank
    }

    /// Returns the first index of a step.
    fn start(&self, step: u64) -> u64 {
        self.from + step * self.world * self.batch
    }
}

fn check_cursor(resolved: &Resolved, cursor: &super::cursor::Cursor) -> Result<(), StreamError> {
    let server = resolved.cursor(cursor.next_index);
    let fields = [
        ("recipe", cursor.recipe.to_string(), server.recipe.to_string()),
        ("snapshot", cursor.snapshot.to_string(), server.snapshot.to_string()),
        ("revision", cursor.revision.to_string(), server.revision.to_string()),
    ];
    for (field, cursor, server) in fields {
        if cursor != server {
            return Err(StreamError::CursorMismatch { field, cursor, server });
        }
    }
    if cursor.bundle != server.bundle {
        return Err(StreamError::BundleGone(cursor.bundle));
    }
    Ok(())
}

/// A stream in progress.
pub(super) struct Opened {
    core: Arc<Core>,
    prepared: Arc<Prepared>,
    course: Course,
    delivery: Delivery,
    window: Arc<OrderedWindow<Result<StreamedPatch, StreamError>>>,
    cancelled: Cancelled,
    /// Patches asked for, and patches taken.
    asked: u64,
    taken: u64,
    failed: bool,
}

impl Opened {
    pub(super) fn new(core: Arc<Core>, prepared: Arc<Prepared>, course: Course, delivery: Delivery) -> Self {
        Self {
            core,
            prepared,
            course,
            delivery,
            window: Arc::new(OrderedWindow::new()),
            cancelled: Cancelled::default(),
            asked: 0,
            taken: 0,
            failed: false,
        }
    }

    /// Asks for patches ahead: at most the window, and no more than one while all streams together hold their most.
    fn ask_ahead(&mut self) -> Result<(), StreamError> {
        let total = self.course.steps.saturating_mul(self.course.batch);
        while self.asked < total && self.asked - self.taken < self.core.config.window as u64 {
            let needed = self.asked == self.taken;
            if !needed && self.core.in_flight.load(Ordering::Relaxed) >= self.core.config.max_patches {
                break;
            }
            let task = Task {
                order: Order {
                    prepared: self.prepared.clone(),
                    index: self.course.index(self.asked),
                    on_failed: self.delivery.on_failed,
                    cancelled: self.cancelled.clone(),
                },
                ordinal: self.asked,
                window: self.window.clone(),
            };
            if needed {
                self.core.tasks.send(task).map_err(|_| StreamError::Stopped)?;
            } else if self.core.tasks.try_send(task).is_err() {
                // Other streams fill the queue; this one asks again when it takes its next patch.
                break;
            }
            self.core.in_flight.fetch_add(1, Ordering::Relaxed);
            self.asked += 1;
        }
        Ok(())
    }

    fn take(&mut self) -> Result<StreamedPatch, StreamError> {
        self.ask_ahead()?;
        if self.core.stopped.load(Ordering::Acquire) {
            return Err(StreamError::Stopped);
        }
        let patch = self.window.take(self.taken);
        self.core.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.taken += 1;
        patch
    }
}

impl PatchStream for Opened {
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
        let step = self.taken / self.course.batch;
        if self.failed || step >= self.course.steps {
            return None;
        }
        let patches: Result<Vec<_>, _> = (0..self.course.batch).map(|_| self.take()).collect();
        self.failed = patches.is_err();
        Some(patches.map(|patches| Batch {
            step: self.course.start(step) / (self.course.world * self.course.batch),
            patches,
            next: self.prepared.resolved.cursor(self.course.start(step + 1)),
        }))
    }

    fn batches(&self) -> u64 {
        self.course.steps
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.cancelled.cancel();
        let left = usize::try_from(self.asked - self.taken).unwrap_or(usize::MAX);
        self.core.in_flight.fetch_sub(left, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(rank: u64, world: u64, batch: u64, from: u64, steps: u64) -> Course {
        Course {
            rank,
            world,
            batch,
            from,
            steps,
        }
    }

    #[test]
    fn ranks_share_each_step_without_gap_or_repeat() {
        for (world, batch) in [(1, 1), (2, 3), (3, 2), (5, 4)] {
            let mut seen: Vec<u64> = (0..world)
                .flat_map(|rank| {
                    let course = course(rank, world, batch, 10, 4);
                    (0..4 * batch).map(move |n| course.index(n))
                })
                .collect();
            seen.sort_unstable();
            assert_eq!(seen, (10..10 + 4 * world * batch).collect::<Vec<_>>());
        }
        // Within a step the ranks are strided.
        assert_eq!(course(1, 2, 2, 0, 1).index(1), 3);
    }
}
