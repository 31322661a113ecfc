//! A connection that fails once its client has taken nothing for too long.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A connection whose writes may not wait for longer than a limit.
///
/// A trainer that validates takes nothing for minutes, and its system still acknowledges: the connection is alive and only
/// full. Peers that are gone are found by TCP keepalive long before.
pub(super) struct StallLimit<C> {
    connection: C,
    limit: Duration,
    waiting: Pin<Box<Sleep>>,
    is_waiting: bool,
}

impl<C> StallLimit<C> {
    pub fn new(connection: C, limit: Duration) -> Self {
        Self {
            connection,
            limit,
            waiting: Box::pin(sleep(limit)),
            is_waiting: false,
        }
    }

    /// Starts the clock at the first write that has to wait, and stops it at the next that does not.
    fn watch<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.is_waiting = false;
            return written;
        }
        if !self.is_waiting {
            self.is_waiting = true;
            let deadline = Instant::now() + self.limit;
            self.waiting.as_mut().reset(deadline);
        }
        ready!(self.waiting.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client took nothing for server.stall_seconds",
        )))
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for StallLimit<C> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(context, into)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for StallLimit<C> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.connection).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.connection).poll_write_vectored(context, slices);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.connection).poll_flush(context);
        self.watch(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.connection).poll_shutdown(context);
        self.watch(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(work)
    }

    #[test]
    fn a_client_that_takes_nothing_is_cut_and_a_slow_one_is_not() {
        block_on(async {
            let (near, mut far) = duplex(64);
            let mut near = StallLimit::new(near, Duration::from_millis(200));
            // Slower than the limit in all, but never silent for that long.
            let reader = tokio::spawn(async move {
                let mut taken = 0;
                let mut chunk = [0; 64];
                while taken < 512 {
                    sleep(Duration::from_millis(50)).await;
                    taken += far.read(&mut chunk).await.unwrap();
                }
                far
            });
            near.write_all(&[7; 512]).await.unwrap();
            let _far = reader.await.unwrap();
            let error = near.write_all(&[7; 512]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
    }
}
