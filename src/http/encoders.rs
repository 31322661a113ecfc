//! The threads that make the frames of all streams.

use std::io;

use rayon::{ThreadPool, ThreadPoolBuilder};
use tracing::Span;

/// One thread per core for what needs memory by the batch. The thread of a stream does none of it: the allocator would keep pages
/// for each of them, where the streams together need those of a few (`docs/performance.md`).
pub(super) struct Encoders(ThreadPool);

impl Encoders {
    /// Starts the threads.
    pub fn start() -> io::Result<Self> {
        let threads = ThreadPoolBuilder::new().thread_name(|number| format!("freetumor-encode-{number}"));
        Ok(Self(threads.build().map_err(io::Error::other)?))
    }

    /// Runs work on one of the threads and waits for it; its log lines are those of the caller's request.
    ///
    /// The work must not wait for a lock that other work holds while it computes in parallel: a thread that waits for its parts
    /// takes up other work meanwhile, and would wait for itself.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let span = Span::current();
        self.0.install(|| span.in_scope(work))
    }
}
