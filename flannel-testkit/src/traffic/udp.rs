//! Datagrams there and back, compared byte for byte.

use crate::eventually::patience;
use crate::family::Family;
use crate::netns::Netns;
use anyhow::{Context as _, ensure};
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

/// How long one datagram may take in one direction.
const LIMIT: Duration = Duration::from_secs(3);

/// Sends one datagram of each size (up to 65,507 bytes) from the client to the server and back, in turn.
/// Fails on the first that is late, lost or altered in either direction.
pub fn udp_echo(
    server_ns: &Netns,
    server_ip: impl Into<IpAddr>,
    client_ns: &Netns,
    sizes: &[usize],
) -> anyhow::Result<()> {
    let server_ip = server_ip.into();
    let server = server_ns
        .try_run(|| UdpSocket::bind((server_ip, 0)))?
        .with_context(|| format!("bind {server_ip} in {}", server_ns.name()))?;
    let address = server.local_addr()?;
    let client = client_ns
        .try_run(|| {
            let client = UdpSocket::bind((Family::of(server_ip).unspecified(), 0))?;
            client.connect(address)?;
            Ok::<_, std::io::Error>(client)
        })?
        .with_context(|| format!("connect to {address} in {}", client_ns.name()))?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(patience(LIMIT)))?;
        socket.set_write_timeout(Some(patience(LIMIT)))?;
    }
    let mut buffer = vec![0; 65_536];
    for (turn, size) in sizes.iter().copied().enumerate() {
        let what = |way: &str| format!("datagram {turn} of {size} bytes, {way}");
        let there = super::pattern(turn, size);
        client.send(&there).with_context(|| what("sent"))?;
        let (len, from) = server
            .recv_from(&mut buffer)
            .with_context(|| what("at the server"))?;
        ensure!(
            buffer[..len] == there,
            "{}",
            what("altered on its way to the server")
        );
        // Another content on the way back: an echo by anything but our server would be noticed.
        let back: Vec<u8> = there.iter().map(|byte| !byte).collect();
        server
            .send_to(&back, from)
            .with_context(|| what("sent back"))?;
        let len = client
            .recv(&mut buffer)
            .with_context(|| what("back at the client"))?;
        ensure!(buffer[..len] == back, "{}", what("altered on its way back"));
    }
    Ok(())
}
