//! Packets that nobody should send.

use flannel_common::{Direction, config_flags, flow::mode};
use flannel_testkit::privileged;

use crate::{
    decap, encap, flows,
    kernel::{CARRIED, Kernel, OUR_POD, PEER_POD, REDIRECT, Ran, SHOT, UNSPEC, shortest},
};

/// Packets for each program.
const RUNS: u32 = 25_000;
/// The longest packet: what fits a page with the room that the kernel wants around it.
const LONGEST: usize = 2_000;

/// Deterministic, so that a failure can be had again (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("smaller than bound")
    }

    fn byte(&mut self) -> u8 {
        // The low bits of a xorshift are its weakest.
        self.next().to_be_bytes()[0]
    }

    /// Pure noise, or `good` with some damage: the headers more often than what follows.
    fn packet(&mut self, good: &[u8], headers: usize) -> Vec<u8> {
        let mut packet = good.to_vec();
        match self.below(8) {
            0 => {
                let len = 14 + self.below(LONGEST - 14);
                packet = (0..len).map(|_| self.byte()).collect();
                if self.below(2) == 0 {
                    let kept = headers.min(len).min(self.below(headers) + 1);
                    packet[..kept].copy_from_slice(&good[..kept]);
                }
                return packet;
            }
            1 => packet.truncate(14 + self.below(packet.len() - 14)),
            2 => {
                let longer = packet.len() + self.below(LONGEST - packet.len());
                packet.resize_with(longer, || self.byte());
            }
            3 => {
                let at = self.below(packet.len());
                packet.insert(at, self.byte());
            }
            4 => {
                let at = 14 + self.below(packet.len() - 14);
                packet.remove(at);
            }
            _ => {}
        }
        for _ in 0..self.below(4) {
            let reach = if self.below(4) == 0 {
                packet.len()
            } else {
                headers.min(packet.len())
            };
            let at = self.below(reach);
            packet[at] = match self.below(3) {
                0 => self.byte(),
                1 => packet[at] ^ (1 << self.below(8)),
                _ => [0x00, 0xff, 0x7f, 0x80][self.below(4)],
            };
        }
        packet
    }
}

/// Runs a program on garbage. `check` sees what it was given and what it redirected.
fn bombard(
    name: &str,
    direction: Direction,
    good: &dyn Fn(usize) -> Vec<u8>,
    headers: usize,
    check: impl Fn(&[u8], &[u8]),
) {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let mut random = Random(0x005e_ed0f_f1a0);
    let mut verdicts = std::collections::BTreeMap::new();
    for run in 0..RUNS {
        let mut config = if run % 3 == 0 {
            kernel.config_alone()
        } else {
            kernel.config()
        };
        if run % 101 == 0 {
            config.flags ^= 1 << random.below(8);
        }
        kernel.put_config(&config);
        let good = good(random.below(1_400));
        let mut packet = random.packet(&good, headers);
        if packet.len() < shortest(&packet) {
            packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        }
        let gso_size = if random.below(16) == 0 {
            1 + random.below(1_500) as u32
        } else {
            0
        };
        let ran = kernel.run_as(name, &packet, gso_size);
        match ran.verdict {
            UNSPEC => assert_eq!(ran.packet, packet, "run {run}: passed on, but changed"),
            SHOT => assert!(
                config.flags & config_flags::ALONE != 0,
                "run {run}: dropped {packet:02x?}"
            ),
            REDIRECT => check(&packet, &ran.packet),
            other => panic!("run {run}: verdict {other} on {packet:02x?}"),
        }
        *verdicts.entry(ran.verdict).or_insert(0) += 1;
    }
    let counts = kernel.counts();
    assert!(
        counts.keys().all(|(way, _)| *way == direction),
        "{counts:?}"
    );
    let carried = counts.get(&(direction, CARRIED)).copied();
    assert_eq!(
        carried,
        verdicts.get(&REDIRECT).copied(),
        "carried and redirected"
    );
    println!("{name}: {verdicts:?} {counts:?}");
    // Every verdict was met often, and the garbage was of many kinds.
    assert!(
        verdicts
            .values()
            .all(|packets| *packets > u64::from(RUNS / 20))
            && verdicts.len() == 3,
        "{verdicts:?}"
    );
    assert!(counts.len() > 6, "{counts:?}");
}

