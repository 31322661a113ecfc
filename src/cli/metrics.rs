//! Metrics of commands that are no server: what Prometheus scrapes while they work.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use axum::Router;
use axum::http::header;
use axum::routing::get;

use super::say_error;
use crate::telemetry::metrics;

/// Serves `/metrics` on an address, from a thread of its own, for as long as the process lives.
pub(super) fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("--metrics: cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let handle = metrics::install();
    let render = move || {
        let handle = handle.clone();
        async move {
            handle.run_upkeep();
            (
                [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
                handle.render(),
            )
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("metrics".into()).spawn(move || {
        let served = runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            axum::serve(listener, Router::new().route("/metrics", get(render))).await
        });
        if let Err(error) = served {
            tracing::error!(%error, "metrics are no longer served");
        }
    })?;
    say_error(&format!("metrics on http://{address}/metrics"));
    Ok(())
}
