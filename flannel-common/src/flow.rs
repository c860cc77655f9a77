//! The flow gate: which packets may bypass the host stack.
//!
//! A packet takes the short way only when its flow has an entry in the map `flows`, and an entry is made only by packets that the
//! stack itself has passed untouched: a hook *before* the stack tags a packet with its addresses and ports, a hook *behind* it
//! compares ([`testify`]). A missing entry is therefore only slower, never wrong, and a flow that the stack translates never gets
//! one. What was seen holds for a lease per direction; then one packet goes through the stack again.
//!
//! Everything here is plain decision on plain values, so that the host can test every history; the programs look up and store.

/// The way a packet goes, as seen from the pod at this node's end: the index of a flow's `seen`.
///
/// Between two pods of one node the one with the lower address counts as the local end.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From the local pod.
    Out = 0,
    /// To the local pod.
    In = 1,
}

/// An IPv4 address in network order.
pub type AddressV4 = [u8; 4];
/// An IPv6 address in network order.
pub type AddressV6 = [u8; 16];

/// Key of the map `flows`: one entry for both directions. `A` is [`AddressV4`] or [`AddressV6`]; each family has maps of its own.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowKey<A = AddressV4> {
    /// Address of the local pod.
    pub local: A,
    /// Address of the other pod.
    pub remote: A,
    /// The local pod's port in network order; for ICMP echo the identifier.
    pub local_port: [u8; 2],
    /// The other pod's port; for ICMP echo the identifier again.
    pub remote_port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<FlowKey>() == 16);
const _: () = assert!(size_of::<FlowKey<AddressV6>>() == 40);

/// Value of the map `flows`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// [`crate::Config::epoch`] when it was made; an entry of another epoch counts for nothing.
    pub epoch: u32,
    /// Generation of the pods when it was made, see [`crate::PodRecord::generation`].
    pub generation: u32,
    /// By [`Way`]: what became of a FIN or RST, see [`closing`]. Once there was one, nothing but a FIN's repetition is fast until a
    /// SYN passes the stack.
    pub closing: [u16; 2],
    /// Not zero if it was admitted by its first SYN: fast without witness and without lease.
    pub by_syn: u32,
    /// By [`Way`]: when the stack last passed a packet untouched, in nanoseconds of the kernel's clock; zero for never.
    pub seen: [u64; 2],
}

const _: () = assert!(size_of::<Flow>() == 32);

/// Values of [`Flow::closing`].
pub mod closing {
    /// There was none.
    pub const NONE: u16 = 0;
    /// One went to the stack.
    pub const SENT: u16 = 1;
    /// One came out of the stack.
    pub const PASSED: u16 = 2;
}

/// What the hook before the stack saw: an entry of the map `ring`, whose number plus one travels in `skb->tc_index`, and of `last`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sighting<A = AddressV4> {
    /// The packet's flow.
    pub key: FlowKey<A>,
    /// Its [`Way`] plus one; zero for no packet.
    pub way: u32,
}

const _: () = assert!(size_of::<Sighting>() == 20);
const _: () = assert!(size_of::<Sighting<AddressV6>>() == 44);

/// The per-CPU entry of the map `last`: the latest sighting, for where somebody overwrites `tc_index`, and the next slot of `ring`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastSighting<A = AddressV4> {
    /// The latest sighting on this CPU; empty if the latest packet was none to tag.
    pub sighting: Sighting<A>,
    /// Number of sightings so far.
    pub count: u32,
}

const _: () = assert!(size_of::<LastSighting>() == 24);
const _: () = assert!(size_of::<LastSighting<AddressV6>>() == 48);

/// Key of the map `nattuples`: two pods between which the stack also translates, at the service's port.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NatKey<A = AddressV4> {
    /// Address of the local pod.
    pub local: A,
    /// Address of the other pod.
    pub remote: A,
    /// The port that the opening packet goes to.
    pub port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// The [`Way`] of the opening packet.
    pub way: u8,
}

const _: () = assert!(size_of::<NatKey>() == 12);
const _: () = assert!(size_of::<NatKey<AddressV6>>() == 36);

