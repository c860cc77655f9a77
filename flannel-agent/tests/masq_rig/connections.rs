//! A connection from a pod to a host outside every millisecond, through masquerade.

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use flannel_testkit::Netns;

/// How many tasks open connections in turns, so that a slow one does not stop the others.
const TASKS: u32 = 4;
/// How often each of them does.
const EVERY: Duration = Duration::from_millis(4);
/// How long a connection may take. One that left without masquerade never comes about.
const LIMIT: Duration = Duration::from_secs(3);
const PORT: u16 = 4242;

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// For the server, which goes on until nobody connects any more.
    close: AtomicBool,
    opened: AtomicU64,
    failures: Mutex<Vec<String>>,
    sources: Mutex<BTreeSet<IpAddr>>,
}

/// Connections that are being opened all the time.
pub(crate) struct Connections {
    shared: Arc<Shared>,
    address: SocketAddr,
    outside: Netns,
    server: JoinHandle<()>,
    clients: Vec<JoinHandle<()>>,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) opened: u64,
    pub(crate) failures: Vec<String>,
    /// From which addresses the host outside saw them come.
    pub(crate) sources: BTreeSet<IpAddr>,
}

impl Connections {
    /// Starts opening connections from `pod` to `outside`, which has this address.
    pub(crate) fn start(pod: &Netns, outside: &Netns, address: Ipv4Addr) -> Connections {
        let shared = Arc::new(Shared::default());
        let address = SocketAddr::from((address, PORT));
        let listener = outside.run(|| TcpListener::bind(address)).expect("listen");
        let server = spawn(&shared, move |shared| serve(&listener, shared));
        let mut clients = Vec::new();
        for task in 0..TASKS {
            let pod = pod.clone();
            clients.push(spawn(&shared, move |shared| {
                pod.enter().expect("enter the pod");
                std::thread::sleep(EVERY / TASKS * task);
                open(address, shared);
            }));
        }
        Connections {
            shared,
            address,
            outside: outside.clone(),
            server,
            clients,
        }
    }

    /// How many were opened so far.
    pub(crate) fn opened(&self) -> u64 {
        self.shared.opened.load(Ordering::Relaxed)
    }

    /// Waits until so many more have been opened.
    #[track_caller]
    pub(crate) fn go_on(&self, more: u64) {
        let until = self.opened() + more;
        flannel_testkit::eventually(super::PATIENCE, "connections are being opened", || {
            let now = self.opened();
            (now >= until).then_some(()).ok_or_else(|| {
                let failures = self.shared.failures.lock().expect("no panic");
                format!(
                    "{now} of {until}, {} failed: {:?}",
                    failures.len(),
                    failures.first()
                )
            })
        });
    }

    /// Ends it and tells what became of them.
    pub(crate) fn stop(self) -> Outcome {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().expect("no panic");
        }
        self.shared.close.store(true, Ordering::Relaxed);
        // The server waits for one more.
        let address = self.address;
        drop(
            self.outside
                .run(|| TcpStream::connect_timeout(&address, LIMIT)),
        );
        self.server.join().expect("no panic");
        let failures = self.shared.failures.lock().expect("no panic").clone();
        let mut sources = self.shared.sources.lock().expect("no panic").clone();
        sources.remove(&address.ip());
        Outcome {
            opened: self.shared.opened.load(Ordering::Relaxed),
            failures,
            sources,
        }
    }
}

fn spawn(shared: &Arc<Shared>, work: impl FnOnce(&Shared) + Send + 'static) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || work(&shared))
}

fn serve(listener: &TcpListener, shared: &Shared) {
    while !shared.close.load(Ordering::Relaxed) {
        let Ok((mut stream, peer)) = listener.accept() else {
            continue;
        };
        shared.sources.lock().expect("no panic").insert(peer.ip());
        // The other end closes first, with a reset: no port of its is left waiting.
        drop(stream.write_all(b"!"));
    }
}

fn open(address: SocketAddr, shared: &Shared) {
    let mut next = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        if let Err(error) = once(address) {
            let mut failures = shared.failures.lock().expect("no panic");
            failures.push(error.to_string());
        }
        shared.opened.fetch_add(1, Ordering::Relaxed);
        next += EVERY;
        match next.checked_duration_since(Instant::now()) {
            Some(rest) => std::thread::sleep(rest),
            // A loaded machine is not made to catch up.
            None => next = Instant::now(),
        }
    }
}

fn once(address: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)
}
