//! What this kernel's `bpf_skb_adjust_room` accepts, asked with `BPF_PROG_TEST_RUN` (needs no device).

use aya::{
    Ebpf,
    programs::{ProgramType, TestRun as _, TestRunOptions},
    sys::{BpfHelper, is_helper_supported},
};
use flannel_common::map::{
    helper_flags,
    room::{DECAP, DECAP_L4_UDP, ENCAP, ENCAP_L2_ETH, ENCAP_V6},
};

use flannel_core::addr::Family;

use super::{BpfError, program};

/// The flags to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// For encapsulation.
    pub encap: u32,
    /// For decapsulation.
    pub decap: u32,
    /// Whether decapsulation clears the tunnel state of super-packets.
    pub clears_gso: bool,
}

/// The program that asks.
pub(super) const PROGRAM: &str = "probe_room";

/// Bytes that the tunnel adds, and the flags of encapsulation that every kernel takes.
const fn base(family: Family) -> (i32, u32) {
    match family {
        Family::V4 => (flannel_common::OVERHEAD_V4 as i32, ENCAP),
        Family::V6 => (flannel_common::OVERHEAD_V6 as i32, ENCAP_V6),
    }
}

/// Tries the flag sets, best first.
pub fn room(ebpf: &mut Ebpf, family: Family) -> Result<Room, BpfError> {
    let (bytes, base) = base(family);
    let probe = program(ebpf, PROGRAM)?;
    probe
        .load()
        .map_err(|source| BpfError::program("load", PROGRAM, source))?;
    let accepts = |delta: i32, flags: u32| -> Result<i32, BpfError> {
        let result = probe
            .test_run(TestRunOptions {
                data_in: Some(&packet(family, delta, flags)),
                ..TestRunOptions::new()
            })
            .map_err(|source| BpfError::program("run", PROGRAM, source))?;
        Ok(result.return_value as i32)
    };
    let mut encap = base | ENCAP_L2_ETH;
    // 5.10 does not know ENCAP_L2_ETH, and segments correctly without.
    if accepts(bytes, encap)? != 0 {
        encap = base;
        let errno = accepts(bytes, encap)?;
        if errno != 0 {
            return Err(BpfError::NoRoom(-errno));
        }
    }
    let decap = DECAP;
    let errno = accepts(-bytes, decap)?;
    if errno != 0 {
        return Err(BpfError::NoRoom(-errno));
    }
    let clears_gso = accepts(-bytes, decap | DECAP_L4_UDP)? == 0;
    Ok(Room {
        encap,
        decap: if clears_gso {
            decap | DECAP_L4_UDP
        } else {
            decap
        },
        clears_gso,
    })
}

/// Which of the helpers that not every kernel has are here: [`helper_flags`]. Not to know means not to use.
pub(super) fn helpers() -> u32 {
    [
        (
            BpfHelper::BPF_FUNC_ktime_get_coarse_ns,
            helper_flags::COARSE_CLOCK,
        ),
        (BpfHelper::BPF_FUNC_check_mtu, helper_flags::CHECK_MTU),
    ]
    .into_iter()
    .filter(|(helper, _)| {
        is_helper_supported(ProgramType::SchedClassifier, *helper).unwrap_or(false)
    })
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// A packet whose destination and source MAC carry the question.
fn packet(family: Family, delta: i32, flags: u32) -> [u8; 192] {
    let mut packet = [0; 192];
    let (kind, ip): ([u8; 2], &[u8]) = match family {
        Family::V4 => ([0x08, 0x00], &[0x45, 0, 0, 178]),
        Family::V6 => ([0x86, 0xdd], &[0x60, 0, 0, 0, 0, 138, 59, 64]),
    };
    let fields: [(usize, &[u8]); 4] = [
        (0, &delta.to_le_bytes()),
        (4, &flags.to_le_bytes()),
        (12, &kind),
        (14, ip),
    ];
    for (at, bytes) in fields {
        if let Some(room) = packet.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    }
    packet
}
