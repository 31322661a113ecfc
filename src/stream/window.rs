//! The ordered window: results arrive in any order and leave in theirs.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

/// Results by ordinal. Its bound is that of the requests: a stream asks for no more than its window at a time.
pub(super) struct OrderedWindow<T> {
    ready: Mutex<BTreeMap<u64, T>>,
    arrived: Condvar,
}

impl<T> OrderedWindow<T> {
    pub(super) fn new() -> Self {
        Self {
            ready: Mutex::default(),
            arrived: Condvar::new(),
        }
    }

    /// Leaves a result.
    pub(super) fn put(&self, ordinal: u64, value: T) {
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(ordinal, value);
        self.arrived.notify_all();
    }

    /// Waits for the result of an ordinal that was asked for.
    pub(super) fn take(&self, ordinal: u64) -> T {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = ready.remove(&ordinal) {
                return value;
            }
            ready = self.arrived.wait(ready).unwrap_or_else(PoisonError::into_inner);
        }
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
            (0..120).for_each(|ordinal| assert_eq!(window.take(ordinal), ordinal));
        });
    }
}
