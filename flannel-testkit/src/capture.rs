//! Captures that have begun when `start` returns and lack nothing when `stop` does.

use crate::eventually::try_eventually;
use crate::netns::Netns;
use crate::packet::{Address, PORT, Vxlan};
use crate::pcap::{self, Packet};
use crate::process;
use crate::state::State;
use anyhow::{Context as _, ensure};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long `tcpdump` may take to start, to catch up and to stop.
const LIMIT: Duration = Duration::from_secs(10);
/// Kernel buffer in KiB.
const BUFFER: &str = "32768";

/// The direction seen from the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    #[default]
    Both,
    In,
    Out,
}

/// A running `tcpdump`. Dropping it discards the capture.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Tcpdump,
    dir: TempDir,
    state: State,
}

/// Ends with its owner.
#[derive(Debug)]
struct Tcpdump(Child);

impl Drop for Tcpdump {
    fn drop(&mut self) {
        process::kill_and_reap(&mut self.0);
    }
}

/// A finished capture. Its file goes when it is dropped.
#[derive(Debug)]
pub struct Captured {
    pub packets: Vec<Packet>,
    /// Packets that the kernel had no room for.
    pub dropped: u64,
    dir: TempDir,
    _state: State,
}

impl Capture {
    /// Captures whole frames on `ifname` of `ns` that match a pcap `filter` (all if empty), in both directions.
    pub fn start(ns: &Netns, ifname: &str, filter: &str) -> anyhow::Result<Capture> {
        Capture::start_directed(ns, ifname, filter, Direction::Both)
    }

    /// Like [`Capture::start`] for one direction.
    pub fn start_directed(
        ns: &Netns,
        ifname: &str,
        filter: &str,
        direction: Direction,
    ) -> anyhow::Result<Capture> {
        let state = State::hold()?;
        let dir = tempfile::Builder::new()
            .prefix("capture-")
            .tempdir_in(state.make_dir("captures")?)?;
        let said = fs::File::create(dir.path().join("stderr"))?;
        let way = match direction {
            Direction::Both => "inout",
            Direction::In => "in",
            Direction::Out => "out",
        };
        // -p: promiscuous mode would change the flags of a device under test. -Z root: as another user
        // it could not write into our directory.
        let child = ns
            .command("tcpdump")
            .args([
                "-n",
                "-p",
                "-U",
                "--immediate-mode",
                "-s",
                "0",
                "-Z",
                "root",
            ])
            .args(["-B", BUFFER, "-Q", way, "-i", ifname, "-w"])
            .arg(file_in(dir.path()))
            .args((!filter.is_empty()).then_some(filter))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn()
            .context("run tcpdump")?;
        let tcpdump = Tcpdump(child);
        let mut capture = Capture {
            tcpdump,
            dir,
            state,
        };
        capture
            .wait_for(|said| said.contains("listening on").then_some(()))
            .with_context(|| format!("capture on {ifname} in {}", ns.name()))?;
        Ok(capture)
    }

    /// Stops when everything that passed before the call has been written, and reads it.
    pub fn stop(mut self) -> anyhow::Result<Captured> {
        // SIGINT discards what tcpdump has not read yet. So it is asked with SIGUSR1 for its counts: done is when it
        // has written what the kernel has seen. That may be more than it keeps (it filters by direction itself), so
        // it also counts when it waits for packets and has written nothing more since the last look.
        let (seen, _) = self.counts()?;
        let mut last = None;
        try_eventually(LIMIT, "tcpdump catches up", || {
            let (_, written) = self.counts()?;
            let settled = last.replace(written) == Some(written) && self.is_waiting()?;
            ensure!(
                written >= seen || settled,
                "{written} of {seen} packets written"
            );
            Ok(())
        })?;
        process::signal(&self.tcpdump.0, libc::SIGINT)?;
        let ended = process::wait_timeout(&mut self.tcpdump.0, LIMIT)?;
        ensure!(ended.is_some(), "tcpdump does not stop");
        let said = self.said()?;
        let file = fs::read(file_in(self.dir.path()))?;
        Ok(Captured {
            packets: pcap::parse(&file)?,
            dropped: count_before(&said, " dropped by kernel").unwrap_or(0),
            dir: self.dir,
            _state: self.state,
        })
    }

    /// Packets the kernel has handed over, and packets written.
    fn counts(&mut self) -> anyhow::Result<(u64, u64)> {
        let before = self.said()?.len();
        process::signal(&self.tcpdump.0, libc::SIGUSR1)?;
        self.wait_for(|said| {
            let new = said.get(before..)?;
            let seen = count_before(new, " received by filter")?;
            count_before(new, " dropped by kernel")?;
            Some((seen, count_before(new, " captured")?))
        })
    }

    /// Whether tcpdump sleeps, which in immediate mode means that it has read all there is.
    fn is_waiting(&self) -> anyhow::Result<bool> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.tcpdump.0.id()))?;
        Ok(stat.contains(") S "))
    }

    fn said(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(self.dir.path().join("stderr"))?)
    }

    fn wait_for<T>(&mut self, look: impl Fn(&str) -> Option<T>) -> anyhow::Result<T> {
        try_eventually(LIMIT, "tcpdump answers", || {
            let ended = self.tcpdump.0.try_wait()?;
            let said = self.said()?;
            look(&said).with_context(|| match ended {
                Some(status) => format!("it ended with {status}: {said}"),
                None => format!("it said {said:?}"),
            })
        })
    }
}

impl Captured {
    /// The capture file.
    pub fn path(&self) -> PathBuf {
        file_in(self.dir.path())
    }

    /// The packets to port 8472 that parse as VXLAN over IPv4.
    pub fn vxlan(&self) -> Vec<Vxlan> {
        self.vxlan_of()
    }

