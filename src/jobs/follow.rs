//! Who follows a job's events: those that there were, then those that come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::journal::JournalReader;
use super::{Entry, JobError, JobName, TrainingHost};

/// Follows a job's events.
pub struct Follower {
    host: Arc<TrainingHost>,
    name: JobName,
    reader: JournalReader,
    after: u64,
}

impl Follower {
    pub(super) fn new(host: Arc<TrainingHost>, name: JobName, after: u64) -> Self {
        Self {
            reader: JournalReader::new(&host.events_path(&name)),
            host,
            name,
            after,
        }
    }

    /// Blocks for the next events, some at a time: none where nothing happened within a time, or nothing any more once
    /// one said that the job has ended.
    ///
    /// # Errors
    /// [`JobError`] names the file.
    pub fn next(&mut self, time: Duration) -> Result<Vec<Entry>, JobError> {
        let until = Instant::now() + time;
        loop {
            let mut entries = self.reader.read()?;
            let is_end = entries.is_empty();
            entries.retain(|entry| entry.id > self.after);
            if let Some(last) = entries.last() {
                self.after = last.id;
                return Ok(entries);
            }
            // Old events of a long journal come in chunks.
            if is_end && !self.wait(until) {
                return Ok(entries);
            }
        }
    }

    /// Tells whether the job has ended and every event was read.
    pub fn is_over(&self) -> bool {
        self.host.look(|jobs| {
            let status = jobs.known.get(&self.name).map(|known| &known.status);
            status.is_none_or(|status| status.last_event <= self.after && status.state.is_end())
        })
    }

    /// Waits until there is an event that was not read; `false` where there is none in time.
    fn wait(&self, until: Instant) -> bool {
        self.host.wait_until(until, |jobs| {
            let last = jobs.known.get(&self.name).map(|known| known.status.last_event);
            last.is_some_and(|last| last > self.after)
        })
    }
}
