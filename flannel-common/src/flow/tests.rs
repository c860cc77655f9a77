use proptest::prelude::*;
use std::vec::Vec;

use super::*;

const LEASE: u64 = 5_000_000_000;

const fn now(mode: u32) -> Now {
    Now {
        mode,
        epoch: 3,
        generation: 7,
        lease: LEASE,
    }
}

const fn tcp(way: Way, flags: u8) -> Packet {
    Packet {
        way,
        tcp: true,
        flags,
    }
}

const fn udp(way: Way) -> Packet {
    Packet {
        way,
        tcp: false,
        flags: 0,
    }
}

/// One flow on one node, with a stack that passes everything, translates everything, or drops everything.
#[derive(Clone, Debug)]
struct Node {
    now: Now,
    flow: Option<Flow>,
    translated_pair: bool,
    clock: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    Passes,
    Drops,
    /// The packet leaves it with other addresses; those of this flow come from a packet that entered it with others.
    Translates,
}

impl Node {
    fn new(mode: u32) -> Self {
        Self {
            now: now(mode),
            flow: None,
            translated_pair: false,
            clock: 1,
        }
    }

    /// True if the packet bypassed the stack. With [`Stack::Translates`] this is a packet that has the flow's addresses behind the
    /// stack only, so the gate before it is not asked.
    fn send(&mut self, packet: Packet, stack: Stack) -> bool {
        self.clock += 1;
        if stack != Stack::Translates {
            let clock = self.clock;
            match judge(&self.now, packet, self.flow.as_ref(), || clock) {
                Judgement::Fast => return true,
                Judgement::Close => {
                    if let Some(flow) = &mut self.flow {
                        close(&self.now, flow, packet.way, clock);
                    }
                }
                Judgement::Admit if !self.translated_pair => {
                    self.flow = Some(admitted(&self.now));
                    return true;
                }
                Judgement::Slow | Judgement::Admit => {}
            }
        }
        if stack == Stack::Drops {
            return false;
        }
        let tagged = stack == Stack::Passes;
        match testify(&self.now, packet, tagged, self.flow.as_ref()) {
            Testimony::Nothing => {}
            Testimony::Confirm => {
                if let Some(flow) = &mut self.flow {
                    flow.seen[packet.way as usize] = self.clock;
                }
            }
            Testimony::Closed => {
                if let Some(flow) = &mut self.flow {
                    flow.closing[packet.way as usize] = closing::PASSED;
                }
            }
            Testimony::Begin => self.flow = Some(witnessed(&self.now, packet.way, self.clock)),
            Testimony::Forget | Testimony::Refute => self.flow = None,
            Testimony::RefutePair => {
                self.flow = None;
                self.translated_pair = true;
            }
        }
        false
    }

    fn connect(&mut self) {
        assert!(!self.send(tcp(Way::Out, SYN), Stack::Passes));
        assert!(!self.send(tcp(Way::In, SYN | ACK), Stack::Passes));
        assert!(!self.send(tcp(Way::Out, ACK), Stack::Passes));
    }
}

#[test]
fn tcp_is_fast_after_the_handshake_and_not_before() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    assert!(node.send(tcp(Way::Out, ACK), Stack::Passes));
    assert!(node.send(tcp(Way::In, ACK), Stack::Passes));
}

#[test]
fn a_lease_ends_for_its_direction_alone() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    node.clock += LEASE - 3;
    // The SYN-ACK was seen one tick before the ACK.
    assert!(node.send(tcp(Way::Out, ACK), Stack::Drops));
    node.clock += 1;
    assert!(!node.send(tcp(Way::In, ACK), Stack::Drops));
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Passes));
    assert!(node.send(tcp(Way::Out, ACK), Stack::Drops));
    assert!(!node.send(tcp(Way::In, ACK), Stack::Passes));
    assert!(node.send(tcp(Way::In, ACK), Stack::Drops));
}

#[test]
fn a_policy_that_drops_takes_effect_within_a_lease() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    node.clock += LEASE + 1;
    for way in [Way::Out, Way::In, Way::Out, Way::In] {
        assert!(!node.send(tcp(way, ACK), Stack::Drops));
    }
}

#[test]
fn closing_ends_it_before_the_stack_even_if_the_stack_drops_the_fin() {
    for closer in [FIN | ACK, RST, RST | ACK] {
        let mut node = Node::new(mode::ESTABLISHED);
        node.connect();
        assert!(!node.send(tcp(Way::In, closer), Stack::Drops));
        for way in [Way::Out, Way::In, Way::Out] {
            assert!(!node.send(tcp(way, ACK), Stack::Passes));
        }
        // The same ports again: a new connection.
        node.connect();
        assert!(node.send(tcp(Way::Out, ACK), Stack::Passes));
    }
}

