//! The object in the kernel, with maps of its own, and one run of a program.

use std::collections::BTreeMap;

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, PerCpuArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use flannel_agent::dataplane::bpf::{OBJECT, room};
use flannel_common::{
    Config, Counter, CounterId, Direction, DropReason, LAYOUT_VERSION, NodeRecord, OuterV4,
    config_flags, node_flags, reason_index,
};
use flannel_core::addr::Family;

use crate::lacking::helpers;

/// Our node and its peer.
pub(crate) const LOCAL: [u8; 4] = [192, 168, 77, 11];
pub(crate) const REMOTE: [u8; 4] = [192, 168, 77, 12];
pub(crate) const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(crate) const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];
pub(crate) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 3, 3];
pub(crate) const HOP_MAC: [u8; 6] = [2, 0, 0, 0, 4, 4];
pub(crate) const VNI: u32 = 0x01_02_03;
pub(crate) const PORT: u16 = 8_472;
pub(crate) const MTU: u32 = 1_450;
/// A pod of ours in subnet 1 and one of the peer's in subnet 2.
pub(crate) const OUR_POD: [u8; 4] = [10, 244, 1, 2];
pub(crate) const PEER_POD: [u8; 4] = [10, 244, 2, 2];
/// Source ports.
pub(crate) const PORTS: std::ops::Range<u16> = 32_768..60_999;

/// What the programs may answer (`linux/pkt_cls.h`).
pub(crate) const UNSPEC: i32 = -1;
pub(crate) const SHOT: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

/// Bytes that a program may add to a packet.
const ROOM: usize = 256;
/// Size of `struct __sk_buff`, and where `gso_size` is in it (`linux/bpf.h`).
const CONTEXT: usize = 192;
const GSO_SIZE: usize = 176;

/// The programs, loaded, and the maps that they use.
pub(crate) struct Kernel {
    pub(crate) ebpf: Ebpf,
    room: flannel_agent::dataplane::bpf::Room,
}

/// The outcome of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) verdict: i32,
    pub(crate) packet: Vec<u8>,
}

