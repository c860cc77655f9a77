//! Bulk TCP.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::socket::{accept, connect_from, listen};
use crate::{
    pin,
    rig::{Rig, TCP_PORT},
};

/// Bytes handed over at a time.
const CHUNK: usize = 128 << 10;
/// Until windows are open and, with a gate, the flow is established.
const WARM_UP: Duration = Duration::from_millis(60);
/// The same for each further flow: they all start at once, and on one CPU.
const WARM_UP_MORE: Duration = Duration::from_millis(5);

/// Megabits a second, sender and receiver on a CPU each.
pub(super) fn throughput(rig: &Rig, flows: usize, length: Duration) -> anyhow::Result<f64> {
    let rate = bytes_per_second(
        rig,
        flows,
        length,
        || pin::on_cpu(0),
        || pin::on_cpu(pin::other_cpu()),
    )?;
    Ok(rate * 8.0 / 1e6)
}

/// CPU seconds for a gigabit, both ends and all in between: with everything on one CPU that is never idle, the time it takes.
pub(super) fn cost(rig: &Rig, length: Duration) -> anyhow::Result<f64> {
    let one = || pin::fifo_on_cpu(0);
    let rate = bytes_per_second(rig, 1, length, one, one)?;
    Ok(1e9 / (rate * 8.0))
}

type Place = fn() -> std::io::Result<()>;

fn bytes_per_second(
    rig: &Rig,
    flows: usize,
    length: Duration,
    sender: Place,
    receiver: Place,
) -> anyhow::Result<f64> {
    let listener = listen(&rig.server, TCP_PORT)?;
    let mut pairs = Vec::new();
    for _ in 0..flows {
        let client = connect_from(&rig.client, SocketAddr::from((rig.server.ip, TCP_PORT)))?;
        pairs.push((client, accept(&listener)?));
    }
    let (stop, bytes) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (client, server) in &pairs {
            let (stop, bytes) = (&stop, &bytes);
            threads.push(scope.spawn(move || receive(server, receiver, bytes)));
            threads.push(scope.spawn(move || send(client, sender, stop)));
        }
        thread::sleep(WARM_UP + WARM_UP_MORE * (flows as u32 - 1));
        let (start, before) = (Instant::now(), bytes.load(Ordering::Relaxed));
        thread::sleep(length);
        let (took, after) = (start.elapsed(), bytes.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        ensure!(after > before, "no byte arrived");
        Ok((after - before) as f64 / took.as_secs_f64())
    })
}

fn send(mut stream: &TcpStream, place: Place, stop: &AtomicBool) -> anyhow::Result<()> {
    place()?;
    let chunk = vec![0x5a; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&chunk).context("send")?;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(())
}

fn receive(mut stream: &TcpStream, place: Place, bytes: &AtomicU64) -> anyhow::Result<()> {
    place()?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let len = stream.read(&mut buffer).context("receive")?;
        if len == 0 {
            return Ok(());
        }
        bytes.fetch_add(len as u64, Ordering::Relaxed);
    }
}
