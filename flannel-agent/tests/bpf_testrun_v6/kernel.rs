//! The object in the kernel, with maps of its own, and one run of a program.

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, PerCpuArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use etherparse::PacketBuilder;
use flannel_agent::dataplane::bpf::{OBJECT_V6, Room, room};
use flannel_common::{
    ConfigV6, Counter, CounterId, Direction, DropReason, LAYOUT_VERSION, NodeRecordV6, OuterV6,
    PodRecord, config_flags, node_flags, reason_index,
};
use flannel_core::addr::Family;

use crate::lacking::helpers;

/// An address of a documentation network with these last two groups.
const fn address(network: u8, subnet: u8, host: u8) -> [u8; 16] {
    [
        0xfd, network, 0, 0, 0, 0, 0, subnet, 0, 0, 0, 0, 0, 0, 0, host,
    ]
}

/// Our node and its peer.
pub(crate) const LOCAL: [u8; 16] = address(0x88, 0, 0x11);
pub(crate) const REMOTE: [u8; 16] = address(0x88, 0, 0x12);
/// A pod of ours in subnet 1 and one of the peer's in subnet 2.
pub(crate) const OUR_POD: [u8; 16] = address(0x44, 1, 2);
pub(crate) const PEER_POD: [u8; 16] = address(0x44, 2, 2);
pub(crate) const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];
pub(crate) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 3, 3];
pub(crate) const HOP_MAC: [u8; 6] = [2, 0, 0, 0, 4, 4];
pub(crate) const POD_MAC: [u8; 6] = [2, 0, 0, 0, 5, 5];
pub(crate) const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 6, 6];
pub(crate) const VNI: u32 = 0x01_02_03;
pub(crate) const PORT: u16 = 8_472;
pub(crate) const MTU: u32 = 1_430;
/// Source ports.
pub(crate) const PORTS: std::ops::Range<u16> = 32_768..60_999;
/// The loopback, as whose packets the kernel runs them.
pub(crate) const LOOPBACK: u32 = 1;

/// What the programs may answer (`linux/pkt_cls.h`).
pub(crate) const UNSPEC: i32 = -1;
pub(crate) const SHOT: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

const ROOM: usize = 256;
/// Size of `struct __sk_buff`, and where `gso_size` is in it (`linux/bpf.h`).
const CONTEXT: usize = 192;
const GSO_SIZE: usize = 176;
const INGRESS_IFINDEX: usize = 36;
const SUBNETS: u32 = 256;

/// The programs, loaded, and the maps that they use.
pub(crate) struct Kernel {
    pub(crate) ebpf: Ebpf,
    room: Room,
}

/// The outcome of one run: the verdict, the packet, and what it was counted as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) verdict: i32,
    pub(crate) packet: Vec<u8>,
    pub(crate) counted: Vec<&'static str>,
}

impl Kernel {
    /// Loads the object with a peer in subnet 2 and both directions switched on.
    pub(crate) fn load() -> Kernel {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("subnets", SUBNETS)
            .override_global("KERNEL_HELPERS", &helpers(), true)
            .load(OBJECT_V6)
            .expect("load the object");
        for name in [
            "to_overlay",
            "from_wire",
            "from_pod",
            "to_pod",
            "from_overlay",
            "to_link",
        ] {
            classifier(&mut ebpf, name)
                .load()
                .expect("the verifier agrees");
        }
        let room = room(&mut ebpf, Family::V6).expect("ask the kernel about header room");
        let mut kernel = Kernel { ebpf, room };
        kernel.put_config(&kernel.config());
        kernel.put("nodes", 1, peer());
        kernel.put("subnets", 2, 1u32);
        kernel
    }

    /// A node with the kernel's device under it.
    pub(crate) fn config(&self) -> ConfigV6 {
        ConfigV6 {
            layout: LAYOUT_VERSION,
            flags: config_flags::ENCAP | config_flags::DECAP,
            network: [u64::from_be_bytes([0xfd, 0x44, 0, 0, 0, 0, 0, 0]), 0],
            network_mask: [u64::MAX << 8, 0],
            subnet_shift: 64,
            subnet_count: SUBNETS,
            tunnel_ifindex: LOOPBACK,
            tunnel_mtu: MTU,
            encap_flags: self.room.encap,
            decap_flags: self.room.decap,
            vni: (VNI << 8).to_be_bytes(),
            local: LOCAL,
            port: PORT.to_be_bytes(),
            own_mac: OWN_MAC,
            source_port_min: PORTS.start,
            source_port_span: PORTS.end - PORTS.start,
            own_index: 1,
            lease: 5_000_000_000,
            ..ConfigV6::default()
        }
    }

    pub(crate) fn put_config(&mut self, config: &ConfigV6) {
        self.put("config", 0, *config);
    }

    /// The peer, changed.
    pub(crate) fn put_node(&mut self, node: &NodeRecordV6) {
        self.put("nodes", 1, *node);
    }

    /// Our pod, behind the loopback.
    pub(crate) fn put_pod(&mut self) {
        let map = self.ebpf.map_mut("pods").expect("a map");
        let mut map: HashMap<_, [u8; 16], PodRecord> = map.try_into().expect("a hash");
        let record = PodRecord {
            ifindex: LOOPBACK,
            generation: 7,
            mtu: MTU,
            mac: POD_MAC,
            gateway_mac: BRIDGE_MAC,
        };
        map.insert(OUR_POD, record, 0).expect("write an entry");
    }

