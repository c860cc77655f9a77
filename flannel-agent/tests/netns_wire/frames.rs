//! The same packets of a pod, encapsulated once by the kernel's device and once by us.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, UdpSocket},
    ops::Range,
    time::Duration,
};

use flannel_testkit::{
    Capture, Direction, Pod, RawSocket, eventually,
    packet::{Csum, Inner, Ipv4, L4, Vxlan, fragment},
    traffic::ping_once,
};

use crate::{
    rig::Rig,
    wire_rig::{POD_MTU, mac_of},
};

/// Packets sent before the lab is given time to carry them: less than a queue holds.
const BATCH: usize = 100;
const LIMIT: Duration = Duration::from_secs(3);
/// Payload by which the datagram of the node itself is known.
const FROM_HOST: &[u8] = b"from the node's own socket";

/// Outer IP identification and header checksum, and the UDP checksum: what may differ.
const MAY_DIFFER: [Range<usize>; 3] = [18..20, 24..26, 40..42];

/// Identification and fragment offset of the inner packet, which no two packets share.
type Key = (u16, u16);

/// What a node put on the wire for the packets of [`packets`].
pub(crate) struct Sent {
    frames: BTreeMap<Key, Vec<u8>>,
    /// UDP source port for a flow of a socket on the node, which has a hash of its own.
    host_port: u16,
}

/// Every length from 1 byte to a full tunnel, every TOS, times to live, fragments, all kinds of protocols.
fn packets(pod: &Pod, gateway_mac: [u8; 6], dst: Ipv4Addr) -> Vec<Vec<u8>> {
    let udp = |port: u16, len: usize| {
        let data: Vec<u8> = (0..len).map(|at| (at * 7 + len) as u8).collect();
        let mut inner = Inner::udp(pod.ip, dst, 9, &data);
        if let L4::Udp { src_port, .. } = &mut inner.l4 {
            *src_port = port;
        }
        inner
    };
    let raw = |protocol: u8, data: &[u8]| {
        let data = data.to_vec();
        Inner::new(pod.ip, dst, L4::Raw { protocol, data })
    };
    let with_ip = |mut inner: Inner, change: &dyn Fn(&mut Ipv4)| {
        change(&mut inner.ip);
        inner
    };
    let mut all: Vec<Inner> = (1..=1_422)
        .map(|len| udp(10_000 + len as u16, len))
        .collect();
    all.extend((0..=255).map(|tos| with_ip(udp(2_000, 40), &|ip| ip.tos = tos)));
    for ttl in [0, 1, 2, 3, 63, 65, 128, 254, 255] {
        all.push(with_ip(udp(2_001, 40), &|ip| ip.ttl = ttl));
    }
    for dont_fragment in [false, true] {
        all.push(with_ip(udp(2_002, 1_422), &|ip| {
            ip.dont_fragment = dont_fragment;
        }));
    }
    for csum in [Csum::Zero, Csum::Wrong] {
        let mut inner = udp(2_003, 40);
        if let L4::Udp { csum: field, .. } = &mut inner.l4 {
            *field = csum;
        }
        all.push(inner);
    }
    for options in [
        &[1, 1, 1, 0][..],
        &[148, 4, 0, 0],
        &[7, 7, 4, 0, 0, 0, 0, 0],
    ] {
        all.push(with_ip(udp(2_004, 40), &|ip| ip.options = options.to_vec()));
    }
    for len in [0, 1, 56, 1_000, 1_422] {
        all.push(Inner::echo(pod.ip, dst, 7, len as u16, &vec![0x5a; len]));
    }
    for flags in [0x02, 0x10, 0x18, 0x11, 0x04, 0xc2] {
        let mut inner = Inner::tcp(pod.ip, dst, 9, b"some data");
        if let L4::Tcp {
            flags: field,
            options,
            ..
        } = &mut inner.l4
        {
            *field = flags;
            *options = vec![2, 4, 5, 0xb4, 1, 1, 4, 2];
        }
        all.push(inner);
    }
    // An ICMP error, and protocols that nobody knows, one of them empty.
    all.push(raw(1, &[3, 1, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 20]));
    all.push(raw(253, &[0x45; 48]));
    all.push(raw(254, &[]));
    for (id, inner) in (1..).zip(&mut all) {
        inner.ip.id = id;
    }
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut in_pieces = |len: usize, mtu: u32| {
        let mut inner = udp(2_005, len).with_macs(pod.mac, gateway_mac);
        inner.ip.id = 50_000 + frames.len() as u16;
        frames.extend(fragment(&inner.bytes(), mtu as usize).expect("fragments"));
    };
    in_pieces(1_423, POD_MTU);
    in_pieces(60_000, POD_MTU);
    in_pieces(100, 44);
    let whole = all
        .into_iter()
        .map(|inner| inner.with_macs(pod.mac, gateway_mac).bytes());
    frames.extend(whole);
    frames
}

