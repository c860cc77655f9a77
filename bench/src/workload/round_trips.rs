//! TCP, one byte there and one back: rate, connections, and times at a given rate.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::socket::{accept, connect_from, connect_here, listen, sockaddr};
use crate::{
    netfilter::{SERVICE_PORT, service_ip},
    pin,
    rig::{Rig, TCP_PORT},
    stats,
};

/// Until caches are warm and, with a gate, the flow is established.
const WARM_UP: Duration = Duration::from_millis(10);

/// Round trips a second on one connection.
pub(super) fn tcp(rig: &Rig, service: bool, length: Duration) -> anyhow::Result<f64> {
    with_echo(rig, service, |stream| {
        round_trips(stream, WARM_UP)?;
        let (count, took) = round_trips(stream, length)?;
        Ok(count as f64 / took.as_secs_f64())
    })
}

/// Times of round trips in microseconds at the 50th, 99th and 99.9th percentile, `rate` of them asked for each second.
///
/// The requests are due at fixed times. One that starts late because another took long counts from when it was due, so
/// that a stall is not hidden by the requests that it held up.
pub(super) fn latency(rig: &Rig, rate: f64, length: Duration) -> anyhow::Result<Vec<f64>> {
    ensure!(rate.is_finite() && rate >= 1.0, "no rate to ask for");
    let gap = Duration::from_secs_f64(1.0 / rate);
    let mut times = with_echo(rig, false, |stream| {
        round_trips(stream, WARM_UP)?;
        paced(stream, gap, length)
    })?;
    times.sort_by(f64::total_cmp);
    Ok([0.5, 0.99, 0.999]
        .into_iter()
        .map(|q| stats::quantile(&times, q))
        .collect())
}

/// Connections a second, one after the other: open, one byte each way, reset.
pub(super) fn connections(rig: &Rig, service: bool, length: Duration) -> anyhow::Result<f64> {
    let listener = listen(&rig.server, TCP_PORT)?;
    let (ip, port) = target(rig, service);
    let address = sockaddr(ip, port);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let server = scope.spawn(|| serve_each(&listener, &stop));
        let outcome = rig.client.ns.try_run(|| -> anyhow::Result<f64> {
            pin::fifo_on_cpu(0)?;
            let connection = || exchange(&mut connect_here(&address)?);
            repeat(WARM_UP, connection)?;
            let (count, took) = repeat(length, connection)?;
            stop.store(true, Ordering::Relaxed);
            // Wakes the server up, which then sees that it may go.
            drop(connect_here(&address)?);
            Ok(count as f64 / took.as_secs_f64())
        });
        stop.store(true, Ordering::Relaxed);
        let served = server
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))?;
        let rate = outcome??;
        served.context("server")?;
        Ok(rate)
    })
}

fn target(rig: &Rig, service: bool) -> (std::net::IpAddr, u16) {
    if service {
        (service_ip(rig.family), SERVICE_PORT)
    } else {
        (rig.server.ip, TCP_PORT)
    }
}

/// Runs `ask` on a connection to a server that answers each byte; both on the first CPU.
fn with_echo<T: Send>(
    rig: &Rig,
    service: bool,
    ask: impl FnOnce(&mut TcpStream) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let listener = listen(&rig.server, TCP_PORT)?;
    let (ip, port) = target(rig, service);
    let mut client = connect_from(&rig.client, SocketAddr::from((ip, port)))?;
    let mut server = accept(&listener)?;
    thread::scope(|scope| {
        let echo = scope.spawn(move || echo(&mut server));
        // It ends the connection by dropping its end, whatever happened.
        let asking = scope.spawn(move || {
            pin::fifo_on_cpu(0)?;
            ask(&mut client)
        });
        let answer = asking
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        let echoed = echo
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))?;
        let answer = answer.context("client")?;
        echoed.context("server")?;
        Ok(answer)
    })
}

fn echo(stream: &mut TcpStream) -> anyhow::Result<()> {
    pin::fifo_on_cpu(0)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn exchange(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.write_all(b"x").context("ask")?;
    stream.read_exact(&mut [0]).context("no answer")
}

fn round_trips(stream: &mut TcpStream, length: Duration) -> anyhow::Result<(u64, Duration)> {
    repeat(length, || exchange(stream))
}

/// Does it again and again for so long.
fn repeat(
    length: Duration,
    mut once: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<(u64, Duration)> {
    let start = Instant::now();
    let mut count = 0;
    loop {
        once()?;
        count += 1;
        let took = start.elapsed();
        if took >= length {
            return Ok((count, took));
        }
    }
}

fn paced(stream: &mut TcpStream, gap: Duration, length: Duration) -> anyhow::Result<Vec<f64>> {
    let expected = length.as_secs_f64() / gap.as_secs_f64();
    let mut times = Vec::with_capacity(expected.min(1e7) as usize + 1);
    let start = Instant::now();
    let mut due = Duration::ZERO;
    while due < length {
        // Nobody sleeps so short; the CPU is ours.
        while start.elapsed() < due {
            std::hint::spin_loop();
        }
        exchange(stream)?;
        times.push(start.elapsed().saturating_sub(due).as_secs_f64() * 1e6);
        due += gap;
    }
    Ok(times)
}

/// Answers one byte on each connection, until told to stop.
fn serve_each(listener: &TcpListener, stop: &AtomicBool) -> anyhow::Result<()> {
    pin::fifo_on_cpu(0)?;
    loop {
        let (mut stream, _) = listener.accept().context("accept")?;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
        // The client ends it: closing first would cost a packet more.
        match stream.read(&mut byte) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => return Err(error.into()),
            _ => {}
        }
    }
}
