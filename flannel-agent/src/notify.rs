//! What systemd hears: READY once, STATUS whenever it changes, WATCHDOG while the loop turns, STOPPING.
//!
//! Without `NOTIFY_SOCKET` nothing happens. A service manager that does not listen is no reason to fail.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    health::{Board, Lacking, Part, Pulse},
    telemetry::one_line,
};

/// The loop turns once a second when nothing happens: so much silence says nothing, however short systemd's patience is.
const LEAST_SILENCE: Duration = Duration::from_secs(3);

/// The service manager's socket.
#[derive(Debug)]
pub(crate) struct Notifier {
    socket: Option<UnixDatagram>,
}

impl Notifier {
    /// Connects to the socket that the environment names.
    pub(crate) fn from_env() -> Self {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let socket = name.and_then(|name| match connect(&name) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(socket = %name.display(), %error, "connect to the socket of the service manager");
                None
            }
        });
        Self { socket }
    }

    /// Sends assignments, such as `READY=1`, separated by line ends.
    pub(crate) fn send(&self, text: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(text.as_bytes()) {
            tracing::warn!(%error, text, "tell the service manager");
        }
    }
}

/// Keeps systemd informed until cancelled.
pub(crate) fn attend(
    board: &Board,
    pulse: Pulse,
    cancel: CancellationToken,
) -> impl Future<Output = ()> + Send + use<> {
    let notifier = Notifier::from_env();
    let mut lacking = board.watch();
    let mut summary = board.watch_summary();
    async move {
        let patience = watchdog();
        let mut feed = interval(patience.map_or(Duration::from_hours(1), |patience| patience / 2));
        feed.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = String::new();
        let mut ready = false;
        loop {
            let status = status(&lacking.borrow_and_update(), &summary.borrow_and_update());
            // As upstream: what depends on flannel needs `subnet.env`, and waits for nothing else. A node without iptables, say, is told
            // of in STATUS and not kept from starting.
            if !ready && !lacking.borrow().contains_key(&Part::SubnetFile) {
                ready = true;
                // In one datagram: whoever waits for us to be ready asks for the status next.
                notifier.send(&format!("READY=1\nSTATUS={status}"));
                told = status;
            } else if told != status {
                notifier.send(&format!("STATUS={status}"));
                told = status;
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                // The board lives as long as the agent.
                Ok(()) = lacking.changed() => {}
                Ok(()) = summary.changed() => {}
                _ = feed.tick() => {
                    let silence = pulse.silence();
                    match patience {
                        Some(patience) if is_alive(silence, patience) => notifier.send("WATCHDOG=1"),
                        Some(_) => tracing::error!(
                            seconds = silence.as_secs(),
                            "the reconcile loop stands still: the service manager will restart the agent"
                        ),
                        None => {}
                    }
                }
            }
        }
        notifier.send("STOPPING=1\nSTATUS=stopping; the data path stays as it is");
    }
}

/// Whether a loop that has been silent for so long turned within half of what systemd allows.
fn is_alive(silence: Duration, patience: Duration) -> bool {
    silence <= (patience / 2).max(LEAST_SILENCE)
}

/// What `systemctl status` shows.
fn status(lacking: &Lacking, summary: &str) -> String {
    if lacking.is_empty() {
        return one_line(summary);
    }
    let parts: Vec<String> = lacking
        .iter()
        .map(|(part, why)| format!("{}: {}", part.as_str(), one_line(why)))
        .collect();
    format!("not ready: {}", parts.join("; "))
}

/// How long systemd waits for a sign of life, if it does for this process (`sd_watchdog_enabled(3)`).
fn watchdog() -> Option<Duration> {
    let number = |name| -> Option<u64> { std::env::var(name).ok()?.parse().ok() };
    patience(
        number("WATCHDOG_USEC"),
        number("WATCHDOG_PID"),
        std::process::id(),
    )
}

fn patience(usec: Option<u64>, pid: Option<u64>, own: u32) -> Option<Duration> {
    let for_us = pid.is_none_or(|pid| pid == u64::from(own));
    usec.filter(|usec| *usec > 1 && for_us)
        .map(Duration::from_micros)
}

/// Connects to a path, or to a name in the abstract namespace, which starts with `@` (`sd_notify(3)`).
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Part;

    #[test]
    fn a_loop_that_stands_still_is_not_fed() {
        let seconds = Duration::from_secs;
        assert!(is_alive(seconds(15), seconds(30)));
        assert!(!is_alive(seconds(16), seconds(30)));
        assert!(is_alive(LEAST_SILENCE, Duration::from_millis(10)));
        assert!(!is_alive(seconds(4), Duration::from_millis(10)));
    }

    #[test]
    fn only_a_loop_that_runs_can_be_silent() {
        let pulse = Pulse::default();
        assert_eq!(pulse.silence(), Duration::ZERO);
        pulse.clone().beat();
        assert!(pulse.silence() > Duration::ZERO);
        pulse.rest();
        assert_eq!(pulse.silence(), Duration::ZERO);
    }

    #[test]
    fn the_status_is_one_line() {
        assert_eq!(status(&Lacking::new(), "2 peers"), "2 peers");
        let lacking = Lacking::from([
            (Part::Config, "no\nkey".to_owned()),
            (Part::Lease, "not yet".to_owned()),
        ]);
        assert_eq!(
            status(&lacking, "2 peers"),
            "not ready: network-config: no\\nkey; lease: not yet"
        );
    }

    #[test]
    fn the_watchdog_is_for_this_process_or_for_nobody() {
        let second = Some(1_000_000);
        assert_eq!(patience(second, None, 7), Some(Duration::from_secs(1)));
        assert_eq!(patience(second, Some(7), 7), Some(Duration::from_secs(1)));
        assert_eq!(patience(second, Some(8), 7), None);
        assert_eq!(patience(None, Some(7), 7), None);
        assert_eq!(patience(Some(0), None, 7), None);
    }
}
