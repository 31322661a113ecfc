//! A job's journal: what happened to it, one JSON line each, appended and never changed.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::JobError;
use crate::learn::Metrics;

/// What is read of a journal at a time.
const CHUNK_BYTES: u64 = 256 << 10;

/// The measure of steps that were validated: mean Dice on held-out cases.
pub(super) const VALIDATION: &str = "validation_dice";

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It waits for its turn.
    Queued,
    /// It began, or goes on from its last checkpoint.
    Started,
    /// A step was made; every one that was validated is told, of the others one per second at most.
    Step {
        /// The step, from 1.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// What it measured: `loss`, `validation_dice` where it was validated, and others.
        metrics: Metrics,
        /// Patches learnt from per second since the step that was told before.
        patches_per_second: f64,
    },
    /// Work beside steps.
    Note {
        /// Which.
        note: String,
    },
    /// Somebody asked for its stop; it saves its state first.
    Stopping,
    /// Somebody stopped it; it goes on when somebody resumes it.
    Stopped,
    /// The server shut down; it goes on when the server starts again.
    Interrupted,
    /// It ended; the model is there.
    Finished,
    /// It failed, and goes on from its last checkpoint when somebody resumes it.
    Failed {
        /// Why.
        what: String,
    },
}

impl Event {
    /// Returns the event's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Started => "started",
            Self::Step { .. } => "step",
            Self::Note { .. } => "note",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Interrupted => "interrupted",
            Self::Finished => "finished",
            Self::Failed { .. } => "failed",
        }
    }

    /// Returns what a later event replaces, when all that counts is how a job stands.
    fn kind(&self) -> (&'static str, bool) {
        let is_validated = matches!(self, Self::Step { metrics, .. } if metrics.contains_key(VALIDATION));
        (self.name(), is_validated)
    }
}

/// An event, with its place in the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts the job's events from 1.
    pub id: u64,
    /// When it happened, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// The end of a journal, where events are appended.
pub(super) struct Journal {
    file: fs_err::File,
    /// Bytes of whole lines.
    length: u64,
    next: u64,
}

impl Journal {
    /// Returns a journal that nothing can be written into.
    #[cfg(test)]
    pub(super) fn unwritable(path: &Path) -> Self {
        let file = fs_err::File::open(path).expect("the file was made by the test");
        Self {
            file,
            length: 0,
            next: 1,
        }
    }

    /// Opens a journal and returns its last events: of each kind the last one, validated steps being a kind of their own.
    /// A line that a crash cut off is dropped.
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<Entry>), JobError> {
        let mut file = fs_err::OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(path)?;
        let (mut reader, mut last) = (JournalReader::new(path), Vec::<Entry>::new());
        loop {
            let entries = reader.read()?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                last.retain(|known| known.event.kind() != entry.event.kind());
                last.push(entry);
            }
        }
        file.set_len(reader.offset)?;
        file.seek(SeekFrom::End(0))?;
        let next = last.last().map_or(1, |entry| entry.id + 1);
        let length = reader.offset;
        Ok((Self { file, length, next }, last))
    }

    /// Returns an event as the next entry.
    pub(super) fn entry(&self, event: Event) -> Entry {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Entry {
            id: self.next,
            unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            event,
        }
    }

    /// Appends the next entry. What decides a job's state is on the disk when this returns.
    pub(super) fn append(&mut self, entry: &Entry) -> Result<(), JobError> {
        let is_state = !matches!(entry.event, Event::Step { .. } | Event::Note { .. });
        let mut line = serde_json::to_string(entry).expect("finite numbers are representable in JSON");
        line.push('\n');
        let written = self.file.write_all(line.as_bytes());
        let synced = written.and_then(|()| if is_state { self.file.sync_data() } else { Ok(()) });
        if let Err(error) = synced {
            // What a full disk took of it must not stand before the next entry, nor an entry that the caller takes for lost.
            self.file.set_len(self.length)?;
            return Err(error.into());
        }
        self.length += line.len() as u64;
        self.next += 1;
        Ok(())
    }
}

/// Reads a journal from its begin, and on as it grows. Holds one chunk of it at a time.
pub(super) struct JournalReader {
    path: PathBuf,
    offset: u64,
}

impl JournalReader {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.into(),
            offset: 0,
        }
    }

    /// Returns the next whole lines as events, as many as a chunk holds; none at the end.
    pub(super) fn read(&mut self) -> Result<Vec<Entry>, JobError> {
        let mut file = fs_err::File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut chunk = Vec::new();
        file.take(CHUNK_BYTES).read_to_end(&mut chunk)?;
        let Some(end) = chunk.iter().rposition(|byte| *byte == b'\n') else {
            if chunk.len() as u64 == CHUNK_BYTES {
                return Err(self.refused(format!("a line longer than {CHUNK_BYTES} bytes")));
            }
            return Ok(Vec::new());
        };
        let lines = chunk[..end].split(|byte| *byte == b'\n');
        let entries: Result<Vec<Entry>, _> = lines.map(serde_json::from_slice).collect();
        let entries = entries.map_err(|error| self.refused(error.to_string()))?;
        self.offset += end as u64 + 1;
        Ok(entries)
    }

    fn refused(&self, what: String) -> JobError {
        let what = format!("not a journal of a training, after {} bytes: {what}", self.offset);
        JobError::File {
            path: self.path.clone(),
            what,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(journal: &mut Journal, event: Event) -> Entry {
        let entry = journal.entry(event);
        journal.append(&entry).unwrap();
        entry
    }

    fn step(step: u64) -> Event {
        Event::Step {
            step,
            steps: 9000,
            metrics: Metrics::from([("loss".to_owned(), 0.25)]),
            patches_per_second: 2.0,
        }
    }

    #[test]
    fn what_was_appended_is_read_in_chunks_and_goes_on_after_a_cut_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let (mut journal, last) = Journal::open(&path).unwrap();
        assert!(last.is_empty());
        append(&mut journal, Event::Queued);
        for number in 1..=9000 {
            append(&mut journal, step(number));
        }
        drop(journal);
        let whole = std::fs::metadata(&path).unwrap().len();
        assert!(
            whole > 2 * CHUNK_BYTES,
            "{whole}: more than one chunk is what is tested"
        );
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"id\": 9002, \"unix").unwrap();
        let (mut journal, last) = Journal::open(&path).unwrap();
        assert_eq!(last.len(), 2);
        assert_eq!((last[1].id, &last[1].event), (9001, &step(9000)));
        assert_eq!(append(&mut journal, Event::Stopped).id, 9002);
        let (mut reader, mut ids) = (JournalReader::new(&path), Vec::new());
        loop {
            let entries = reader.read().unwrap();
            if entries.is_empty() {
                break;
            }
            ids.extend(entries.iter().map(|entry| entry.id));
        }
        assert_eq!(ids, (1..=9002).collect::<Vec<_>>());
    }

    #[test]
    fn a_file_of_something_else_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        std::fs::write(&path, "hello\n").unwrap();
        let error = Journal::open(&path).err().unwrap().to_string();
        assert!(error.contains("events.jsonl"), "{error}");
        std::fs::write(&path, vec![b'x'; CHUNK_BYTES as usize]).unwrap();
        let error = Journal::open(&path).err().unwrap().to_string();
        assert!(error.contains("a line longer than"), "{error}");
    }
}
