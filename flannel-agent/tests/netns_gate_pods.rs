//! Pods that come and go, and pods that lie: never a packet to the wrong one.

mod gate_rig;
mod rig;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use flannel_testkit::{
    Family, Netns, Pod, RawSocket, eventually,
    json::link,
    packet::{Csum, L4, inner_frame},
    services::Flavour,
    traffic::{TcpPair, TcpServer, UdpEnd},
};
use gate_rig::{
    BACKEND, DNS, Extra, Gate, LEASE, Mode,
    Who::{A, A2, B},
};
use rig::PATIENCE;

/// How long a datagram may take that is asked for again and again.
const SOON: Duration = Duration::from_millis(100);

fn start(mode: Mode, flavour: Flavour, family: Family) -> Gate {
    let extra = Extra {
        family,
        ..Extra::default()
    };
    Gate::with([mode; 3], flavour, extra)
}

/// A pod is replaced by another with its address while nobody tells the gate.
fn address_reused_unnoticed(mode: Mode, flavour: Flavour, family: Family) {
    if !flannel_testkit::privileged() {
        return;
    }
    let mut gate = start(mode, flavour, family);
    gate.clear_nattuples();
    let server = gate.serve(B);
    let names = gate.udp(B, DNS);
    let mut pair = TcpPair::connect_from(gate.ns(A), 45_000, server.address, &[&server]).unwrap();
    gate.promote(&mut pair, &[0, 1]).unwrap();
    let client = gate.udp(A, 45_001);
    for _ in 0..5 {
        client.ask(names.address, &[&names], 100).unwrap();
    }
    gate.rig.kill_agent(1);
    drop((server, names));
    gate.pod(B).clone().remove().unwrap();
    // Its RST goes nowhere.
    pair.abandon().unwrap();

    let node = gate.rig.node(1);
    let pod = node.add_pod(gate.subnet(1), 2, gate.pod_mtu()).unwrap();
    pod.set_hairpin(true).unwrap();
    gate.replace(B, pod);
    let server = gate.serve(B);
    let names = gate.udp(B, DNS);
    for port in [45_000, 45_002] {
        let mut pair = TcpPair::connect_from(gate.ns(A), port, server.address, &[&server]).unwrap();
        for _ in 0..5 {
            pair.exchange(500).unwrap();
        }
        pair.close().unwrap();
    }
    // Datagrams have no SYN: they find the new pod when the stack is asked again.
    eventually(LEASE + Duration::from_secs(5), "datagrams arrive", || {
        client.take_all()?;
        names.take_all()?;
        client.ask_within(SOON, names.address, &[&names], 100)
    });
    gate.start_agent(1);
    gate.rig.wait_ready(1);
    gate.wait_gate(1);
    let mut pair = gate.connect(A, &server);
    gate.promote(&mut pair, &[0, 1]).unwrap();
    pair.close().unwrap();
    gate.assert_no_invalid("at the end");
}

#[test]
fn an_address_is_reused_unnoticed_in_established() {
    address_reused_unnoticed(Mode::Established, Flavour::Iptables, Family::V4);
}

#[test]
fn an_address_is_reused_unnoticed_in_syn() {
    address_reused_unnoticed(Mode::Syn, Flavour::Nftables, Family::V4);
}

#[test]
fn an_address_of_ipv6_is_reused_unnoticed() {
    address_reused_unnoticed(Mode::Syn, Flavour::Iptables, Family::V6);
}

/// Sends to some addresses from sockets that stay, whether or not somebody is there.
struct Knocking {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Knocking {
    fn start(from: &Netns, ip: IpAddr, to: Vec<SocketAddr>) -> Knocking {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let end = UdpEnd::bind(from, ip, 46_000).unwrap();
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                for to in &to {
                    // Nobody may be there, which an ICMP error says in answer to an earlier one.
                    if end.send(*to, 0, 64).is_ok() {
                        sent += 1;
                    }
                }
                // So as not to take the processor from those who make the pods.
                drop(end.has_some(Duration::from_millis(1)));
            }
            sent
        });
        Knocking {
            stop,
            thread: Some(thread),
        }
    }

    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Packets of IPv6 that reached a namespace and were not for it.
fn strays_v6(ns: &Netns) -> u64 {
    let text = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap());
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix("Ip6InAddrErrors"));
    value.unwrap().trim().parse().unwrap()
}

/// Packets that reached a namespace and were not for it.
fn strays(ns: &Netns, family: Family) -> u64 {
    if family == Family::V6 {
        return strays_v6(ns);
    }
    let text = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "InAddrErrors");
    let value = values.split(' ').nth(at.unwrap()).unwrap();
    value.parse().unwrap()
}