impl<A: Copy> FlowKey<A> {
    /// The pair that this packet would open a connection between.
    #[inline(always)]
    pub const fn pair(&self, way: Way) -> NatKey<A> {
        NatKey {
            local: self.local,
            remote: self.remote,
            port: match way {
                Way::Out => self.remote_port,
                Way::In => self.local_port,
            },
            proto: self.proto,
            way: way as u8,
        }
    }
}

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;
/// IP protocol number of ICMP.
pub const PROTO_ICMP: u8 = 1;
/// Next header number of `ICMPv6`.
pub const PROTO_ICMPV6: u8 = 58;
/// IP protocol number of TCP.
pub const PROTO_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTO_UDP: u8 = 17;

/// Values of [`crate::Config::mode`].
pub mod mode {
    /// Every packet goes through the stack.
    pub const OFF: u32 = 0;
    /// Flows that the stack passes untouched bypass it.
    pub const ESTABLISHED: u32 = 1;
    /// TCP connections between pods bypass it from their first SYN.
    pub const SYN: u32 = 2;
    /// Everything between pods bypasses it, right or wrong: no flag sets this. It shows that a test sees the failures which the
    /// gate prevents, and what the gate costs.
    pub const UNGATED: u32 = 3;
}

/// What a packet carries that the gate looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The way it goes.
    pub way: Way,
    /// Whether it is TCP.
    pub tcp: bool,
    /// TCP flags; zero for other protocols.
    pub flags: u8,
}

impl Packet {
    /// A SYN without ACK, FIN or RST: it opens a connection.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.tcp && self.flags & (SYN | ACK | FIN | RST) == SYN
    }

    /// A FIN or RST.
    #[inline(always)]
    pub const fn closes(self) -> bool {
        self.tcp && self.flags & (FIN | RST) != 0
    }
}

/// What an entry must agree with to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The gate's mode, see [`mode`].
    pub mode: u32,
    /// The present epoch.
    pub epoch: u32,
    /// The pods' present generation.
    pub generation: u32,
    /// How long a sighting holds, in nanoseconds.
    pub lease: u64,
}

impl Now {
    /// Whether an entry is of the present.
    #[inline(always)]
    pub const fn knows(&self, flow: &Flow) -> bool {
        flow.epoch == self.epoch && flow.generation == self.generation
    }
}

/// What the gate says before the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Past the stack.
    Fast,
    /// Through the stack.
    Slow,
    /// Through the stack, and nothing of this flow is fast any more: [`close`].
    Close,
    /// Past the stack if the pair is not in `nattuples`, the target device is there and a new entry can be made
    /// ([`admitted`]); else through the stack.
    Admit,
}

/// Judges a packet before the stack. `flow` is its entry, whatever its epoch; `clock` is asked only where the answer matters.
#[inline(always)]
pub fn judge(
    now: &Now,
    packet: Packet,
    flow: Option<&Flow>,
    clock: impl FnOnce() -> u64,
) -> Judgement {
    if now.mode == mode::OFF {
        return Judgement::Slow;
    }
    if now.mode == mode::UNGATED {
        return Judgement::Fast;
    }
    if now.mode == mode::SYN && packet.opens() {
        return Judgement::Admit;
    }
    let Some(flow) = flow else {
        return Judgement::Slow;
    };
    // To connection tracking the end of a connection that it never saw is invalid, also in another mode and another epoch. A close
    // violates no policy, and nothing of the flow has passed the stack since, or the entry would be another.
    if flow.by_syn != 0
        && flow.generation == now.generation
        && packet.closes()
        && packet.flags & SYN == 0
    {
        return Judgement::Fast;
    }
    if !now.knows(flow) {
        return Judgement::Slow;
    }
    if flow.by_syn != 0 && now.mode == mode::SYN {
        return Judgement::Fast;
    }
    let [out, back] = flow.seen;
    let (seen, close) = match packet.way {
        Way::Out => (out, flow.closing[0]),
        Way::In => (back, flow.closing[1]),
    };
    if packet.tcp && packet.flags & (SYN | FIN | RST) != 0 {
        if packet.closes() && close == closing::NONE {
            // Before the stack, so that a close which the stack drops leaves no live entry behind.
            return Judgement::Close;
        }
        // A FIN that the stack did not let out and that comes again: connection tracking has lost the connection (a flush), and to
        // it a FIN of a connection it does not know is invalid. Without it the peer would never see the end.
        if packet.flags & (SYN | FIN | RST) != FIN || close != closing::SENT {
            return Judgement::Slow;
        }
    } else if flow.closing != [closing::NONE; 2] {
        return Judgement::Slow;
    }
    // A direction of UDP that passes untranslated has none in the other direction either; of TCP the stack must have seen both, so
    // that its connection tracking has seen the handshake.
    if seen == 0 || (packet.tcp && (out == 0 || back == 0)) {
        return Judgement::Slow;
    }
    // Another CPU may have stored a moment that this one's clock has not reached.
    if clock().saturating_sub(seen) <= now.lease {
        Judgement::Fast
    } else {
        Judgement::Slow
    }
}

