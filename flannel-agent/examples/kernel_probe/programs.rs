//! The programs by themselves: does the verifier take them, and what do they do to a packet?

use anyhow::{Context as _, bail, ensure};
use aya::{
    Ebpf, Pod,
    maps::Array,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use flannel_agent::dataplane::bpf::{AttachMode, Bpf, Instance, LoadOptions, Room};
use flannel_common::{
    Config, HEADER_LEN, NodeId, NodeRecord, OuterV4, config_flags,
    header::{INNER_ETH, IP, UDP, VXLAN, vni_word},
    node_flags,
};
use flannel_core::addr::Vni;
use nix::sys::resource::{Resource, setrlimit};

use crate::MARK;

/// The object that the agent embeds.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FLANNEL_EBPF_OBJECT"));

/// `BPF_ADJ_ROOM_ENCAP_L2_ETH` in `include/uapi/linux/bpf.h`.
const ENCAP_L2_ETH: u32 = 1 << 6;
/// `TC_ACT_UNSPEC` and `TC_ACT_REDIRECT` in `include/uapi/linux/pkt_cls.h`.
const UNSPEC: i32 = -1;
const REDIRECT: i32 = 7;

const VNI: u32 = 4242;
const PORT: u16 = 8472;
const LOCAL: [u8; 4] = [192, 168, 77, 11];
const REMOTE: [u8; 4] = [192, 168, 77, 12];
const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The loopback's, on which `BPF_PROG_TEST_RUN` receives: any other is somebody else's.
const UPLINK_MAC: [u8; 6] = [0; 6];
const NEXT_HOP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// A `ping` with its 56 bytes.
const FRAME: usize = 98;

/// Loads everything as the agent does, and tells what the kernel's `bpf_skb_adjust_room` can do.
pub(crate) fn load() -> anyhow::Result<String> {
    let unlimited = libc::RLIM_INFINITY;
    // As the agent does: kernels before 5.11 count maps against it, and if it stays, loading says so.
    let _refused = setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited);
    let room = room()?;
    let l2_eth = room.encap & ENCAP_L2_ETH != 0;
    println!("{MARK} fact l2_eth {l2_eth}");
    println!("{MARK} fact decap_l4_udp {}", room.clears_gso);
    Ok(format!("the verifier accepts the programs; {room:x?}"))
}

fn room() -> anyhow::Result<Room> {
    let bpf = Bpf::load(&LoadOptions {
        instance: Instance::of(Vni::try_from(VNI)?)?,
        subnet_count: 256,
        attach: AttachMode::detect(),
        flow_entries: 1024,
    })
    .context("load the programs")?;
    let room = bpf.room();
    let obstacle = bpf.gate_obstacle().map(str::to_owned);
    bpf.discard();
    if let Some(obstacle) = obstacle {
        bail!("the programs of the flow gate: {obstacle}");
    }
    Ok(room)
}

/// Runs both programs on a packet each.
pub(crate) fn run() -> anyhow::Result<String> {
    let room = room()?;
    let mut ebpf = Ebpf::load(OBJECT).context("load the object")?;
    let (header, ip_sum) = OuterV4 {
        next_hop_mac: NEXT_HOP_MAC,
        uplink_mac: UPLINK_MAC,
        local: LOCAL,
        remote: REMOTE,
        port: PORT,
        vni: VNI,
        peer_mac: PEER_MAC,
        own_mac: OWN_MAC,
    }
    .build();
    let config = Config {
        layout: flannel_common::LAYOUT_VERSION,
        flags: config_flags::ENCAP | config_flags::DECAP,
        network: u32::from_be_bytes([10, 244, 0, 0]),
        subnet_shift: 8,
        subnet_count: 256,
        tunnel_ifindex: 1,
        tunnel_mtu: 1450,
        encap_flags: room.encap,
        decap_flags: room.decap,
        vni: vni_word(VNI),
        local: LOCAL,
        port: PORT.to_be_bytes(),
        own_mac: OWN_MAC,
        source_port_min: 32768,
        source_port_span: 28231,
        ..Config::default()
    };
    let node = NodeRecord {
        header,
        ifindex: 1,
        flags: node_flags::VALID | node_flags::NEXT_HOP,
        path_mtu: 1500,
        ip_sum,
    };
    set(&mut ebpf, "config", 0, config)?;
    set::<NodeId>(&mut ebpf, "subnets", 2, 1)?;
    set(&mut ebpf, "nodes", 1, node)?;

    let frame = inner([10, 244, 1, 2], [10, 244, 2, 2], OWN_MAC, PEER_MAC);
    let (verdict, sent) = test_run(&mut ebpf, "to_overlay", &frame)?;
    ensure!(
        verdict == REDIRECT && sent.len() == FRAME + 50,
        "to_overlay: verdict {verdict} and {} bytes, expected {REDIRECT} and {}",
        sent.len(),
        FRAME + 50
    );
    check_outer(&sent, &frame)?;

    let stranger = inner([10, 244, 1, 2], [10, 244, 9, 2], OWN_MAC, PEER_MAC);
    let (verdict, same) = test_run(&mut ebpf, "to_overlay", &stranger)?;
    ensure!(
        verdict == UNSPEC && same == stranger,
        "to_overlay without a peer: verdict {verdict} and {} bytes, expected {UNSPEC} and the packet",
        same.len()
    );

    let back = inner([10, 244, 2, 2], [10, 244, 1, 2], PEER_MAC, OWN_MAC);
    let wire = on_the_wire(&back);
    let (verdict, received) = test_run(&mut ebpf, "from_wire", &wire)?;
    ensure!(
        verdict == REDIRECT && received == back,
        "from_wire: verdict {verdict} and {} bytes, expected {REDIRECT} and the inner frame:\n{received:02x?}\n{back:02x?}",
        received.len()
    );
    Ok(format!(
        "to_overlay redirects {FRAME} bytes as {}, from_wire {} as {}",
        sent.len(),
        wire.len(),
        received.len()
    ))
}