fn churn(mode: Mode, flavour: Flavour, family: Family, pods: u32) {
    if !flannel_testkit::privileged() {
        return;
    }
    let gate = start(mode, flavour, family);
    let node = gate.rig.node(1);
    let subnet = gate.subnet(1);
    let ip = |turn: u32| subnet.host(10 + turn % 4);
    let everyone = (0..4).map(|turn| SocketAddr::new(ip(turn), DNS)).collect();
    let knocking = Knocking::start(gate.ns(A), gate.ip(A), everyone);
    let client = gate.udp(A, 46_001);
    let mut live: Vec<Pod> = Vec::new();
    let before = gate.fast(0);
    for turn in 0..pods {
        if live.len() == 4 {
            let old = live.remove(0);
            assert_eq!(
                strays(&old.ns, family),
                0,
                "packets for others at {}",
                old.name
            );
            old.remove().unwrap();
        }
        let pod = node.add_pod(subnet, 10 + turn % 4, gate.pod_mtu()).unwrap();
        let address = pod.address(family);
        let server = TcpServer::listen(&pod.ns, address, BACKEND).unwrap();
        let names = UdpEnd::bind(&pod.ns, address, DNS + 1).unwrap();
        // The same tuple for every owner of the address.
        let port = 47_000 + u16::try_from(turn % 4).unwrap();
        let mut pair = TcpPair::connect_from(gate.ns(A), port, server.address, &[&server])
            .unwrap_or_else(|error| panic!("pod {turn}: {error:#}"));
        for _ in 0..4 {
            pair.exchange(200)
                .unwrap_or_else(|error| panic!("pod {turn}: {error:#}"));
        }
        eventually(LEASE, "datagrams arrive", || {
            client.take_all()?;
            names.take_all()?;
            client.ask_within(SOON, names.address, &[&names], 100)
        });
        pair.reset().unwrap();
        live.push(pod);
    }
    for pod in &live {
        assert_eq!(
            strays(&pod.ns, family),
            0,
            "packets for others at {}",
            pod.name
        );
    }
    let now = gate.fast(0);
    assert!(now.encap > before.encap, "{before:?}, then {now:?}");
    assert!(knocking.stop() > u64::from(pods));
    for pod in live {
        let ip = pod.address(family);
        pod.remove().unwrap();
        eventually(PATIENCE, "the gate forgets the pod", || {
            let known = gate.known_pods(1);
            if known.contains(&ip) {
                Err(format!("{ip} is among {known:?}"))
            } else {
                Ok(())
            }
        });
    }
    gate.assert_no_invalid("at the end");
}

#[test]
fn two_hundred_pods_share_four_addresses() {
    churn(Mode::Established, Flavour::Nftables, Family::V4, 200);
}

#[test]
fn pods_share_addresses_in_syn() {
    churn(Mode::Syn, Flavour::Iptables, Family::V4, 60);
}

#[test]
fn pods_share_addresses_of_ipv6() {
    churn(Mode::Established, Flavour::Iptables, Family::V6, 30);
}

/// The stack may carry what a pod sends in another's name; the fast path must not.
#[test]
fn a_pod_that_spoofs_is_not_carried() {
    if !flannel_testkit::privileged() {
        return;
    }
    for (mode, family) in [
        (Mode::Established, Family::V4),
        (Mode::Syn, Family::V4),
        (Mode::Established, Family::V6),
    ] {
        let gate = start(mode, Flavour::Iptables, family);
        let names = gate.udp(B, DNS);
        let near = gate.udp(A2, DNS);
        let client = gate.udp(A, 48_000);
        for _ in 0..5 {
            client.ask(names.address, &[&names], 100).unwrap();
            client.ask(near.address, &[&near], 100).unwrap();
        }
        let text = link(gate.rig.ns(0), "cni0").unwrap()["address"].clone();
        let gateway = mac(text.as_str().unwrap());
        let liar = gate.pod(A2);
        let socket = RawSocket::open(&liar.ns, "eth0").unwrap();
        let frame = |src: IpAddr, dst: SocketAddr, to: [u8; 6]| {
            let l4 = L4::Udp {
                src_port: 48_000,
                dst_port: dst.port(),
                csum: Csum::Right,
                data: vec![0; 100],
            };
            inner_frame([src, dst.ip()], [liar.mac, to], l4)
        };
        let before = gate.fast(0);
        for _ in 0..50 {
            let lie = frame(gate.ip(A), names.address, gateway);
            socket.send(&lie).unwrap();
        }
        names.take_all().unwrap();
        let now = gate.fast(0);
        assert_eq!(now.all(), before.all(), "{mode:?}: {before:?}, {now:?}");
        // The flow of the one that owns the address goes on.
        client.take_all().unwrap();
        client.ask(names.address, &[&names], 100).unwrap();
        gate.assert_no_invalid("at the end");
    }
}

fn mac(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}