#[test]
fn to_overlay_survives_garbage() {
    bombard(
        "to_overlay",
        Direction::Encap,
        &encap::datagram,
        34,
        |given, redirected| {
            encap::check_outer(redirected, given);
        },
    );
}

#[test]
fn from_wire_survives_garbage() {
    bombard(
        "from_wire",
        Direction::Decap,
        &decap::packet,
        84,
        |given, redirected| {
            // All that may have changed is the congestion bits inside and the checksum that covers them.
            let mut want = given[50..].to_vec();
            want[15] = want[15] & !3 | redirected[15] & 3;
            want[24..26].copy_from_slice(&redirected[24..26]);
            assert_eq!(redirected, want);
        },
    );
}

/// Runs a program of the gate on garbage, with everything open: what is not carried stays as it is, and what is carried was a
/// whole packet of one pod to another.
fn bombard_gate(
    name: &str,
    good: &dyn Fn(usize) -> Vec<u8>,
    inner: usize,
    check: impl Fn(&[u8], &Ran),
) {
    if !privileged() {
        return;
    }
    let mut random = Random(0x0bad_cafe);
    let mut verdicts = std::collections::BTreeMap::new();
    for mode in [mode::ESTABLISHED, mode::SYN, mode::UNGATED] {
        let mut kernel = flows::kernel(mode);
        for run in 0..RUNS / 3 {
            let good = good(30 + random.below(1_300));
            let mut packet = random.packet(&good, inner + 40);
            if packet.len() < shortest(&packet) {
                packet[12..14].copy_from_slice(&[0x88, 0xb5]);
            }
            let ran = kernel.run(name, &packet);
            match ran.verdict {
                UNSPEC => assert_eq!(ran.packet, packet, "run {run}: passed on, but changed"),
                REDIRECT => {
                    assert_eq!(packet[inner], 0x45, "run {run}: {packet:02x?}");
                    assert_eq!(packet[inner + 6] & 0x3f | packet[inner + 7], 0, "run {run}");
                    check(&packet, &ran);
                }
                other => panic!("run {run}: verdict {other} on {packet:02x?}"),
            }
            *verdicts.entry((mode, ran.verdict)).or_insert(0) += 1;
        }
    }
    println!("{name}: {verdicts:?}");
    assert!(
        verdicts.get(&(mode::UNGATED, REDIRECT)) > Some(&(RUNS / 60)),
        "{verdicts:?}"
    );
    assert!(
        !verdicts.contains_key(&(mode::ESTABLISHED, REDIRECT)),
        "{verdicts:?}"
    );
}

#[test]
fn from_pod_survives_garbage() {
    bombard_gate(
        "from_pod",
        &|len| flows::udp(flows::SENT, (OUR_POD, 1), (PEER_POD, 2), len),
        14,
        |given, ran| {
            // The other pod of this node gets it as it is. A wrong checksum stays wrong, and is for the receiver to find.
            if ran.packet != given && given == flows::rechecked(given) {
                flows::is_on_the_wire(ran, given);
            }
        },
    );
}

#[test]
fn from_overlay_survives_garbage() {
    bombard_gate(
        "from_overlay",
        &|len| flows::as_host(&flows::udp(flows::INSIDE, (PEER_POD, 1), (OUR_POD, 2), len)),
        14,
        |given, ran| {
            assert_eq!(ran.packet.len(), given.len());
            assert_eq!(ran.packet[26..], given[26..]);
            assert_eq!(ran.packet[22], given[22] - 1);
        },
    );
}

#[test]
fn to_pod_changes_nothing() {
    if !privileged() {
        return;
    }
    let mut random = Random(0x0dd_ba11);
    let mut kernel = flows::kernel(mode::SYN);
    for run in 0..RUNS / 3 {
        let good = flows::udp(
            flows::LANDED,
            (PEER_POD, 1),
            (OUR_POD, 2),
            30 + random.below(1_300),
        );
        let mut packet = random.packet(&good, 54);
        if packet.len() < shortest(&packet) {
            packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        }
        let ran = kernel.run("to_pod", &packet);
        assert_eq!((ran.verdict, ran.packet), (UNSPEC, packet), "run {run}");
    }
}
