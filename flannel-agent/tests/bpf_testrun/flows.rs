//! Pods, packets and entries for the flow gate's tests.

use aya::maps::{HashMap, MapData, PerCpuArray};
use etherparse::{Ipv4Header, PacketBuilder};
use flannel_common::{
    Config, Counter, CounterId, PodRecord,
    flow::{ACK, FIN, Flow, FlowKey, NatKey, PROTO_TCP, RST, SYN},
};

use crate::{
    encap::check_outer,
    kernel::{
        Kernel, MTU, OUR_POD, OWN_MAC, PEER_MAC, PEER_POD, REDIRECT, Ran, UNSPEC, pin_to_cpu,
    },
};

pub(crate) const POD_MAC: [u8; 6] = [2, 0, 0, 0, 5, 5];
pub(crate) const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 6, 6];
pub(crate) const OTHER_POD: [u8; 4] = [10, 244, 1, 3];
pub(crate) const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 7, 7];
/// Packets of a run come in through the loopback, and leave through it.
pub(crate) const LOOPBACK: u32 = 1;
pub(crate) const ABSENT: u32 = 0x7fff_0000;
pub(crate) const OWN_INDEX: u32 = 1;
pub(crate) const EPOCH: u32 = 9;
pub(crate) const GENERATION: u32 = 4;
pub(crate) const CLIENT: u16 = 40_001;
pub(crate) const SERVER: u16 = 80;

/// A kernel with a pod of ours at the loopback, and another at an interface that is not there.
pub(crate) fn kernel(mode: u32) -> Kernel {
    let mut kernel = Kernel::load();
    furnish(&mut kernel, mode);
    kernel
}

/// Gives a kernel those.
pub(crate) fn furnish(kernel: &mut Kernel, mode: u32) {
    pin_to_cpu();
    let config = gated(kernel, mode);
    kernel.put_config(&config);
    put_pod(kernel, OUR_POD, LOOPBACK, POD_MAC, GENERATION);
    put_pod(kernel, OTHER_POD, ABSENT, OTHER_MAC, 1);
}

pub(crate) fn gated(kernel: &Kernel, mode: u32) -> Config {
    Config {
        mode,
        epoch: EPOCH,
        own_index: OWN_INDEX,
        lease: 5_000_000_000,
        ..kernel.config()
    }
}

pub(crate) fn put_pod(
    kernel: &mut Kernel,
    ip: [u8; 4],
    ifindex: u32,
    mac: [u8; 6],
    generation: u32,
) {
    let record = PodRecord {
        ifindex,
        generation,
        mtu: MTU,
        mac,
        gateway_mac: GATEWAY_MAC,
    };
    hash::<[u8; 4], PodRecord>(kernel, "pods")
        .insert(ip, record, 0)
        .expect("write a pod");
}

pub(crate) fn hash<'a, K: aya::Pod, V: aya::Pod>(
    kernel: &'a mut Kernel,
    name: &str,
) -> HashMap<&'a mut MapData, K, V> {
    let map = kernel.ebpf.map_mut(name).expect("a map");
    map.try_into().expect("a hash")
}

pub(crate) fn flow(kernel: &mut Kernel, key: &FlowKey) -> Option<Flow> {
    hash::<FlowKey, Flow>(kernel, "flows").get(key, 0).ok()
}

pub(crate) fn put_flow(kernel: &mut Kernel, key: &FlowKey, seen: [u64; 2]) {
    let flow = Flow {
        epoch: EPOCH,
        generation: GENERATION,
        seen,
        ..Flow::default()
    };
    hash::<FlowKey, Flow>(kernel, "flows")
        .insert(key, flow, 0)
        .expect("write a flow");
}

/// A flow between our pod and [`OTHER_POD`], both of this node, that was seen just now.
pub(crate) fn put_neighbours(kernel: &mut Kernel) {
    let neighbours = FlowKey {
        remote: OTHER_POD,
        ..key(PROTO_TCP)
    };
    let seen = Flow {
        epoch: EPOCH,
        generation: GENERATION + 1,
        seen: [now(), now()],
        ..Flow::default()
    };
    hash::<FlowKey, Flow>(kernel, "flows")
        .insert(neighbours, seen, 0)
        .expect("write a flow");
}

pub(crate) fn translated(kernel: &mut Kernel, pair: &NatKey) -> bool {
    hash::<NatKey, u32>(kernel, "nattuples")
        .get(pair, 0)
        .is_ok()
}

pub(crate) fn count(kernel: &Kernel, id: CounterId) -> u64 {
    let map = kernel.ebpf.map("counters").expect("a map");
    let map: PerCpuArray<_, Counter> = map.try_into().expect("an array");
    let values = map.get(&(id as u32), 0).expect("a counter");
    values.iter().map(|one| one.packets).sum()
}

/// Nanoseconds of the clock that the programs use.
pub(crate) fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

pub(crate) fn key(proto: u8) -> FlowKey {
    FlowKey {
        local: OUR_POD,
        remote: PEER_POD,
        local_port: CLIENT.to_be_bytes(),
        remote_port: SERVER.to_be_bytes(),
        proto,
        reserved: [0; 3],
    }
}

