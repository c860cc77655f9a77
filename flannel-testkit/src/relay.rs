//! A TCP relay from a namespace to an address of the machine's own network.

use crate::netns::Netns;
use anyhow::Context as _;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Carries connections made inside a namespace to a target outside. Dropping it ends the listener; connections end with their peers.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ns: Netns,
}

impl Relay {
    /// Listens on a free port of `ip` in `ns`, and connects to `target` from the caller's namespace.
    pub fn start(ns: &Netns, ip: Ipv4Addr, target: &str) -> anyhow::Result<Relay> {
        let listener = ns
            .try_run(|| TcpListener::bind((ip, 0)))?
            .with_context(|| format!("listen on {ip} in {}", ns.name()))?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, target) = (Arc::clone(&stop), target.to_owned());
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || {
                for client in listener.incoming() {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    // Whoever cannot be carried is cut off, as by a server that is down.
                    if let Ok((client, server)) = client.and_then(|client| {
                        let server = TcpStream::connect(&*target)?;
                        Ok((client, server))
                    }) {
                        drop(carry(&client, &server).and_then(|()| carry(&server, &client)));
                    }
                }
            })?;
        Ok(Relay {
            address,
            stop,
            thread: Some(thread),
            ns: ns.clone(),
        })
    }

    /// Where it listens, inside the namespace.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A last connection wakes the listener. Without a namespace there is none, and no listener either.
        let address = self.address;
        let woken = self.ns.try_run(|| TcpStream::connect(address));
        if let (Ok(Ok(_)), Some(thread)) = (woken, self.thread.take()) {
            // A panic in the thread has already been reported by it.
            drop(thread.join());
        }
    }
}

/// Copies one way in a thread of its own until one end is closed.
fn carry(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
    std::thread::Builder::new()
        .name("relay way".into())
        .spawn(move || {
            // Either end may go at any time.
            drop(io::copy(&mut from, &mut to));
            drop(to.shutdown(Shutdown::Write));
            drop(from.shutdown(Shutdown::Read));
        })
        .map(drop)
}
