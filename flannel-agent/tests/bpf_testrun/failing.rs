//! Helpers that fail: the packet goes on as it was. The kernel has no way to make them fail when asked to, so the object is loaded with
//! each call of a helper replaced by its error; and flags that no kernel knows are refused by every one.

use flannel_agent::dataplane::bpf::OBJECT;
use flannel_common::{
    Config, CounterId,
    flow::{ACK, PROTO_TCP, mode},
};
use flannel_testkit::privileged;

use crate::{
    decap::{packet, wrapped},
    elf::{self, INSTRUCTION},
    encap::datagram,
    flows::{
        CLIENT, INSIDE, OTHER_MAC, OTHER_POD, POD_MAC, SENT, SERVER, as_host, back, count, furnish,
        key, now, out, put_flow, put_neighbours, rechecked, tcp, udp,
    },
    kernel::{Kernel, OUR_POD, PEER_POD, Ran, SHOT, UNSPEC},
    xdp,
};

/// Numbers in `enum bpf_func_id`.
const STORE_BYTES: i32 = 9;
const CHANGE_TYPE: i32 = 32;
const ADJUST_HEAD: i32 = 44;
const ADJUST_ROOM: i32 = 50;
const ADJUST_META: i32 = 54;
/// `BPF_JMP | BPF_CALL`, and `BPF_ALU64 | BPF_MOV | BPF_K` into `R0`.
const CALL: [u8; 4] = [0x85, 0, 0, 0];
const SET_R0: [u8; 4] = [0xb7, 0, 0, 0];
/// A flag of `bpf_skb_adjust_room` that no kernel has.
const UNKNOWN_FLAG: u32 = 1 << 23;

/// The object in which a helper does nothing and answers -EFAULT.
pub(crate) fn without(helper: i32) -> Vec<u8> {
    let mut object = OBJECT.to_vec();
    let mut calls = 0;
    for code in elf::code(OBJECT, None) {
        for instruction in object[code].chunks_exact_mut(INSTRUCTION) {
            if instruction[..4] == CALL && instruction[4..] == helper.to_le_bytes() {
                instruction[..4].copy_from_slice(&SET_R0);
                instruction[4..].copy_from_slice(&(-libc::EFAULT).to_le_bytes());
                calls += 1;
            }
        }
    }
    assert!(calls > 0, "nobody calls helper {helper}");
    object
}

/// Runs a packet that goes on as it was.
#[track_caller]
fn goes_on(kernel: &mut Kernel, program: &str, packet: &[u8], reason: Option<&str>) {
    let (ran, counted) = kernel.run_counted(program, packet, 0);
    let expected = Ran {
        verdict: UNSPEC,
        packet: packet.to_vec(),
    };
    assert_eq!((ran, counted), (expected, reason), "{program}");
}

/// Packets that `to_overlay` and `from_wire` carry if they can, with and without congestion on the way.
fn carried() -> [(&'static str, Vec<u8>); 3] {
    let mut inside = udp(INSIDE, (PEER_POD, 1), (OUR_POD, 2), 40);
    inside[15] = 2;
    let mut congested = wrapped(&rechecked(&inside));
    congested[15] = 3;
    [
        ("to_overlay", datagram(100)),
        ("from_wire", packet(100)),
        ("from_wire", rechecked(&congested)),
    ]
}

#[test]
fn flags_that_the_kernel_refuses_cost_no_packet() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for alone in [false, true] {
        let config = if alone {
            kernel.config_alone()
        } else {
            kernel.config()
        };
        kernel.put_config(&Config {
            encap_flags: config.encap_flags | UNKNOWN_FLAG,
            decap_flags: config.decap_flags | UNKNOWN_FLAG,
            ..config
        });
        for (program, packet) in carried() {
            if alone {
                // Nobody else would carry it.
                let (ran, counted) = kernel.run_counted(program, &packet, 0);
                assert_eq!((ran.verdict, counted), (SHOT, Some("adjust_room")));
            } else {
                goes_on(&mut kernel, program, &packet, Some("adjust_room"));
            }
        }
    }
}

#[test]
fn a_helper_that_fails_costs_no_packet() {
    if !privileged() {
        return;
    }
    for (helper, reason) in [(ADJUST_ROOM, "adjust_room"), (STORE_BYTES, "store")] {
        let mut kernel = Kernel::load_object(&without(helper));
        for (program, packet) in carried() {
            goes_on(&mut kernel, program, &packet, Some(reason));
        }
    }
}

/// A kernel with a connection that is fast, and one between two pods of this node.
fn fast(object: &[u8]) -> Kernel {
    let mut kernel = Kernel::load_object(object);
    furnish(&mut kernel, mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    put_neighbours(&mut kernel);
    kernel
}

#[test]
fn on_the_fast_path_neither() {
    if !privileged() {
        return;
    }
    let inside = back(INSIDE, ACK);
    let local = tcp(
        [POD_MAC, OTHER_MAC],
        (OUR_POD, CLIENT),
        (OTHER_POD, SERVER),
        ACK,
    );
    for (helper, program, packet, reason) in [
        (ADJUST_ROOM, "from_pod", out(SENT, ACK), None),
        (STORE_BYTES, "from_pod", out(SENT, ACK), None),
        (
            ADJUST_ROOM,
            "from_wire",
            wrapped(&inside),
            Some("adjust_room"),
        ),
        (STORE_BYTES, "from_overlay", as_host(&inside), None),
        (CHANGE_TYPE, "from_pod", local, None),
    ] {
        // It is fast if nothing fails.
        let mut whole = fast(OBJECT);
        assert_ne!(whole.run(program, &packet).verdict, UNSPEC, "{program}");
        let mut kernel = fast(&without(helper));
        goes_on(&mut kernel, program, &packet, reason);
        for id in [
            CounterId::FastEncap,
            CounterId::FastDecap,
            CounterId::FastLocal,
        ] {
            assert_eq!(count(&kernel, id), 0, "{program}");
        }
    }
}

#[test]
fn what_has_lost_its_outer_headers_goes_to_the_stack() {
    if !privileged() {
        return;
    }
    let inside = back(INSIDE, ACK);
    let wire = wrapped(&inside);
    let mut kernel = fast(&without(STORE_BYTES));
    let (ran, counted) = kernel.run_counted("from_wire", &wire, 0);
    assert_eq!((ran.verdict, counted), (UNSPEC, Some("store")));
    // Addressed to this host, as it came, and routed from there.
    assert_eq!(ran.packet[..14], wire[..14]);
    assert_eq!(ran.packet[14..], inside[14..]);
}

#[test]
fn in_xdp_neither() {
    if !privileged() {
        return;
    }
    for helper in [ADJUST_HEAD, ADJUST_META] {
        let mut kernel = xdp::kernel_of(&without(helper));
        let frame = packet(100);
        // Without metadata either, which would be in front of it.
        let whole = (frame.clone(), false);
        assert_eq!(xdp::strip(&mut kernel, &frame), whole, "helper {helper}");
        assert_eq!(count(&kernel, CounterId::XdpDecap), 0);
    }
    let (_, is_bare) = xdp::strip(&mut xdp::kernel_of(OBJECT), &packet(100));
    assert!(is_bare);
}
