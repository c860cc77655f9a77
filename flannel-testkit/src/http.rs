//! A plain HTTP GET from inside a namespace, for health and metrics endpoints.

use crate::netns::Netns;
use anyhow::Context as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// The header lines as received.
    pub headers: String,
    pub body: String,
}

/// Asks `http://address/path` from `ns`; each step (connect, write, read) may take `timeout`.
pub fn get(
    ns: &Netns,
    address: SocketAddr,
    path: &str,
    timeout: Duration,
) -> anyhow::Result<Response> {
    let mut stream = ns
        .try_run(|| TcpStream::connect_timeout(&address, timeout))?
        .with_context(|| format!("connect to {address} from {}", ns.name()))?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    // Version 1.0, so that the body comes in one piece and ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream
        .read_to_end(&mut bytes)
        .with_context(|| format!("answer of http://{address}{path}"))?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("no HTTP answer: {text:?}"))?;
    let (line, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(Response {
        status: status.with_context(|| format!("no HTTP status in {line:?}"))?,
        headers: headers.to_owned(),
        body: body.to_owned(),
    })
}
