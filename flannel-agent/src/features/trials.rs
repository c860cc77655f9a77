//! What can be tried with one run of a program on one packet (`BPF_PROG_TEST_RUN`): it needs no interface and nobody sees it. A helper
//! counts only if it did to the packet what it is there for.

use flannel_common::map::{
    room::{DECAP, DECAP_L4_UDP, ENCAP, ENCAP_L2_ETH},
    room_flags,
};
use flannel_core::features::{Feature, Finding};

use super::{
    assembly::{
        Insn,
        Reg::{R0, R1, R2, R3, R4, R5, R6, R10},
        add, call, copy, exit, read, set, set_long, skip_if, skip_if_negative, skip_unless, write,
    },
    kernel::{self, Kind},
};

/// Helpers by their number in `enum bpf_func_id` (`include/uapi/linux/bpf.h`).
const KTIME_GET_NS: i32 = 5;
const GET_PRANDOM_U32: i32 = 7;
const GET_SMP_PROCESSOR_ID: i32 = 8;
const SKB_STORE_BYTES: i32 = 9;
const SKB_LOAD_BYTES: i32 = 26;
const SKB_CHANGE_TYPE: i32 = 32;
const GET_HASH_RECALC: i32 = 34;
const SKB_PULL_DATA: i32 = 39;
const XDP_ADJUST_HEAD: i32 = 44;
const SKB_ADJUST_ROOM: i32 = 50;
const XDP_ADJUST_META: i32 = 54;
const CSUM_LEVEL: i32 = 135;
const KTIME_GET_COARSE_NS: i32 = 160;
const CHECK_MTU: i32 = 163;

/// Commands of `bpf_csum_level`.
const QUERY: i32 = 0;
const INCREMENT: i32 = 1;
const DECREMENT: i32 = 2;
/// `BPF_ADJ_ROOM_MAC`.
const MAC: i32 = 1;
/// `BPF_F_XDP_HAS_FRAGS`.
const HAS_FRAGS: u32 = 1 << 5;

/// Offset of `pkt_type` in `struct __sk_buff`.
const PKT_TYPE: i16 = 4;
/// A place of four bytes on the stack.
const SLOT: i16 = -8;
/// Length of an Ethernet header, and what VXLAN puts in front of a packet.
const ETH: usize = 14;
const OVERHEAD: i32 = 50;
/// Bytes of metadata in front of a frame.
const MARK: i32 = 4;
/// Length of the packet that programs run on.
const PACKET: usize = 150;
/// What a program answers where the helper said yes and the outcome is wrong.
const WRONG: i32 = 1;
/// What is written into a packet.
const WRITTEN: i32 = 0x5a5a_5a5a;

/// What a packet should have become.
#[derive(Clone, Copy, Debug)]
enum Becomes {
    /// What it was.
    Same,
    /// The same with other first bytes.
    Overwritten,
    /// The same with that many bytes more, or fewer, behind the Ethernet header.
    Resized(i32),
    /// The same without so many bytes in front.
    Cut(usize),
    /// The same behind a mark of so many bytes, which kernels before 5.18 do not show.
    Marked(usize),
}

/// One trial. The program answers 0 for success, else the helper's error or [`WRONG`].
struct Trial {
    feature: Feature,
    kind: Kind,
    flags: u32,
    code: Vec<Insn>,
    becomes: Becomes,
}

fn tc(feature: Feature, code: &[&[Insn]], becomes: Becomes) -> Trial {
    Trial {
        feature,
        kind: Kind::SchedCls,
        flags: 0,
        // The context survives the call.
        code: [&[copy(R6, R1)], code.concat().as_slice()].concat(),
        becomes,
    }
}

fn xdp(feature: Feature, flags: u32, code: &[Insn], becomes: Becomes) -> Trial {
    Trial {
        feature,
        kind: Kind::Xdp,
        flags,
        code: code.to_vec(),
        becomes,
    }
}

/// Ends with [`WRONG`] if the register is zero, else with 0.
fn not_zero(register: super::assembly::Reg) -> [Insn; 5] {
    [
        skip_if(register, 0, 2),
        set(R0, 0),
        exit(),
        set(R0, WRONG),
        exit(),
    ]
}

fn room(delta: i32, flags: u32) -> Vec<Insn> {
    let mut code = vec![copy(R1, R6), set(R2, delta), set(R3, MAC)];
    code.extend(set_long(R4, room_flags(flags)));
    code.extend([call(SKB_ADJUST_ROOM), exit()]);
    code
}

