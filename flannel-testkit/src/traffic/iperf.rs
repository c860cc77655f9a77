//! `iperf3`, for numbers that others can compare.

use crate::eventually::try_eventually;
use crate::netns::Netns;
use crate::process;
use anyhow::{Context as _, ensure};
use std::fs;
use std::net::{IpAddr, TcpListener};
use std::process::Stdio;
use std::time::Duration;

/// Time beyond which a run counts as hung. `iperf3` runs 10 s unless told otherwise.
const LIMIT: Duration = Duration::from_mins(2);

/// Runs an `iperf3` server and a client with `args` (such as `["-t", "5", "-P", "2"]`) and gives the client's JSON report.
pub fn iperf3(
    server_ns: &Netns,
    server_ip: impl Into<IpAddr>,
    client_ns: &Netns,
    args: &[&str],
) -> anyhow::Result<serde_json::Value> {
    let server_ip = server_ip.into();
    let listener = server_ns.try_run(|| TcpListener::bind((server_ip, 0)))??;
    let port = listener.local_addr()?.port().to_string();
    drop(listener);
    let log = tempfile::NamedTempFile::new()?;
    let mut server = server_ns
        .command("iperf3")
        .args(["-s", "-1", "--forceflush", "-p", &port, "-B"])
        .arg(server_ip.to_string())
        .stdin(Stdio::null())
        .stdout(log.reopen()?)
        .stderr(log.reopen()?)
        .spawn()
        .context("run iperf3")?;
    let report = try_eventually(Duration::from_secs(10), "the iperf3 server listens", || {
        let said = fs::read_to_string(log.path())?;
        ensure!(said.contains("listening on"), "it said {said:?}");
        Ok(())
    })
    .and_then(|()| {
        let mut client = client_ns.command("iperf3");
        client
            .args(["-J", "-p", &port, "-c"])
            .arg(server_ip.to_string());
        process::finish(client.args(args), LIMIT)
    });
    process::kill_and_reap(&mut server);
    let report = report?;
    let json: serde_json::Value = serde_json::from_str(&report.stdout)
        .with_context(|| format!("iperf3 said {:?} {:?}", report.stdout, report.stderr))?;
    if let Some(err) = json.get("error") {
        anyhow::bail!("iperf3: {err}");
    }
    Ok(json)
}
