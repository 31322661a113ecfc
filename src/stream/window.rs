//! The ordered window: results arrive in any order and leave in theirs.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

/// Results by ordinal. Its bound is that of the requests: a stream asks for no more than its window at a time.
pub(super) struct OrderedWindow<T> {
    inside: Mutex<Inside<T>>,
    arrived: Condvar,
}

struct Inside<T> {
    ready: BTreeMap<u64, T>,
    is_closed: bool,
}

impl<T> OrderedWindow<T> {
    pub(super) fn new() -> Self {
        Self {
            inside: Mutex::new(Inside {
                ready: BTreeMap::new(),
                is_closed: false,
            }),
            arrived: Condvar::new(),
        }
    }

    /// Leaves a result.
    pub(super) fn put(&self, ordinal: u64, value: T) {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        if !inside.is_closed {
            inside.ready.insert(ordinal, value);
        }
        self.arrived.notify_all();
    }

    /// Waits for the result of an ordinal that is or will be asked for; nothing once the window is closed.
    pub(super) fn take(&self, ordinal: u64) -> Option<T> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        while !inside.is_closed {
            if let Some(value) = inside.ready.remove(&ordinal) {
                return Some(value);
            }
            inside = self.arrived.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Tells whether the result of an ordinal lies ready.
    pub(super) fn holds(&self, ordinal: u64) -> bool {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.ready.contains_key(&ordinal)
    }

    /// Takes a result out that nobody waits for yet.
    pub(super) fn take_back(&self, ordinal: u64) -> Option<T> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.ready.remove(&ordinal)
    }

    /// Wakes who waits, and returns what lies ready.
    pub(super) fn close(&self) -> BTreeMap<u64, T> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.is_closed = true;
        self.arrived.notify_all();
        std::mem::take(&mut inside.ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_leave_in_order() {
        let window = OrderedWindow::new();
        std::thread::scope(|scope| {
            for worker in 0..3u64 {
                let window = &window;
                scope.spawn(move || (0..40).rev().for_each(|i| window.put(3 * i + worker, 3 * i + worker)));
            }
            (0..120).for_each(|ordinal| assert_eq!(window.take(ordinal), Some(ordinal)));
        });
    }

    #[test]
    fn closing_wakes_who_waits() {
        let window: OrderedWindow<u64> = OrderedWindow::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| window.take(0));
            std::thread::sleep(std::time::Duration::from_millis(20));
            window.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
        window.put(0, 7);
        assert_eq!(window.take(0), None);
    }
}