/// The outer headers: lengths, addresses, checksum, and the inner packet untouched behind them.
fn check_outer(sent: &[u8], frame: &[u8]) -> anyhow::Result<()> {
    let field = |what: &str, at: usize, expected: &[u8]| {
        let found = &sent[at..at + expected.len()];
        ensure!(
            found == expected,
            "{what} is {found:02x?}, expected {expected:02x?}"
        );
        Ok(())
    };
    field("the outer destination", 0, &NEXT_HOP_MAC)?;
    field("the outer source", 6, &UPLINK_MAC)?;
    field(
        "the start of the outer IPv4 header",
        12,
        &[8, 0, 0x45, 0, 0, 134],
    )?;
    field("the outer addresses", IP + 12, &[LOCAL, REMOTE].concat())?;
    field("the outer UDP port", UDP + 2, &PORT.to_be_bytes())?;
    field(
        "the outer UDP length and checksum",
        UDP + 4,
        &[0, 114, 0, 0],
    )?;
    field("the VXLAN flags", VXLAN, &[8, 0, 0, 0])?;
    field("the VNI", VXLAN + 4, &vni_word(VNI))?;
    field(
        "the inner MAC addresses",
        INNER_ETH,
        &[PEER_MAC, OWN_MAC].concat(),
    )?;
    field("the inner packet", HEADER_LEN, &frame[14..])?;
    let header: [u8; 20] = sent[IP..UDP].try_into()?;
    ensure!(
        flannel_common::checksum::ipv4_header_is_valid(&header),
        "the outer IPv4 checksum is wrong: {header:02x?}"
    );
    Ok(())
}

fn set<V: Pod>(ebpf: &mut Ebpf, map: &str, index: u32, value: V) -> anyhow::Result<()> {
    let found = ebpf.map_mut(map).with_context(|| format!("no map {map}"))?;
    let mut array: Array<_, V> = Array::try_from(found).with_context(|| format!("open {map}"))?;
    array
        .set(index, value, 0)
        .with_context(|| format!("write {map}[{index}]"))
}

/// The verdict on a frame, and the frame afterwards.
fn test_run(ebpf: &mut Ebpf, name: &str, frame: &[u8]) -> anyhow::Result<(i32, Vec<u8>)> {
    let program: &mut SchedClassifier = ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?;
    if program.fd().is_err() {
        program.load().with_context(|| format!("load {name}"))?;
    }
    let mut out = vec![0; 2048];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })
        .with_context(|| format!("run {name}"))?;
    out.truncate(result.data_size_out as usize);
    Ok((result.return_value as i32, out))
}

/// A frame of [`FRAME`] bytes with an IPv4 packet of no known protocol: nothing looks further.
fn inner(src: [u8; 4], dst: [u8; 4], src_mac: [u8; 6], dst_mac: [u8; 6]) -> Vec<u8> {
    let payload: Vec<u8> = (0..64).collect();
    let mut frame = [dst_mac, src_mac].concat();
    frame.extend([8, 0]);
    frame.extend(ipv4(253, src, dst, &payload));
    frame
}

fn on_the_wire(inner: &[u8]) -> Vec<u8> {
    let mut udp = 40_000u16.to_be_bytes().to_vec();
    udp.extend(PORT.to_be_bytes());
    udp.extend((inner.len() as u16 + 16).to_be_bytes());
    udp.extend([0, 0]);
    udp.extend([8, 0, 0, 0]);
    udp.extend(vni_word(VNI));
    udp.extend(inner);
    let mut frame = [UPLINK_MAC, NEXT_HOP_MAC].concat();
    frame.extend([8, 0]);
    frame.extend(ipv4(17, REMOTE, LOCAL, &udp));
    frame
}

fn ipv4(protocol: u8, src: [u8; 4], dst: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((payload.len() as u16 + 20).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    packet.extend(src);
    packet.extend(dst);
    let check = flannel_testkit::packet::checksum(&packet, 0);
    packet[10..12].copy_from_slice(&check.to_be_bytes());
    packet.extend(payload);
    packet
}