    /// The packets to port 8472 that parse as VXLAN over a family.
    pub fn vxlan_of<A: Address>(&self) -> Vec<Vxlan<A>> {
        let parsed = self
            .packets
            .iter()
            .filter_map(|p| Vxlan::read(&p.data).ok());
        parsed.filter(|frame| frame.dst_port == PORT).collect()
    }

    /// What `tshark` finds malformed in the capture; see [`tshark_malformed`].
    pub fn malformed(&self) -> anyhow::Result<Vec<String>> {
        tshark_malformed(&self.path())
    }
}

/// The summary lines of the packets that `tshark`, decoding port 8472 as VXLAN, finds malformed or in error.
pub fn tshark_malformed(path: &Path) -> anyhow::Result<Vec<String>> {
    tshark_malformed_and(path, "frame")
}

/// Those of them that match a display filter as well.
///
/// Payload is random, and sooner or later looks or is numbered like some protocol that it is not. Such protocols are not asked.
pub fn tshark_malformed_and(path: &Path, filter: &str) -> anyhow::Result<Vec<String>> {
    let filter = format!("(_ws.malformed || _ws.expert.severity >= error) && ({filter})");
    let mut args = Vec::new();
    loop {
        let mut words = args.clone();
        words.extend(["-T", "fields", "-e", "frame.protocols"].map(str::to_owned));
        let found = tshark(path, &words, &filter)?;
        let protocols = found.iter().flat_map(|line| line.split(':'));
        let foreign: BTreeSet<&str> = protocols.filter(|name| is_foreign(name)).collect();
        let before = args.len();
        for name in foreign {
            let option = format!("--disable-protocol={name}");
            if !args.contains(&option) {
                args.push(option);
            }
        }
        if args.len() == before {
            return tshark(path, &args, &filter);
        }
    }
}

/// Whether a name in `frame.protocols` is of none of the protocols that labs speak.
fn is_foreign(name: &str) -> bool {
    const OURS: [&str; 10] = [
        "eth",
        "ethertype",
        "arp",
        "ip",
        "icmp",
        "icmpv6",
        "udp",
        "tcp",
        "vxlan",
        "data",
    ];
    // Extension headers have names such as `ipv6.hopopts`.
    !OURS.contains(&name) && !name.starts_with("ipv6") && !name.starts_with("_ws.")
}

/// The summary lines of the packets that match a display `filter`. `args` may hold preferences, such as
/// `["-o", "udp.check_checksum:TRUE"]`, or fields, such as `["-T", "fields", "-e", "vxlan.vni"]`.
pub fn tshark(
    path: &Path,
    args: &[impl AsRef<OsStr>],
    filter: &str,
) -> anyhow::Result<Vec<String>> {
    let mut cmd = Command::new("tshark");
    cmd.args(["-n", "-d", "udp.port==8472,vxlan", "-Y", filter, "-r"]);
    let lines = process::succeed(cmd.arg(path).args(args), Duration::from_mins(2))?;
    Ok(lines.lines().map(str::to_owned).collect())
}

fn file_in(dir: &Path) -> PathBuf {
    dir.join("packets.pcap")
}

/// The number in `<number> packet(s)<what>`.
fn count_before(said: &str, what: &str) -> Option<u64> {
    let (before, _) = said.rsplit_once(what)?;
    let mut words = before.rsplit([' ', '\n']);
    words.next()?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Inner, Vxlan};
    use std::net::Ipv4Addr;

    /// A capture of these frames.
    fn capture(dir: &Path, frames: &[Vec<u8>]) -> PathBuf {
        // Magic number, version 2.4, no time zone, whole packets of Ethernet; then times, and lengths twice.
        let header = [0xa1b2_c3d4, 0x0002_0004, 0, 0, 65_535, 1_u32];
        let mut file: Vec<u8> = header.iter().flat_map(|word| word.to_be_bytes()).collect();
        for frame in frames {
            let len = u32::try_from(frame.len()).unwrap();
            file.extend([0, 0, len, len].iter().flat_map(|word| word.to_be_bytes()));
            file.extend(frame);
        }
        let path = file_in(dir);
        std::fs::write(&path, file).unwrap();
        path
    }

    #[test]
    fn payload_that_looks_like_something_is_not_malformed() {
        let [a, b] = [1, 2].map(|host| Ipv4Addr::new(10, 244, 1, host));
        // No question and no answer.
        let junk = Inner::udp(a, b, 53, &[0xff; 20]).bytes();
        let good = Vxlan::new(a, b, 1, junk).bytes();
        // The outer UDP length says more than there is.
        let mut bad = Vxlan::new(a, b, 1, Inner::udp(a, b, 9, &[0; 20]).bytes()).bytes();
        bad[14 + 20 + 4] = 0xff;
        let dir = tempfile::tempdir().unwrap();
        let path = capture(dir.path(), &[good, bad]);
        let filter = "_ws.malformed || _ws.expert.severity >= error";
        assert_eq!(tshark(&path, &[""; 0], filter).unwrap().len(), 2);
        let found = tshark_malformed(&path).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].trim_start().starts_with("2 "), "{found:?}");
        assert_eq!(tshark_malformed_and(&path, "!udp").unwrap(), [""; 0]);
    }

    #[test]
    fn counts_are_read_from_what_tcpdump_says() {
        let said = "listening on eth0\n3 packets captured\n1 packet received by filter\n0 packets dropped by kernel\n";
        assert_eq!(count_before(said, " captured"), Some(3));
        assert_eq!(count_before(said, " received by filter"), Some(1));
        assert_eq!(count_before(said, " dropped by kernel"), Some(0));
        assert_eq!(count_before("listening", " captured"), None);
    }
}