/// Those of tc that see a packet.
fn on_packets() -> Vec<Trial> {
    let level = |command: i32| [copy(R1, R6), set(R2, command), call(CSUM_LEVEL)];
    vec![
        tc(
            Feature::LoadBytes,
            &[
                &[
                    write(R10, SLOT, 0),
                    copy(R1, R6),
                    set(R2, 0),
                    copy(R3, R10),
                    add(R3, i32::from(SLOT)),
                    set(R4, 4),
                    call(SKB_LOAD_BYTES),
                    skip_if(R0, 0, 1),
                    exit(),
                    read(R1, R10, SLOT),
                ],
                &not_zero(R1),
            ],
            Becomes::Same,
        ),
        tc(
            Feature::StoreBytes,
            &[&[
                write(R10, SLOT, WRITTEN),
                copy(R1, R6),
                set(R2, 0),
                copy(R3, R10),
                add(R3, i32::from(SLOT)),
                set(R4, 4),
                set(R5, 0),
                call(SKB_STORE_BYTES),
                exit(),
            ]],
            Becomes::Overwritten,
        ),
        tc(
            Feature::PullData,
            &[&[copy(R1, R6), set(R2, 34), call(SKB_PULL_DATA), exit()]],
            Becomes::Same,
        ),
        tc(
            Feature::HashRecalc,
            &[&[copy(R1, R6), call(GET_HASH_RECALC)], &not_zero(R0)],
            Becomes::Same,
        ),
        tc(
            Feature::CheckMtu,
            &[
                &[
                    write(R10, SLOT, 0),
                    copy(R1, R6),
                    set(R2, 0),
                    copy(R3, R10),
                    add(R3, i32::from(SLOT)),
                    set(R4, 0),
                    set(R5, 0),
                    call(CHECK_MTU),
                    skip_if(R0, 0, 1),
                    exit(),
                    read(R1, R10, SLOT),
                ],
                &not_zero(R1),
            ],
            Becomes::Same,
        ),
        tc(
            // Nothing is verified, then one level is, then nothing again.
            Feature::CsumLevel,
            &[
                &level(INCREMENT),
                &[skip_if(R0, 0, 1), exit()],
                &level(QUERY),
                &[skip_if(R0, 0, 1), exit()],
                &level(DECREMENT),
                &[skip_if(R0, 0, 1), exit()],
                &level(QUERY),
                &[
                    skip_if_negative(R0, 2),
                    set(R0, WRONG),
                    exit(),
                    set(R0, 0),
                    exit(),
                ],
            ],
            Becomes::Same,
        ),
        tc(
            // The packet is not for us, and then it is.
            Feature::ChangeType,
            &[&[
                read(R1, R6, PKT_TYPE),
                skip_unless(R1, 0, 2),
                set(R0, WRONG),
                exit(),
                copy(R1, R6),
                set(R2, 0),
                call(SKB_CHANGE_TYPE),
                skip_if(R0, 0, 1),
                exit(),
                read(R0, R6, PKT_TYPE),
                exit(),
            ]],
            Becomes::Same,
        ),
        tc(
            Feature::RoomEncap,
            &[&room(OVERHEAD, ENCAP)],
            Becomes::Resized(OVERHEAD),
        ),
        tc(
            Feature::EncapL2Eth,
            &[&room(OVERHEAD, ENCAP | ENCAP_L2_ETH)],
            Becomes::Resized(OVERHEAD),
        ),
        tc(
            Feature::RoomDecap,
            &[&room(-OVERHEAD, DECAP)],
            Becomes::Resized(-OVERHEAD),
        ),
        tc(
            Feature::DecapL4Udp,
            &[&room(-OVERHEAD, DECAP | DECAP_L4_UDP)],
            Becomes::Resized(-OVERHEAD),
        ),
    ]
}

/// Those of tc that know nothing of packets.
fn on_nothing() -> Vec<Trial> {
    let simple = |feature, helper| {
        tc(
            feature,
            &[&[call(helper), set(R0, 0), exit()]],
            Becomes::Same,
        )
    };
    let clock = |feature, helper| tc(feature, &[&[call(helper)], &not_zero(R0)], Becomes::Same);
    vec![
        tc(Feature::SchedCls, &[&[set(R0, 0), exit()]], Becomes::Same),
        simple(Feature::Random, GET_PRANDOM_U32),
        simple(Feature::Processor, GET_SMP_PROCESSOR_ID),
        clock(Feature::Clock, KTIME_GET_NS),
        clock(Feature::CoarseClock, KTIME_GET_COARSE_NS),
    ]
}