/// Notes a FIN or RST that goes to the stack. What holds then holds for a lease more, in case it must come again.
#[inline(always)]
pub fn close(now: &Now, flow: &mut Flow, way: Way, clock: u64) {
    let (seen, close) = match way {
        Way::Out => (&mut flow.seen[0], &mut flow.closing[0]),
        Way::In => (&mut flow.seen[1], &mut flow.closing[1]),
    };
    if *seen != 0 && clock.saturating_sub(*seen) <= now.lease {
        *seen = clock;
    }
    *close = closing::SENT;
}

/// The entry of a connection that was admitted by its SYN.
#[inline(always)]
pub const fn admitted(now: &Now) -> Flow {
    Flow {
        epoch: now.epoch,
        generation: now.generation,
        closing: [closing::NONE; 2],
        by_syn: 1,
        seen: [0; 2],
    }
}

/// What a packet proves behind the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Testimony {
    /// Nothing.
    Nothing,
    /// The stack passes this direction untouched: set [`Flow::seen`] in the entry, which is of the present.
    Confirm,
    /// The same, and there is no entry of the present yet: make one ([`witnessed`]).
    Begin,
    /// A FIN or RST came out of the stack: set [`Flow::closing`] of this way to [`closing::PASSED`] in the entry.
    Closed,
    /// A new connection begins: whatever was known is over.
    Forget,
    /// The stack translates this flow, or it came from elsewhere: remove the entry.
    Refute,
    /// As [`Testimony::Refute`], and remember the pair in `nattuples`.
    RefutePair,
}

/// Weighs a packet behind the stack. `tagged`: the hook before the stack saw exactly this packet, with these addresses and ports.
#[inline(always)]
pub fn testify(now: &Now, packet: Packet, tagged: bool, flow: Option<&Flow>) -> Testimony {
    if !tagged {
        return if packet.opens() || !packet.tcp {
            Testimony::RefutePair
        } else {
            Testimony::Refute
        };
    }
    if packet.opens() {
        // Counting it would leave connection tracking in SYN_RECV: the packet that completes the handshake must pass too.
        return Testimony::Forget;
    }
    if packet.closes() {
        return match flow {
            Some(flow) if now.knows(flow) => Testimony::Closed,
            _ => Testimony::Nothing,
        };
    }
    match flow {
        Some(flow) if now.knows(flow) && flow.closing != [closing::NONE; 2] => Testimony::Nothing,
        // The stack knows the connection from now on, so its end must go there too.
        Some(flow) if now.knows(flow) && flow.by_syn == 0 => Testimony::Confirm,
        _ => Testimony::Begin,
    }
}

/// The entry of a flow of which one packet was seen.
#[inline(always)]
pub const fn witnessed(now: &Now, way: Way, clock: u64) -> Flow {
    Flow {
        epoch: now.epoch,
        generation: now.generation,
        closing: [closing::NONE; 2],
        by_syn: 0,
        seen: match way {
            Way::Out => [clock, 0],
            Way::In => [0, clock],
        },
    }
}

/// Slots of the map `ring` for one CPU, as a power of two: 256, or fewer where the numbers of all would not fit the 16 bits of
/// `tc_index` (0 means none, [`JUDGED`] is taken).
pub const fn ring_shift(cpus: u32) -> u32 {
    let mut shift = 8;
    while shift > 0 && (cpus as u64) << shift >= JUDGED as u64 {
        shift -= 1;
    }
    shift
}

/// Value of `tc_index` on a packet that `from_wire` has judged and hands to the tunnel device.
pub const JUDGED: u16 = 0xffff;

#[cfg(test)]
mod tests;