    fn put<V: aya::Pod>(&mut self, map: &str, index: u32, value: V) {
        let map = self.ebpf.map_mut(map).expect("a map");
        let mut map: Array<_, V> = map.try_into().expect("an array");
        map.set(index, value, 0).expect("write an entry");
    }

    pub(crate) fn run(&mut self, name: &str, packet: &[u8]) -> Ran {
        self.run_as(name, packet, 0)
    }

    /// Runs a program on a super-packet with segments of `gso_size` bytes, or on a plain packet if that is zero.
    pub(crate) fn run_as(&mut self, name: &str, packet: &[u8], gso_size: u32) -> Ran {
        self.run_with(name, packet, GSO_SIZE, gso_size)
    }

    /// Runs a program on a packet that comes in through the interface. Linux 5.10 cannot.
    pub(crate) fn run_incoming(&mut self, name: &str, packet: &[u8]) -> Ran {
        self.run_with(name, packet, INGRESS_IFINDEX, LOOPBACK)
    }

    /// Runs a program with one field of the context set, unless to zero.
    fn run_with(&mut self, name: &str, packet: &[u8], field: usize, value: u32) -> Ran {
        let before = self.counts();
        let mut context = [0; CONTEXT];
        context[field..field + 4].copy_from_slice(&value.to_ne_bytes());
        let mut out = vec![0; packet.len() + ROOM];
        let result = classifier(&mut self.ebpf, name)
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: (value != 0).then_some(&context),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|error| panic!("run {name} on {} bytes: {error}", packet.len()));
        out.truncate(result.data_size_out as usize);
        let after = self.counts();
        let counted = after.iter().zip(before).filter(|(a, b)| a.1 != b.1);
        Ran {
            verdict: result.return_value.cast_signed(),
            packet: out,
            counted: counted.map(|(a, _)| a.0).collect(),
        }
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        let counters = self.ebpf.map("counters").expect("a map");
        let counters: PerCpuArray<_, Counter> = counters.try_into().expect("an array");
        let reasons = self.ebpf.map("reasons").expect("a map");
        let reasons: PerCpuArray<_, u64> = reasons.try_into().expect("an array");
        let carried = [
            (CounterId::BpfEncap, "encap"),
            (CounterId::BpfDecap, "decap"),
            (CounterId::FastEncap, "fast_encap"),
            (CounterId::FastDecap, "fast_decap"),
            (CounterId::FastRoutedOut, "routed_out"),
            (CounterId::FastRoutedIn, "routed_in"),
            (CounterId::GateTagged, "tagged"),
            (CounterId::GateConfirmed, "confirmed"),
            (CounterId::GateRefuted, "refuted"),
            (CounterId::GateAdmitted, "admitted"),
        ]
        .map(|(id, label)| {
            let all = counters.get(&(id as u32), 0).expect("a counter");
            (label, all.iter().map(|one| one.packets).sum())
        });
        let left = [Direction::Encap, Direction::Decap]
            .into_iter()
            .flat_map(|way| DropReason::ALL.iter().map(move |reason| (way, *reason)))
            .map(|(way, reason)| {
                let all = reasons
                    .get(&reason_index(way, reason), 0)
                    .expect("a counter");
                (reason.as_str(), all.iter().sum())
            });
        carried.into_iter().chain(left).collect()
    }
}

/// The peer, with everything known about it.
pub(crate) fn peer() -> NodeRecordV6 {
    let outer = OuterV6 {
        next_hop_mac: HOP_MAC,
        uplink_mac: UPLINK_MAC,
        local: LOCAL,
        remote: REMOTE,
        port: PORT,
        vni: VNI,
        peer_mac: PEER_MAC,
        own_mac: OWN_MAC,
    };
    let (header, udp_sum) = outer.build();
    NodeRecordV6 {
        header,
        ifindex: LOOPBACK,
        flags: node_flags::VALID | node_flags::NEXT_HOP,
        path_mtu: MTU + 70,
        udp_sum,
        reserved: 0,
    }
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    let program = ebpf.program_mut(name).expect("a program of the object");
    program.try_into().expect("a tc program")
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Udp,
    Tcp,
    Echo,
}

pub(crate) const KINDS: [Kind; 3] = [Kind::Udp, Kind::Tcp, Kind::Echo];

/// A frame with these MAC addresses (source first) between two pods.
pub(crate) fn frame(
    kind: Kind,
    macs: ([u8; 6], [u8; 6]),
    from: [u8; 16],
    to: [u8; 16],
    len: usize,
) -> Vec<u8> {
    let payload: Vec<u8> = (0..len).map(|at| at as u8).collect();
    let start = PacketBuilder::ethernet2(macs.0, macs.1).ipv6(from, to, 63);
    let mut frame = Vec::new();
    match kind {
        Kind::Udp => start.udp(1_000, 2_000).write(&mut frame, &payload),
        Kind::Tcp => start
            .tcp(1_000, 2_000, 5, 100)
            .ack(9)
            .write(&mut frame, &payload),
        Kind::Echo => start.icmpv6_echo_request(3, 4).write(&mut frame, &payload),
    }
    .expect("a frame");
    frame
}

/// Keeps this thread on one CPU: what the programs remember there, a later run finds.
pub(crate) fn pin_to_cpu() {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0).expect("a CPU");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).expect("stay on a CPU");
}