/// Sends the packets from the first pod of the node to `dst`, each as often as said, and collects what the node makes of the last of each.
///
/// A batch comes again at once: what the stack has been seen to pass is forgotten after seconds, and not every machine sends all in that
/// time.
pub(crate) fn send_all(
    rig: &Rig,
    node: usize,
    dst: Ipv4Addr,
    host: &UdpSocket,
    times: usize,
) -> Sent {
    let pod = rig.pod(node);
    let frames = packets(pod, mac_of(rig.ns(node), "cni0"), dst);
    let socket = RawSocket::open(&pod.ns, "eth0").expect("a raw socket in the pod");
    let wire = Capture::start_directed(
        rig.lab().underlay(),
        &rig.node(node).port,
        "udp port 8472",
        Direction::In,
    )
    .expect("a capture of the wire");
    let batches = frames.chunks(BATCH);
    for batch in batches.flat_map(|batch| std::iter::repeat_n(batch, times)) {
        for frame in batch {
            socket.send(frame).expect("send from the pod");
        }
        eventually(LIMIT, "the batch is through", || {
            ping_once(&pod.ns, dst, LIMIT)
        });
    }
    host.send(FROM_HOST).expect("send from the node");
    eventually(LIMIT, "the node's own packet is through", || {
        ping_once(rig.ns(node), dst, LIMIT)
    });
    let wire = wire.stop().expect("the capture");
    assert_eq!(wire.dropped, 0, "the capture is not complete");
    assert_eq!(wire.malformed().expect("tshark"), Vec::<String>::new());

    let wanted: BTreeSet<Key> = frames.iter().map(|frame| key(frame)).collect();
    assert_eq!(wanted.len(), frames.len(), "two packets have the same key");
    let mut sent = Sent {
        frames: BTreeMap::new(),
        host_port: 0,
    };
    let mut seen: BTreeMap<Key, usize> = BTreeMap::new();
    for packet in &wire.packets {
        let frame = Vxlan::parse(&packet.data).expect("a VXLAN frame");
        if packet.data.ends_with(FROM_HOST) {
            sent.host_port = frame.src_port;
        }
        let from_pod = frame
            .parse_inner()
            .is_ok_and(|inner| inner.ip.src == pod.ip);
        let key = key(&frame.inner);
        // The pings of this function have numbers of the kernel's.
        if from_pod && wanted.contains(&key) && !is_ping(&frame.inner) {
            sent.frames.insert(key, packet.data.clone());
            *seen.entry(key).or_default() += 1;
        }
    }
    // Those whose time to live was over, and nothing else, did not come out.
    assert_eq!(sent.frames.len(), frames.len() - 2);
    for (key, count) in seen {
        assert_eq!(count, times, "frames for {key:?}");
    }
    sent
}

fn key(frame: &[u8]) -> Key {
    let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    (word(18), word(20) & 0x1fff)
}

/// Whether a frame holds an echo request with a payload of 56 bytes and an identifier other than that of [`packets`].
fn is_ping(frame: &[u8]) -> bool {
    Inner::parse(frame).is_ok_and(|inner| matches!(inner.l4, L4::Echo { id, .. } if id != 7))
}

impl Sent {
    /// These frames are ours, `kernel`'s are the kernel's, and they differ only where they may.
    pub(crate) fn assert_equals_kernel(&self, kernel: &Sent, ports: &Range<u16>) {
        let keys = |sent: &Sent| -> Vec<Key> { sent.frames.keys().copied().collect() };
        assert_eq!(keys(self), keys(kernel));
        let mut ids = BTreeSet::new();
        for (key, ours) in &self.frames {
            let theirs = &kernel.frames[key];
            assert_eq!(
                masked(ours),
                masked(theirs),
                "{key:?}\nours   {ours:02x?}\nkernel {theirs:02x?}"
            );
            let (ours, theirs) = (parse(ours), parse(theirs));
            assert_eq!(
                (ours.ip.csum, ours.udp_csum),
                (Csum::Right, Csum::Zero),
                "{key:?}"
            );
            assert_eq!(
                (theirs.ip.csum, theirs.udp_csum),
                (Csum::Right, Csum::Right),
                "{key:?}"
            );
            assert!(
                ports.contains(&ours.src_port),
                "source port {}",
                ours.src_port
            );
            ids.insert(ours.ip.id);
        }
        assert!(
            ids.len() > self.frames.len() / 2,
            "{} identifications",
            ids.len()
        );
        assert_eq!(
            self.host_port, kernel.host_port,
            "source port of the node's own flow"
        );
        assert!(ports.contains(&self.host_port));
    }

    /// Number of frames.
    pub(crate) fn len(&self) -> u64 {
        self.frames.len() as u64
    }

    /// Flows spread over the source ports.
    pub(crate) fn source_ports(&self) -> usize {
        let ports: BTreeSet<u16> = self
            .frames
            .values()
            .map(|frame| parse(frame).src_port)
            .collect();
        ports.len()
    }
}

fn parse(frame: &[u8]) -> Vxlan {
    Vxlan::parse(frame).expect("a VXLAN frame")
}

/// The frame with zeros where the two data paths may differ.
fn masked(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for range in MAY_DIFFER {
        frame[range].fill(0);
    }
    frame
}
