//! Serving HTTP to whoever reaches the port. It must never end the agent, nor eat up its file descriptors.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    serve::{Listener, serve as serve_http},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

/// How long to wait before trying again for a port that is taken.
const REBIND: Duration = Duration::from_secs(3);
/// Everybody who reaches the port may open connections, and the agent needs its descriptors.
const LIMITS: Limits = Limits {
    connections: 64,
    // A probe or a scrape takes milliseconds.
    lifetime: Duration::from_secs(10),
};

/// Something that is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    /// The paths, for people.
    pub(crate) paths: &'static str,
    /// What a failure to listen is called.
    pub(crate) failure: &'static str,
    /// The flags that choose another address.
    pub(crate) flags: &'static str,
}

/// Serves in the background until cancelled. A port that is taken is tried for again and again.
pub(crate) fn serve(
    service: Service,
    address: SocketAddr,
    router: Router,
    cancel: CancellationToken,
) {
    tokio::spawn(async move {
        let Some(listener) = cancel.run_until_cancelled(bind(service, address)).await else {
            return;
        };
        tracing::info!(%address, "serving {}", service.paths);
        cancel
            .run_until_cancelled(answer(listener, router, LIMITS))
            .await;
    });
}

async fn answer(listener: TcpListener, router: Router, limits: Limits) {
    let bounded = Bounded {
        listener,
        permits: Arc::new(Semaphore::new(limits.connections)),
        lifetime: limits.lifetime,
    };
    // Errors of a connection end the connection, and errors of accepting are tried again.
    if let Err(error) = serve_http(bounded, router).await {
        tracing::error!(%error, "serve HTTP");
    }
}

async fn bind(service: Service, address: SocketAddr) -> TcpListener {
    let mut reported = None;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                let text = error.to_string();
                if reported.as_ref() != Some(&text) {
                    tracing::error!(
                        "{}. listen on {address}: {text}: trying again every {REBIND:?}; choose another with {}",
                        service.failure,
                        service.flags
                    );
                    reported = Some(text);
                }
            }
        }
        sleep(REBIND).await;
    }
}

/// What clients may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Connections at a time.
    connections: usize,
    /// How long each may live.
    lifetime: Duration,
}

/// Accepts a bounded number of connections, each for a bounded time.
struct Bounded {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    lifetime: Duration,
}

impl Listener for Bounded {
    type Io = ShortLived;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        let io = ShortLived {
            stream,
            end: Box::pin(sleep(self.lifetime)),
            _permit: permit,
        };
        (io, peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that breaks off when its time is over.
struct ShortLived {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl ShortLived {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        self.end.as_mut().poll(context).is_ready()
    }
}

impl AsyncRead for ShortLived {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for ShortLived {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn silent_clients_keep_nobody_out_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let limits = Limits {
            connections: 2,
            lifetime: Duration::from_millis(200),
        };
        let router = Router::new().route("/healthz", get("flanneld is running"));
        tokio::spawn(answer(listener, router, limits));
        let mut silent = Vec::new();
        for _ in 0..4 {
            silent.push(TcpStream::connect(address).await.expect("connect"));
        }
        let mut probe = TcpStream::connect(address).await.expect("connect");
        probe
            .write_all(b"GET /healthz HTTP/1.0\r\n\r\n")
            .await
            .expect("ask");
        let mut text = String::new();
        probe.read_to_string(&mut text).await.expect("an answer");
        assert!(text.ends_with("\r\n\r\nflanneld is running"), "{text}");
        for mut client in silent {
            // Closed or reset, either way it is over.
            let _reset = client.read_to_string(&mut text).await;
        }
    }
}
