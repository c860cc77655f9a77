//! The same packets of a pod, encapsulated once by the kernel's device and once by us.

use std::{
    collections::{BTreeMap, BTreeSet},
    marker::PhantomData,
    net::{IpAddr, UdpSocket},
    ops::Range,
    time::Duration,
};

use flannel_testkit::{
    Capture, Direction, Family, RawSocket,
    capture::tshark_malformed_and,
    eventually,
    packet::{Header as _, Inner, L4, Vxlan},
    traffic::ping_once,
};

use super::packets::{Key, Macs, Samples};
use crate::{rig::Rig, wire_rig::mac_of};

/// Packets sent before the lab is given time to carry them: less than a queue holds.
const BATCH: usize = 100;
const LIMIT: Duration = Duration::from_secs(3);
/// Payload by which the datagram of the node itself is known.
const FROM_HOST: &[u8] = b"from the node's own socket";
/// For `tshark`: what may be malformed is not. Pods may send UDP without the checksum that IPv6 wants; it travels as it is.
const TO_BE_RIGHT: &str = "!udp.checksum.zero";

/// What a node put on the wire for the packets of [`Samples::packets`].
pub(crate) struct Sent<A> {
    family: PhantomData<A>,
    frames: BTreeMap<Key, Vec<u8>>,
    /// UDP source port for a flow of a socket on the node, which has a hash of its own.
    host_port: u16,
}

/// Sends the packets from the first pod of the node to `dst`, each as often as said, and collects what the node makes of the last of each.
///
/// A batch comes again at once: what the stack has been seen to pass is forgotten after seconds, and not every machine sends all in that
/// time.
pub(crate) fn send_all<A: Samples>(
    rig: &Rig,
    node: usize,
    [src, dst]: [A; 2],
    host: &UdpSocket,
    times: usize,
) -> Sent<A> {
    let pod = rig.pod(node);
    let macs = Macs {
        pod: pod.mac,
        gateway: mac_of(rig.ns(node), "cni0"),
    };
    let frames = A::packets(macs, src, dst);
    let to: IpAddr = dst.into();
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
            ping_once(&pod.ns, to, LIMIT)
        });
    }
    host.send(FROM_HOST).expect("send from the node");
    eventually(LIMIT, "the node's own packet is through", || {
        ping_once(rig.ns(node), to, LIMIT)
    });
    let wire = wire.stop().expect("the capture");
    assert_eq!(wire.dropped, 0, "the capture is not complete");
    let malformed = tshark_malformed_and(&wire.path(), TO_BE_RIGHT).expect("tshark");
    assert_eq!(malformed, Vec::<String>::new());

    let wanted: BTreeSet<Key> = frames.iter().map(|frame| A::key(frame)).collect();
    assert_eq!(wanted.len(), frames.len(), "two packets have the same key");
    let mut sent = Sent {
        family: PhantomData,
        frames: BTreeMap::new(),
        host_port: 0,
    };
    let mut seen: BTreeMap<Key, usize> = BTreeMap::new();
    for packet in &wire.packets {
        let frame = parse::<A>(&packet.data);
        if packet.data.ends_with(FROM_HOST) {
            sent.host_port = frame.src_port;
        }
        let from_pod = frame
            .parse_inner()
            .is_ok_and(|inner| inner.ip.source() == src);
        let key = A::key(&frame.inner);
        // The pings of this function have numbers of the kernel's.
        if from_pod && wanted.contains(&key) && !is_ping::<A>(&frame.inner) {
            sent.frames.insert(key, packet.data.clone());
            *seen.entry(key).or_default() += 1;
        }
    }
    // Those whose time to live was over, and nothing else, did not come out.
    assert_eq!(sent.frames.len(), frames.len() - 2, "{}", A::FAMILY);
    for (key, count) in seen {
        assert_eq!(count, times, "frames for {key:?}");
    }
    sent
}

/// Whether a frame holds an echo request with a payload of 56 bytes and an identifier other than that of [`Samples::packets`].
fn is_ping<A: Samples>(frame: &[u8]) -> bool {
    Inner::<A>::read(frame).is_ok_and(|inner| matches!(inner.l4, L4::Echo { id, .. } if id != 7))
}

impl<A: Samples> Sent<A> {
    /// These frames are ours, `kernel`'s are the kernel's, and they differ only where they may.
    pub(crate) fn assert_equals_kernel(&self, kernel: &Sent<A>, ports: &Range<u16>) {
        let keys = |sent: &Sent<A>| -> Vec<Key> { sent.frames.keys().copied().collect() };
        assert_eq!(keys(self), keys(kernel));
        let mut ids = BTreeSet::new();
        for (key, ours) in &self.frames {
            let theirs = &kernel.frames[key];
            assert_eq!(
                masked::<A>(ours),
                masked::<A>(theirs),
                "{key:?}\nours   {ours:02x?}\nkernel {theirs:02x?}"
            );
            let (ours, theirs) = (parse::<A>(ours), parse::<A>(theirs));
            A::check_checksums(&ours, &theirs);
            assert!(
                ports.contains(&ours.src_port),
                "source port {}",
                ours.src_port
            );
            ids.extend(A::id(&ours.ip));
        }
        // IPv6 has none.
        let enough = A::FAMILY == Family::V6 || ids.len() > self.frames.len() / 2;
        assert!(enough, "{} identifications", ids.len());
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
            .map(|frame| parse::<A>(frame).src_port)
            .collect();
        ports.len()
    }
}

fn parse<A: Samples>(frame: &[u8]) -> Vxlan<A> {
    Vxlan::read(frame).expect("a VXLAN frame")
}

/// The frame with zeros where the two data paths may differ.
fn masked<A: Samples>(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for range in A::MAY_DIFFER {
        frame[range.clone()].fill(0);
    }
    frame
}