/// A segment with these flags between two places.
pub(crate) fn tcp(
    macs: [[u8; 6]; 2],
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
    flags: u8,
) -> Vec<u8> {
    let mut builder = PacketBuilder::ethernet2(macs[0], macs[1])
        .ipv4(from.0, to.0, 63)
        .tcp(from.1, to.1, 7, 64_000);
    if flags & SYN != 0 {
        builder = builder.syn();
    }
    if flags & ACK != 0 {
        builder = builder.ack(9);
    }
    if flags & FIN != 0 {
        builder = builder.fin();
    }
    if flags & RST != 0 {
        builder = builder.rst();
    }
    let mut frame = Vec::new();
    builder.write(&mut frame, b"data").expect("a frame");
    frame
}

pub(crate) fn udp(
    macs: [[u8; 6]; 2],
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
    len: usize,
) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs[0], macs[1])
        .ipv4(from.0, to.0, 63)
        .udp(from.1, to.1)
        .write(&mut frame, &vec![7; len])
        .expect("a frame");
    frame
}

/// As our pod sends it, and as the stack hands it to the tunnel device.
pub(crate) const SENT: [[u8; 6]; 2] = [POD_MAC, GATEWAY_MAC];
pub(crate) const ROUTED: [[u8; 6]; 2] = [OWN_MAC, PEER_MAC];
/// As the peer sends it inside, and as the stack hands it to our pod.
pub(crate) const INSIDE: [[u8; 6]; 2] = [PEER_MAC, OWN_MAC];
pub(crate) const LANDED: [[u8; 6]; 2] = [GATEWAY_MAC, POD_MAC];

pub(crate) fn out(macs: [[u8; 6]; 2], flags: u8) -> Vec<u8> {
    tcp(macs, (OUR_POD, CLIENT), (PEER_POD, SERVER), flags)
}

pub(crate) fn back(macs: [[u8; 6]; 2], flags: u8) -> Vec<u8> {
    tcp(macs, (PEER_POD, SERVER), (OUR_POD, CLIENT), flags)
}

/// Runs a program: the packet must go on as it is.
#[track_caller]
pub(crate) fn slow(kernel: &mut Kernel, program: &str, packet: &[u8]) {
    let ran = kernel.run(program, packet);
    let packet = packet.to_vec();
    assert_eq!(
        ran,
        Ran {
            verdict: UNSPEC,
            packet
        },
        "{program}"
    );
}

/// The packet one hop later, from the reference implementation.
pub(crate) fn one_hop(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let (mut ip, _) = Ipv4Header::from_slice(&frame[14..]).expect("an IPv4 header");
    ip.time_to_live -= 1;
    ip.header_checksum = ip.calc_header_checksum();
    let bytes = ip.to_bytes();
    frame[14..14 + bytes.len()].copy_from_slice(&bytes);
    frame
}

/// What our pod's frame looks like on the wire after one hop.
#[track_caller]
pub(crate) fn is_on_the_wire(ran: &Ran, sent: &[u8]) {
    assert_eq!(ran.verdict, REDIRECT);
    let mut inner = one_hop(sent);
    inner[..6].copy_from_slice(&PEER_MAC);
    inner[6..12].copy_from_slice(&OWN_MAC);
    check_outer(&ran.packet, &inner);
}

/// What a frame of the peer looks like in the pod after one hop.
#[track_caller]
pub(crate) fn is_in_the_pod(ran: &Ran, inside: &[u8]) {
    assert_eq!(ran.verdict, REDIRECT);
    let mut frame = one_hop(inside);
    frame[..6].copy_from_slice(&POD_MAC);
    frame[6..12].copy_from_slice(&GATEWAY_MAC);
    assert_eq!(ran.packet, frame);
}

/// The handshake, each packet through both hooks of its way.
pub(crate) fn connect(kernel: &mut Kernel) {
    slow(kernel, "from_pod", &out(SENT, SYN));
    kernel.run("to_overlay", &out(ROUTED, SYN));
    slow(kernel, "from_overlay", &as_host(&back(INSIDE, SYN | ACK)));
    slow(kernel, "to_pod", &back(LANDED, SYN | ACK));
    slow(kernel, "from_pod", &out(SENT, ACK));
    kernel.run("to_overlay", &out(ROUTED, ACK));
}

/// A run takes a packet for one to this host if its destination MAC is the loopback's.
pub(crate) fn as_host(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].fill(0);
    frame
}

/// An ICMP error from a place about a packet.
pub(crate) fn icmp_error(macs: [[u8; 6]; 2], from: [u8; 4], to: [u8; 4], about: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 4, 0, 0, 0, 0, 5, 0];
    body.extend(&about[14..42]);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs[0], macs[1])
        .ip(etherparse::IpHeaders::Ipv4(
            Ipv4Header::new(body.len() as u16, 63, etherparse::IpNumber::ICMP, from, to)
                .expect("a header"),
            etherparse::Ipv4Extensions::default(),
        ))
        .write(&mut frame, etherparse::IpNumber::ICMP, &body)
        .expect("a frame");
    frame
}

/// The frame with the checksum of its IPv4 header made right.
pub(crate) fn rechecked(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let (mut ip, _) = Ipv4Header::from_slice(&frame[14..]).expect("an IPv4 header");
    ip.header_checksum = ip.calc_header_checksum();
    frame[14..34].copy_from_slice(&ip.to_bytes());
    frame
}