#[test]
fn a_fin_that_the_stack_drops_passes_when_it_comes_again() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
    // Not the data, and not a reset: a policy may be at work, and a reset is not sent again.
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Drops));
    assert!(!node.send(tcp(Way::Out, RST), Stack::Drops));
    assert!(!node.send(tcp(Way::Out, SYN | FIN), Stack::Drops));
    assert!(node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
    // The other side's, too, in its turn.
    assert!(!node.send(tcp(Way::In, FIN | ACK), Stack::Drops));
    assert!(node.send(tcp(Way::In, FIN | ACK), Stack::Drops));
    // Within a lease, as everything else.
    node.clock += LEASE;
    assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
    // The lease begins anew with the first FIN, but not if it was over.
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    node.clock += LEASE - 3;
    assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
    node.clock += LEASE - 3;
    assert!(node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    node.clock += LEASE;
    assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
    assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Drops));
}

#[test]
fn a_fin_that_the_stack_has_passed_goes_through_it_again() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    for _repetition in 0..3 {
        assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Passes));
    }
}

#[test]
fn one_way_udp_needs_its_own_witness_only() {
    let mut node = Node::new(mode::ESTABLISHED);
    assert!(!node.send(udp(Way::Out), Stack::Passes));
    assert!(node.send(udp(Way::Out), Stack::Passes));
    assert!(!node.send(udp(Way::In), Stack::Passes));
    assert!(node.send(udp(Way::In), Stack::Passes));
}

#[test]
fn a_translated_packet_with_the_same_tuple_ends_it() {
    let mut node = Node::new(mode::ESTABLISHED);
    assert!(!node.send(udp(Way::Out), Stack::Passes));
    assert!(node.send(udp(Way::Out), Stack::Passes));
    assert!(!node.send(udp(Way::Out), Stack::Translates));
    assert!(!node.send(udp(Way::In), Stack::Drops));
    assert!(!node.send(udp(Way::Out), Stack::Drops));
}

#[test]
fn another_epoch_or_generation_ends_it() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    node.now.epoch += 1;
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Passes));
    assert!(!node.send(tcp(Way::In, ACK), Stack::Passes));
    assert!(node.send(tcp(Way::Out, ACK), Stack::Passes));
    node.now.generation += 1;
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Passes));
}

#[test]
fn off_is_slow_whatever_is_known() {
    let mut node = Node::new(mode::ESTABLISHED);
    node.connect();
    node.now.mode = mode::OFF;
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Drops));
}

#[test]
fn syn_admits_at_once_unless_the_pair_is_translated_too() {
    let mut node = Node::new(mode::SYN);
    for (way, flags) in [
        (Way::Out, SYN),
        (Way::In, SYN | ACK),
        (Way::Out, ACK),
        (Way::In, FIN | ACK),
        (Way::Out, RST),
    ] {
        assert!(node.send(tcp(way, flags), Stack::Drops));
    }
    node.clock += 10 * LEASE;
    assert!(node.send(tcp(Way::Out, ACK), Stack::Drops));
    assert!(!node.send(tcp(Way::Out, SYN), Stack::Translates));
    assert!(!node.send(tcp(Way::Out, SYN), Stack::Passes));
    assert!(!node.send(tcp(Way::In, SYN | ACK), Stack::Passes));
}

#[test]
fn a_syn_ack_or_data_without_an_entry_is_not_admitted() {
    for flags in [SYN | ACK, ACK, FIN, RST] {
        let mut node = Node::new(mode::SYN);
        assert!(!node.send(tcp(Way::In, flags), Stack::Drops));
    }
}

#[test]
fn what_a_syn_admitted_must_prove_itself_in_mode_established() {
    let mut node = Node::new(mode::SYN);
    assert!(node.send(tcp(Way::Out, SYN), Stack::Drops));
    node.now.mode = mode::ESTABLISHED;
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Passes));
    assert!(!node.send(tcp(Way::In, ACK), Stack::Passes));
    assert!(node.send(tcp(Way::Out, ACK), Stack::Passes));
}

#[test]
fn the_end_of_what_a_syn_admitted_passes_in_another_mode_and_epoch() {
    for closer in [FIN | ACK, RST, RST | ACK] {
        let mut node = Node::new(mode::SYN);
        assert!(node.send(tcp(Way::Out, SYN), Stack::Drops));
        node.now.mode = mode::ESTABLISHED;
        node.now.epoch += 1;
        assert!(!node.send(tcp(Way::Out, ACK), Stack::Drops));
        assert!(node.send(tcp(Way::In, closer), Stack::Drops));
        // Not in the name of another pod, and not with the gate shut.
        let mut other = node.clone();
        other.now.generation += 1;
        assert!(!other.send(tcp(Way::In, closer), Stack::Drops));
        node.now.mode = mode::OFF;
        assert!(!node.send(tcp(Way::In, closer), Stack::Drops));
    }
}