/// What the counters say: packets carried by direction, and left alone by direction and reason. Zeros are left out.
pub(crate) type Counts = BTreeMap<(Direction, &'static str), u64>;

/// The label of packets that were carried.
pub(crate) const CARRIED: &str = "carried";

/// Room for nodes and subnets in the maps.
pub(crate) const NODES: u32 = 8;
pub(crate) const SUBNETS: u32 = 256;

impl Kernel {
    /// Loads the object with a peer in subnet 2 and both directions switched on.
    pub(crate) fn load() -> Kernel {
        Kernel::load_object(OBJECT)
    }

    /// The same with another object.
    pub(crate) fn load_object(object: &[u8]) -> Kernel {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("nodes", NODES)
            .map_max_entries("subnets", SUBNETS)
            .override_global("KERNEL_HELPERS", &helpers(), true)
            .load(object)
            .expect("load the object");
        for name in [
            "to_overlay",
            "from_wire",
            "from_pod",
            "to_pod",
            "from_overlay",
            "to_link",
        ] {
            program(&mut ebpf, name)
                .load()
                .expect("the verifier agrees");
        }
        // Of the object as it is: one whose helpers fail gives no answer.
        let mut whole = Ebpf::load(OBJECT).expect("load the object");
        let room = room(&mut whole, Family::V4).expect("ask the kernel about header room");
        let mut kernel = Kernel { ebpf, room };
        kernel.put_config(&kernel.config());
        kernel.put_node(1, &peer());
        kernel.put_subnet(2, 1);
        kernel
    }

    /// A node with the kernel's device under it.
    pub(crate) fn config(&self) -> Config {
        Config {
            layout: LAYOUT_VERSION,
            flags: config_flags::ENCAP | config_flags::DECAP,
            network: u32::from_be_bytes([10, 244, 0, 0]),
            subnet_shift: 8,
            subnet_count: SUBNETS,
            // The loopback exists in every namespace; a run redirects to nobody.
            tunnel_ifindex: 1,
            tunnel_mtu: MTU,
            encap_flags: self.room.encap,
            decap_flags: self.room.decap,
            vni: (VNI << 8).to_be_bytes(),
            local: LOCAL,
            port: PORT.to_be_bytes(),
            own_mac: OWN_MAC,
            source_port_min: PORTS.start,
            source_port_span: PORTS.end - PORTS.start,
            ..Config::default()
        }
    }

    /// The same without the kernel's device.
    pub(crate) fn config_alone(&self) -> Config {
        let mut config = self.config();
        config.flags |= config_flags::ALONE | config_flags::DECAP_GSO;
        config
    }

    pub(crate) fn put_config(&mut self, config: &Config) {
        self.put("config", 0, *config);
    }

    pub(crate) fn put_node(&mut self, id: u32, node: &NodeRecord) {
        self.put("nodes", id, *node);
    }

    pub(crate) fn put_subnet(&mut self, index: u32, id: u32) {
        self.put("subnets", index, id);
    }

    fn put<V: aya::Pod>(&mut self, map: &str, index: u32, value: V) {
        let map = self.ebpf.map_mut(map).expect("a map");
        let mut map: Array<_, V> = map.try_into().expect("an array");
        map.set(index, value, 0).expect("write an entry");
    }

    /// Runs `to_overlay` or `from_wire`.
    pub(crate) fn run(&mut self, name: &str, packet: &[u8]) -> Ran {
        self.run_as(name, packet, 0)
    }

    /// Runs a program on a super-packet with segments of `gso_size` bytes, or on a plain packet if that is zero.
    ///
    /// The kernel makes the packet one that arrived on the loopback: it is for this host if its destination MAC is that
    /// of the loopback, which is all zeros.
    pub(crate) fn run_as(&mut self, name: &str, packet: &[u8], gso_size: u32) -> Ran {
        let mut context = [0; CONTEXT];
        context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&gso_size.to_ne_bytes());
        let mut out = vec![0; packet.len() + ROOM];
        let result = program(&mut self.ebpf, name)
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: (gso_size != 0).then_some(&context),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|error| panic!("run {name} on {packet:02x?}: {error}"));
        out.truncate(result.data_size_out as usize);
        Ran {
            verdict: result.return_value.cast_signed(),
            packet: out,
        }
    }

    /// The counters.
    pub(crate) fn counts(&self) -> Counts {
        let counters = self.ebpf.map("counters").expect("a map");
        let counters: PerCpuArray<_, Counter> = counters.try_into().expect("an array");
        let reasons = self.ebpf.map("reasons").expect("a map");
        let reasons: PerCpuArray<_, u64> = reasons.try_into().expect("an array");
        let mut counts = Counts::new();
        for (direction, id) in [
            (Direction::Encap, CounterId::BpfEncap),
            (Direction::Decap, CounterId::BpfDecap),
        ] {
            let carried = counters.get(&(id as u32), 0).expect("a counter");
            counts.insert(
                (direction, CARRIED),
                carried.iter().map(|one| one.packets).sum(),
            );
            for reason in DropReason::ALL {
                let index = reason_index(direction, *reason);
                let left = reasons.get(&index, 0).expect("a counter");
                counts.insert((direction, reason.as_str()), left.iter().sum());
            }
        }
        counts.retain(|_, packets| *packets > 0);
        counts
    }

    /// Runs a program and gives the outcome and what it was counted as, if anything.
    pub(crate) fn run_counted(
        &mut self,
        name: &str,
        packet: &[u8],
        gso_size: u32,
    ) -> (Ran, Option<&'static str>) {
        let before = self.counts();
        let ran = self.run_as(name, packet, gso_size);
        let changed: Vec<_> = self
            .counts()
            .into_iter()
            .filter(|(what, packets)| before.get(what) != Some(packets))
            .map(|(what, packets)| (what, packets - before.get(&what).unwrap_or(&0)))
            .collect();
        let direction = if name == "to_overlay" {
            Direction::Encap
        } else {
            Direction::Decap
        };
        match changed[..] {
            [] => (ran, None),
            [((way, label), 1)] if way == direction => (ran, Some(label)),
            _ => panic!("{name} counted one packet as {changed:?}"),
        }
    }
}

/// The shortest packet that the kernel runs a program on: an Ethernet header, and the IP header that it announces.
pub(crate) fn shortest(packet: &[u8]) -> usize {
    match packet.get(12..14) {
        Some([0x08, 0x00]) => 34,
        Some([0x86, 0xdd]) => 54,
        _ => 14,
    }
}

/// The peer, with everything known about it.
pub(crate) fn peer() -> NodeRecord {
    let outer = OuterV4 {
        next_hop_mac: HOP_MAC,
        uplink_mac: UPLINK_MAC,
        local: LOCAL,
        remote: REMOTE,
        port: PORT,
        vni: VNI,
        peer_mac: PEER_MAC,
        own_mac: OWN_MAC,
    };
    let (header, ip_sum) = outer.build();
    NodeRecord {
        header,
        ifindex: 1,
        flags: node_flags::VALID | node_flags::NEXT_HOP,
        path_mtu: MTU + 50,
        ip_sum,
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    let program = ebpf.program_mut(name).expect("a program of the object");
    program.try_into().expect("a tc program")
}

/// Keeps this thread on one CPU: what the programs remember there, a later run finds.
pub(crate) fn pin_to_cpu() {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0).expect("a CPU");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).expect("stay on a CPU");
}
