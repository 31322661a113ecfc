//! A stream's thread: pulls batches, has them encoded and hands frames to the connection.
//!
//! Two frames may wait for the client; a third blocks this thread, and with it only this stream (promise P3).

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use metrics::counter;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;

use super::app::App;
use super::encoders::Encoders;
use super::observe::RequestId;
use super::problem::Problem;
use crate::stream::cursor::Cursor;
use crate::stream::delivery::Delivery;
use crate::stream::patch::{PatchMeta, StreamedPatch};
use crate::stream::{Batch, Leave, PatchStream, Resolved, StreamError, count_patches, first_index};
use crate::telemetry::metrics::{PATCHES_REUSED_TOTAL, SENT_BYTES_TOTAL, STREAMS_ENDED_TOTAL, Stage};
use crate::wire::codec::Encoding;
use crate::wire::frame::{self, Kind, Parts};
use crate::wire::header::{batch_frame, end_frame, stream_header};
use crate::wire::proto::EndReason;

/// What a stream's thread hands to its connection.
pub(super) enum Item {
    /// More follows.
    Frame(Parts),
    /// The last frame. A channel that closes without one was cut.
    Last(Bytes),
}

/// A stream that the service opened.
pub(super) struct Producer {
    patches: Box<dyn PatchStream>,
    header: Parts,
    encoding: Encoding,
    encoders: Arc<Encoders>,
    count: Option<u64>,
    cursor: Cursor,
    draining: watch::Receiver<bool>,
    ends_at: Option<Instant>,
}

/// Why a producer stopped.
enum Stop {
    End(EndReason),
    Failed(Problem),
    ClientLeft,
}

impl Producer {
    /// Opens a stream; nothing has been made yet when this returns.
    pub fn open(
        app: &App,
        resolved: &Arc<Resolved>,
        delivery: &Delivery,
        ends_at: Option<Instant>,
    ) -> Result<Self, Problem> {
        let service = &*app.service;
        let patches = service.open(resolved, delivery)?;
        let first = first_index(resolved, delivery)?;
        let header = stream_header(resolved, service.plan(), delivery, first, patches.batches());
        Ok(Self {
            patches,
            header: frame::parts(Kind::Header, &header, Vec::new())?,
            encoding: Encoding::of(delivery, service.plan().window_hu),
            encoders: app.encoders.clone(),
            count: delivery.count,
            cursor: resolved.cursor(first),
            draining: app.draining.subscribe(),
            ends_at,
        })
    }

    /// Returns what ends the stream while it waits for its next batch.
    pub fn leave(&self) -> Leave {
        self.patches.leave()
    }

    /// Sends frames until the end, a failure, a shutdown, or until the client leaves.
    pub fn run(mut self, frames: &Sender<Item>, id: &RequestId) {
        tracing::debug!(first = self.cursor.next_index, "a stream begins");
        let stop = self.send_all(frames);
        let (reason, last) = match stop {
            Stop::End(reason) => (reason_name(reason), end_frame(reason, &self.cursor)),
            Stop::Failed(mut problem) => {
                problem.request_id = Some(id.0.clone());
                tracing::warn!(status = problem.status, detail = problem.detail, "a stream failed");
                ("failed", problem.to_frame())
            }
            Stop::ClientLeft => {
                counter!(STREAMS_ENDED_TOTAL, "reason" => "client_left").increment(1);
                tracing::debug!(next = self.cursor.next_index, reason = "client_left", "a stream ended");
                return;
            }
        };
        counter!(STREAMS_ENDED_TOTAL, "reason" => reason).increment(1);
        tracing::debug!(next = self.cursor.next_index, reason, "a stream ended");
        // The client may leave before the last frame; there is nobody left to tell.
        frames.blocking_send(Item::Last(last)).ok();
    }

    fn send_all(&mut self, frames: &Sender<Item>) -> Stop {
        if !send(frames, self.header.clone()) {
            return Stop::ClientLeft;
        }
        for sent in 0u64.. {
            if frames.is_closed() {
                return Stop::ClientLeft;
            }
            if *self.draining.borrow() {
                return Stop::End(EndReason::Shutdown);
            }
            if self.ends_at.is_some_and(|end| Instant::now() >= end) {
                return Stop::End(EndReason::Rebalance);
            }
            let batch = match Stage::WaitForBatch.time(|| self.patches.next_batch()) {
                Some(Ok(batch)) => batch,
                Some(Err(StreamError::Stopped)) if frames.is_closed() => return Stop::ClientLeft,
                Some(Err(StreamError::Stopped)) => return Stop::End(EndReason::Shutdown),
                Some(Err(error)) => return Stop::Failed(error.into()),
                None if self.count.is_some_and(|count| sent >= count) => return Stop::End(EndReason::Count),
                None => return Stop::End(EndReason::EndOfEpoch),
            };
            let encode = || Stage::Encode.time(|| batch_frame(&batch, &self.encoding));
            let frame = match self.encoders.run(encode) {
                Ok(frame) => frame,
                Err(error) => return Stop::Failed(error.into()),
            };
            let Batch {
                patches, reused, next, ..
            } = batch;
            // The voxels go before the frame waits for its client: one that stopped reading holds no batch beside it.
            let metas: Vec<PatchMeta> = patches.into_iter().map(meta_of).collect();
            if !send(frames, frame) {
                return Stop::ClientLeft;
            }
            count_patches(&metas);
            counter!(PATCHES_REUSED_TOTAL).increment(reused.len() as u64);
            self.cursor = next;
        }
        Stop::End(EndReason::Count)
    }
}

/// Keeps a patch's provenance; its voxels stay only where another stream holds them too.
fn meta_of(patch: Arc<StreamedPatch>) -> PatchMeta {
    Arc::try_unwrap(patch).map_or_else(|shared| shared.meta.clone(), |own| own.meta)
}

fn send(frames: &Sender<Item>, frame: Parts) -> bool {
    let length = frame.length() as u64;
    let is_sent = Stage::WaitForClient.time(|| frames.blocking_send(Item::Frame(frame)).is_ok());
    if is_sent {
        counter!(SENT_BYTES_TOTAL).increment(length);
    }
    is_sent
}

fn reason_name(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Unspecified => "unspecified",
        EndReason::EndOfEpoch => "end_of_epoch",
        EndReason::Count => "count",
        EndReason::Shutdown => "shutdown",
        EndReason::Rebalance => "rebalance",
    }
}
