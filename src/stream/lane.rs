//! A stream as the scheduler sees it.

use std::sync::Arc;

use super::course::Course;
use super::delivery::Priority;
use super::room::{Progress, Room};
use super::scheduler::Key;
use super::window::OrderedWindow;

/// A patch as it reaches a stream.
#[derive(Clone, Debug)]
pub(super) struct Arrived<T> {
    pub(super) value: T,
    /// Whether it was made for another stream.
    pub(super) is_reused: bool,
}

/// A stream: what it is of, what lies ready for it, and how far it has come.
pub(super) struct Lane<T> {
    pub(super) key: Key,
    pub(super) priority: Priority,
    pub(super) course: Course,
    pub(super) window: Arc<OrderedWindow<Arrived<T>>>,
    pub(super) progress: Progress,
}

impl<T> Lane<T> {
    /// `room` is as how many patches of the plan's size one of its patches counts.
    pub(super) fn new(key: Key, priority: Priority, course: Course, room: u64) -> Self {
        Self {
            key,
            priority,
            course,
            window: Arc::new(OrderedWindow::new()),
            progress: Progress::of(room),
        }
    }

    /// Tells whether the stream holds less than its part of the room and its course goes on.
    pub(super) fn is_due(&self, room: &Room) -> bool {
        room.is_due(&self.progress) && self.progress.asked < self.course.patches()
    }

    /// Takes note that the reader is there; returns where it waits, and for which patch.
    pub(super) fn come(&mut self, reads: u64) -> (Arc<OrderedWindow<Arrived<T>>>, u64) {
        let taken = self.progress.taken;
        self.progress.comes(reads, self.course.is_first_of_batch(taken));
        (self.window.clone(), taken)
    }

    /// Takes the last patch back that the stream has asked for, which lies ready.
    pub(super) fn take_back(&mut self) -> Option<Arrived<T>> {
        self.progress.asked -= 1;
        self.window.take_back(self.progress.asked)
    }
}
