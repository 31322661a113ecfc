//! Connections: accepted up to a limit, with TLS where a certificate is set, each served by a task of its own.

use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics::{counter, gauge};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::settings::{HANDSHAKE_TIME, HEAD_TIME, MAX_HEAD_BYTES, MAX_HEADERS};
use super::stall::StallLimit;
use crate::telemetry::metrics::{CONNECTIONS_OPEN, CONNECTIONS_REFUSED_TOTAL};

/// After how long a silent peer is asked whether it is there, how often, and how many times.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);
/// What the send buffer of a peer on loopback gets, as far as the kernel's limit allows. It would let the buffer grow to megabytes,
/// which a far peer needs and a near one pays for: what is sent has left the cache before it is read (`docs/performance.md`, "The wire").
const LOOPBACK_SEND_BYTES: usize = 256 << 10;
/// What the listener waits after the system refused it a connection, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What every connection is served with.
pub(super) struct Front {
    /// The routes.
    pub router: Router,
    /// How a connection becomes one with TLS.
    pub tls: Option<TlsAcceptor>,
    /// How long a client may take nothing.
    pub stall: Duration,
    /// Places for connections.
    pub places: Arc<Semaphore>,
    /// Set once connections are to end after the request that they are at.
    pub closing: watch::Receiver<bool>,
}

/// Accepts connections until they are to end.
pub(super) async fn accept(listener: TcpListener, front: Arc<Front>) {
    let mut closing = front.closing.clone();
    let mut closed = pin!(closing.wait_for(|closing| *closing));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut closed => return,
        };
        match accepted {
            Ok((stream, peer)) => front.clone().admit(stream, peer.ip()),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection that is counted as open.
struct Open {
    _place: OwnedSemaphorePermit,
}

impl Open {
    fn new(place: OwnedSemaphorePermit) -> Self {
        gauge!(CONNECTIONS_OPEN).increment(1);
        Self { _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        gauge!(CONNECTIONS_OPEN).decrement(1);
    }
}

impl Front {
    /// Serves a connection on a task of its own, or closes it where there is no place.
    fn admit(self: Arc<Self>, stream: TcpStream, peer: IpAddr) {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            counter!(CONNECTIONS_REFUSED_TOTAL, "reason" => "limit").increment(1);
            return;
        };
        let open = Open::new(place);
        tokio::spawn(async move {
            if let Err(error) = self.serve(stream, peer).await {
                tracing::trace!(%error, "a connection ended");
            }
            drop(open);
        });
    }

    async fn serve(&self, stream: TcpStream, peer: IpAddr) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        tune(&stream, peer)?;
        let Some(acceptor) = &self.tls else {
            return Ok(self.speak(stream).await?);
        };
        let shaken = timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await;
        match shaken.map_err(io::Error::from).flatten() {
            Ok(stream) => Ok(self.speak(stream).await?),
            Err(error) => {
                counter!(CONNECTIONS_REFUSED_TOTAL, "reason" => "handshake").increment(1);
                Err(error.into())
            }
        }
    }

    /// Answers requests until the client leaves, or until the one at hand is answered and connections are to end.
    async fn speak<C: AsyncRead + AsyncWrite + Unpin + Send>(&self, connection: C) -> hyper::Result<()> {
        let io = TokioIo::new(StallLimit::new(connection, self.stall));
        let service = TowerToHyperService::new(self.router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(io, service);
        let mut connection = pin!(connection);
        let mut closing = self.closing.clone();
        tokio::select! {
            ended = connection.as_mut() => return ended,
            _ = closing.wait_for(|closing| *closing) => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    }
}

/// Frames leave at once, and a peer that is gone is noticed after a minute.
fn tune(stream: &TcpStream, peer: IpAddr) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (after, every, times) = KEEPALIVE;
    let keepalive = TcpKeepalive::new()
        .with_time(after)
        .with_interval(every)
        .with_retries(times);
    let socket = SockRef::from(stream);
    if peer.to_canonical().is_loopback()
        && let Err(error) = socket.set_send_buffer_size(LOOPBACK_SEND_BYTES)
    {
        tracing::debug!(%error, "a connection keeps the send buffer that the system gave it");
    }
    socket.set_tcp_keepalive(&keepalive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn peers_on_loopback_get_a_small_send_buffer_and_others_keep_theirs() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let accepted = async || {
            let client = TcpStream::connect(at).await.unwrap();
            (listener.accept().await.unwrap().0, client)
        };
        let bytes = |stream: &TcpStream| SockRef::from(stream).send_buffer_size().unwrap();
        for near in ["127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1"] {
            let (stream, _client) = accepted().await;
            let before = bytes(&stream);
            tune(&stream, near.parse().unwrap()).unwrap();
            // The kernel doubles what it is told, for its own records.
            let after = bytes(&stream);
            assert!(
                after != before && after <= 2 * LOOPBACK_SEND_BYTES,
                "{near}: {before} to {after}"
            );
        }
        for far in ["192.0.2.7", "2001:db8::1", "::ffff:192.0.2.7"] {
            let (stream, _client) = accepted().await;
            let before = bytes(&stream);
            tune(&stream, far.parse().unwrap()).unwrap();
            assert_eq!(bytes(&stream), before, "{far}");
        }
    }
}
