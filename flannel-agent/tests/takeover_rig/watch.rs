//! What must not notice that a node changes hands: traffic, and whoever listens to the kernel.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use flannel_testkit::{
    Pod, eventually, process,
    traffic::{FloodPing, TcpFlow, UdpFlow},
};

use super::Cluster;
use crate::rig::PATIENCE;

/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);
/// The longest time for which a TCP stream may stand still.
const STALL: Duration = Duration::from_secs(1);
/// What a stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 5_000_000;
/// Payload in bytes of a datagram that fills a packet.
const DATAGRAM: usize = 1300;

/// ICMP both ways, TCP and UDP between the pods of node 0 and node 1, over every family.
pub(crate) struct Traffic {
    pings: Vec<FloodPing>,
    tcp: Vec<TcpFlow>,
    udp: Vec<UdpFlow>,
}

impl Traffic {
    pub(crate) fn start(cluster: &Cluster) -> Traffic {
        let (a, b) = (&cluster.pods[0], &cluster.pods[1]);
        let families = cluster.families();
        let every = EVERY * u32::try_from(families.len()).expect("two");
        let mut all = Traffic {
            pings: Vec::new(),
            tcp: Vec::new(),
            udp: Vec::new(),
        };
        for family in families {
            for (from, to) in [(a, b), (b, a)] {
                let ip = to.address(family);
                all.pings
                    .push(FloodPing::start(&from.ns, ip, every).expect("ping"));
                let udp = UdpFlow::start(&to.ns, ip, &from.ns, 2 * every, DATAGRAM);
                all.udp.push(udp.expect("UDP"));
            }
            let tcp = TcpFlow::start_paced(&b.ns, b.address(family), &a.ns, RATE);
            all.tcp.push(tcp.expect("TCP"));
        }
        all
    }

    /// Nothing was lost, nothing stood still.
    #[track_caller]
    pub(crate) fn assert_untouched(self) {
        let tcp = self.tcp.into_iter();
        let tcp: Vec<_> = tcp.map(|tcp| tcp.stop().expect("the TCP stream")).collect();
        for udp in self.udp {
            let udp = udp.stop().expect("the UDP stream");
            assert!(
                udp.sent > 100 && udp.lost.is_empty() && udp.refused == 0,
                "{udp:?}"
            );
        }
        for ping in self.pings {
            let ping = ping.stop().expect("the pings");
            assert!(ping.sent > 100 && ping.lost == 0, "{ping:?}");
        }
        for tcp in tcp {
            assert!(tcp.longest_stall <= STALL, "{tcp:?}");
        }
    }
}

/// What the kernel tells of the changes to a node: nothing of the overlay may go, not even to come back.
pub(crate) struct Monitor {
    child: Child,
    file: PathBuf,
}

impl Monitor {
    pub(crate) fn start(cluster: &Cluster, node: usize) -> Monitor {
        let file = cluster.lab.node(node).run_dir.join("monitor");
        let out = File::create(&file).expect("a file");
        let child = cluster
            .ns(node)
            .command("ip")
            .args(["monitor", "link", "address", "route"])
            .stdin(Stdio::null())
            .stdout(out)
            .spawn()
            .expect("ip monitor");
        // It listens as soon as it tells of a change.
        let ns = cluster.ns(node);
        eventually(PATIENCE, "ip monitor listens", || {
            ns.ip("link set lo alias probe")
                .map_err(|error| error.to_string())?;
            let len = fs::metadata(&file).map_or(0, |meta| meta.len());
            (len > 0).then_some(()).ok_or("nothing yet".to_owned())
        });
        ns.exec(["ip", "link", "set", "lo", "alias", ""])
            .expect("take the alias away");
        Monitor { child, file }
    }

    /// The lines that tell of something removed.
    pub(crate) fn stop(mut self) -> Vec<String> {
        process::kill_and_reap(&mut self.child);
        let text = fs::read_to_string(&self.file).expect("what ip monitor said");
        text.lines()
            .filter(|line| line.starts_with("Deleted"))
            .map(str::to_owned)
            .collect()
    }
}
