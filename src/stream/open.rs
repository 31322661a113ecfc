//! One rank's stream in progress.

use std::sync::Arc;

use super::course::Course;
use super::lane::Arrived;
use super::patch::StreamedPatch;
use super::resolve::Prepared;
use super::service::Core;
use super::{Batch, Leave, PatchStream, StreamError};

/// A stream in progress: its lane in the scheduler, and how far it was read.
pub(super) struct Opened {
    core: Arc<Core>,
    prepared: Arc<Prepared>,
    course: Course,
    lane: u64,
    step: u64,
    failed: bool,
}

impl Opened {
    pub(super) fn new(core: Arc<Core>, prepared: Arc<Prepared>, course: Course, lane: u64) -> Self {
        Self {
            core,
            prepared,
            course,
            lane,
            step: 0,
            failed: false,
        }
    }

    fn take(&self) -> Result<(Arc<StreamedPatch>, bool), StreamError> {
        let arrived = self.core.scheduler.take(self.lane).ok_or(StreamError::Stopped)?;
        let Arrived { value, is_reused } = arrived;
        value.map(|patch| (patch, is_reused))
    }
}

impl PatchStream for Opened {
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
        let step = self.step;
        if self.failed || step >= self.course.steps() {
            return None;
        }
        let patches: Result<Vec<_>, _> = (0..self.course.patches_in(step)).map(|_| self.take()).collect();
        self.step += 1;
        self.failed = patches.is_err();
        Some(patches.map(|patches| {
            let reused = (0..).zip(&patches).filter(|(_, (_, is_reused))| *is_reused);
            Batch {
                step: self.course.position(step),
                reused: reused.map(|(place, _)| place).collect(),
                patches: patches.into_iter().map(|(patch, _)| patch).collect(),
                shape: self.prepared.resolved.patch,
                next: self.prepared.resolved.cursor(self.course.start(step + 1)),
            }
        }))
    }

    fn batches(&self) -> u64 {
        self.course.steps()
    }

    fn leave(&self) -> Leave {
        let (core, lane) = (Arc::downgrade(&self.core), self.lane);
        Leave::new(move || {
            if let Some(core) = core.upgrade() {
                core.scheduler.leave(lane);
            }
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.core.scheduler.leave(self.lane);
    }
}