fn of_xdp() -> Vec<Trial> {
    let adjust = |helper, delta| [set(R2, delta), call(helper), exit()];
    vec![
        xdp(Feature::Xdp, 0, &[set(R0, 0), exit()], Becomes::Same),
        xdp(
            Feature::XdpFrags,
            HAS_FRAGS,
            &[set(R0, 0), exit()],
            Becomes::Same,
        ),
        xdp(
            Feature::AdjustHead,
            0,
            &adjust(XDP_ADJUST_HEAD, OVERHEAD),
            Becomes::Cut(OVERHEAD.unsigned_abs() as usize),
        ),
        xdp(
            Feature::AdjustMeta,
            0,
            &adjust(XDP_ADJUST_META, -MARK),
            Becomes::Marked(MARK.unsigned_abs() as usize),
        ),
    ]
}

/// Tries everything that `wanted` says yes to.
pub(super) fn try_all(wanted: impl Fn(Feature) -> bool) -> Vec<(Feature, Finding)> {
    [on_nothing(), on_packets(), of_xdp()]
        .into_iter()
        .flatten()
        .filter(|trial| wanted(trial.feature))
        .map(|trial| (trial.feature, trial.finding()))
        .collect()
}

impl Trial {
    fn finding(&self) -> Finding {
        let packet = packet(PACKET);
        let ran = kernel::load(self.kind, &self.code, self.flags)
            .and_then(|program| kernel::run(&program, &packet));
        match ran {
            Err(refusal) => refusal.finding(),
            Ok((errno, _)) if errno < 0 => kernel::absent(
                "the kernel takes the program and refuses the packet",
                errno.unsigned_abs().cast_signed(),
                Some("the verifier does not look at flags"),
            ),
            Ok((0, out)) if self.becomes.is(&packet, &out) => Finding::Present,
            Ok((answer, out)) => Finding::absent(format!(
                "a packet of {} bytes came back with {} bytes and the answer {answer}, not as it should",
                packet.len(),
                out.len()
            )),
        }
    }
}

impl Becomes {
    fn is(self, packet: &[u8], out: &[u8]) -> bool {
        let (eth, rest) = packet.split_at(ETH);
        match self {
            Self::Same => out == packet,
            Self::Overwritten => {
                let head = WRITTEN.to_ne_bytes();
                out.strip_prefix(&head) == packet.get(head.len()..)
            }
            Self::Resized(delta) => {
                let moved = delta.unsigned_abs() as usize;
                out.strip_prefix(eth).is_some_and(|out| {
                    if delta < 0 {
                        Some(out) == rest.get(moved..)
                    } else {
                        out.get(moved..) == Some(rest)
                    }
                })
            }
            Self::Cut(bytes) => Some(out) == packet.get(bytes..),
            Self::Marked(bytes) => out == packet || out.get(bytes..) == Some(packet),
        }
    }
}

/// The same from another port.
pub(super) fn packet_from(port: u16, len: usize) -> Vec<u8> {
    let mut packet = packet(len);
    if let Some(place) = packet.get_mut(ETH + 20..ETH + 22) {
        place.copy_from_slice(&port.to_be_bytes());
    }
    packet
}

/// A UDP packet of IPv4 from nobody to nobody, with bytes that tell where they were.
pub(super) fn packet(len: usize) -> Vec<u8> {
    const HEADERS: usize = ETH + 20 + 8;
    let total = u16::try_from(len - ETH).unwrap_or_default().to_be_bytes();
    let udp = u16::try_from(len - ETH - 20)
        .unwrap_or_default()
        .to_be_bytes();
    let mut packet = vec![
        // For another host than the loopback, and from it.
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, //
        // TTL 64, UDP, 198.18.0.1 to 198.18.0.2: kept for such purposes (RFC 2544).
        0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2, //
        // Discard to discard.
        0, 9, 0, 9, udp[0], udp[1], 0, 0,
    ];
    packet.extend((HEADERS..len).map(|at| at as u8));
    packet
}