#[test]
fn once_the_stack_knows_what_a_syn_admitted_the_end_goes_there_too() {
    let mut node = Node::new(mode::SYN);
    assert!(node.send(tcp(Way::Out, SYN), Stack::Drops));
    node.now.mode = mode::ESTABLISHED;
    assert!(!node.send(tcp(Way::Out, ACK), Stack::Passes));
    assert!(!node.send(tcp(Way::Out, FIN | ACK), Stack::Passes));
    assert!(!node.send(tcp(Way::In, FIN | ACK), Stack::Passes));
}

#[test]
fn the_pair_is_named_by_the_port_that_the_opening_packet_goes_to() {
    let key = FlowKey {
        local: [10, 244, 1, 2],
        remote: [10, 244, 2, 2],
        local_port: [0x80, 1],
        remote_port: [0, 80],
        proto: PROTO_TCP,
        reserved: [0; 3],
    };
    assert_eq!(key.pair(Way::Out).port, [0, 80]);
    assert_eq!(key.pair(Way::In).port, [0x80, 1]);
    assert_ne!(key.pair(Way::Out), key.pair(Way::In));
}

#[test]
fn tags_fit_sixteen_bits() {
    for cpus in [1, 2, 255, 256, 1024, 4096, 65_000, 100_000] {
        let shift = ring_shift(cpus);
        assert!(cpus >= 65_535 || (u64::from(cpus) << shift) < u64::from(JUDGED));
        assert!(shift <= 8);
    }
    assert_eq!(ring_shift(2), 8);
    assert_eq!(ring_shift(255), 8);
    assert_eq!(ring_shift(256), 7);
}

fn packets() -> impl Strategy<Value = (Packet, Stack, u64)> {
    let way = prop_oneof![Just(Way::Out), Just(Way::In)];
    let flags = prop_oneof![
        4 => Just(ACK),
        1 => Just(SYN),
        1 => Just(SYN | ACK),
        1 => Just(FIN | ACK),
        1 => Just(RST),
        1 => any::<u8>(),
    ];
    let stack = prop_oneof![
        6 => Just(Stack::Passes),
        1 => Just(Stack::Drops),
        1 => Just(Stack::Translates),
    ];
    let wait = prop_oneof![8 => Just(0), 1 => Just(LEASE)];
    (way, flags, stack, wait).prop_map(|(way, flags, stack, wait)| (tcp(way, flags), stack, wait))
}

proptest! {
    /// Whatever the history: a TCP packet is fast only if since the last opening, closing, translation and dropped lease the stack
    /// has passed a packet of each direction, and one of its own direction within the lease.
    #[test]
    fn fast_is_always_proven(history in proptest::collection::vec(packets(), 1..60)) {
        let mut node = Node::new(mode::ESTABLISHED);
        let mut proof: [Option<u64>; 2] = [None; 2];
        let mut closed = false;
        let (mut tried, mut undelivered) = ([false; 2], [false; 2]);
        for (packet, stack, wait) in history {
            node.clock += wait;
            let fast = node.send(packet, stack);
            let clock = node.clock;
            if fast {
                if packet.flags & FIN == 0 {
                    prop_assert!(!closed && packet.flags & (SYN | RST) == 0);
                } else {
                    prop_assert!(undelivered[packet.way as usize] && packet.flags & (SYN | RST) == 0);
                }
                prop_assert!(proof[0].is_some() && proof[1].is_some());
                prop_assert!(proof[packet.way as usize].is_some_and(|at| clock - at <= LEASE));
                continue;
            }
            if stack == Stack::Translates {
                (proof, closed) = ([None; 2], false);
                    (tried, undelivered) = ([false; 2], [false; 2]);
                continue;
            }
            // A close that has an entry makes a tombstone, whatever the stack then does with it.
            if packet.closes() && (proof[0].is_some() || proof[1].is_some()) {
                closed = true;
                let way = packet.way as usize;
                if !tried[way] && proof[way].is_some_and(|at| clock - at <= LEASE) {
                    proof[way] = Some(clock);
                }
                tried[way] = true;
                undelivered[way] = stack == Stack::Drops;
            }
            if stack == Stack::Passes {
                if packet.opens() {
                    (proof, closed) = ([None; 2], false);
                    (tried, undelivered) = ([false; 2], [false; 2]);
                } else if !packet.closes() && !closed {
                    proof[packet.way as usize] = Some(clock);
                }
            }
        }
    }

    /// Without drops, closes and translations every flow becomes fast in both directions.
    #[test]
    fn every_plain_flow_becomes_fast(ways in proptest::collection::vec(any::<bool>(), 0..20)) {
        let mut node = Node::new(mode::ESTABLISHED);
        node.connect();
        let ways: Vec<Way> = ways.into_iter().map(|out| if out { Way::Out } else { Way::In }).collect();
        for way in ways {
            prop_assert!(node.send(tcp(way, ACK), Stack::Passes));
        }
    }
}
