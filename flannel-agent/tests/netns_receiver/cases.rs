//! How a deviation is made, and what should become of it.

use flannel_testkit::packet::{Address, Csum, Inner, L4, Vxlan};

/// Port of the pod's socket to which the packets go.
pub(crate) const PORT: u16 = 9;
/// Port of the socket that hears the last packet.
pub(crate) const SENTINEL_PORT: u16 = 10;

/// A family of which packets are received.
pub(crate) trait Received: Address {
    /// The peer, and a pod of it.
    const PEER: Self;
    const PEER_POD: Self;
    /// The outer UDP checksum that our nodes send.
    const CSUM: Csum;
    /// Why a packet of another family is left alone.
    const NOT_THIS: Outcome;

    /// Writes the number of a case into a header, where routers leave it alone, and fragments have it.
    fn mark(header: &mut Self::Header, number: u16);
    /// The number in the header of a packet from the peer's pods; 0 for any other.
    fn number(frame: &[u8]) -> u16;
    /// All deviations.
    fn all(list: &mut List<Self>);
}

/// The node under test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<A> {
    pub(crate) node: A,
    pub(crate) node_mac: [u8; 6],
    pub(crate) vtep_mac: [u8; 6],
    pub(crate) pod: A,
}

/// What eBPF does with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Takes the outer headers off.
    Carried,
    /// Leaves it to the kernel's device, or drops it where there is none, for this reason.
    Left(&'static str),
    /// Leaves it to the host, uncounted.
    NotOurs,
}

/// A deviation.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) number: u16,
    pub(crate) frames: Vec<Vec<u8>>,
    outcome: Outcome,
    /// How many of the frames count.
    pub(crate) counted: u64,
    /// Has a wrong one: alone nobody notices.
    pub(crate) unverified: bool,
    /// For the stack to receive, though eBPF takes it for somebody else's.
    pub(crate) for_the_stack: bool,
    /// What eBPF would do if the checksum were zero.
    pub(crate) beyond_checksum: Outcome,
}

impl Case {
    /// What eBPF does, `alone` without the kernel's device.
    pub(crate) fn outcome(&self, alone: bool) -> Outcome {
        if alone {
            self.beyond_checksum
        } else {
            self.outcome
        }
    }

    /// Whether a node without the kernel's device delivers it like one that has it: what eBPF carries, and what the stack alone
    /// can put in shape for the agent's own socket.
    pub(crate) fn same_alone(&self) -> bool {
        let to_socket = [
            Outcome::Left("outer_fragment"),
            Outcome::Left("outer_options"),
        ];
        self.beyond_checksum == Outcome::Carried
            || to_socket.contains(&self.beyond_checksum)
            || self.for_the_stack
    }
}

impl<A: Received> Target<A> {
    /// A packet for the pod with the number of its case in the inner source MAC and the inner header.
    pub(crate) fn inner(&self, number: u16, len: usize) -> Inner<A> {
        let data: Vec<u8> = (0..len).map(|at| at as u8).collect();
        let [a, b] = number.to_be_bytes();
        let mut inner = Inner::udp(A::PEER_POD, self.pod, PORT, &data)
            .with_macs([0x02, 0xfe, 0, 0, a, b], self.vtep_mac);
        A::mark(&mut inner.ip, number);
        inner
    }

    /// A frame as our own node would send it.
    pub(crate) fn outer(&self, inner: Vec<u8>) -> Vxlan<A> {
        Vxlan {
            dst_mac: self.node_mac,
            src_mac: [0x02, 0xfe, 0xff, 0, 0, 9],
            udp_csum: A::CSUM,
            ..Vxlan::new(A::PEER, self.node, 1, inner)
        }
    }

    /// The frames whose arrival says that all before them have been dealt with: fragments, which take the longest way.
    pub(crate) fn sentinel(&self) -> Vec<Vec<u8>> {
        let mut inner = self.inner(u16::MAX, 400);
        if let L4::Udp { dst_port, .. } = &mut inner.l4 {
            *dst_port = SENTINEL_PORT;
        }
        let mut frame = self.outer(inner.bytes());
        A::mark(&mut frame.ip, u16::MAX);
        frame.fragments(300).expect("fragments")
    }
}

/// All cases. Each has its number from its place in the list.
pub(crate) fn all<A: Received>(target: &Target<A>) -> Vec<Case> {
    let mut list = List {
        target: *target,
        cases: Vec::new(),
    };
    A::all(&mut list);
    list.cases
}

/// The cases so far.
pub(crate) struct List<A> {
    pub(crate) target: Target<A>,
    cases: Vec<Case>,
}

impl<A: Received> List<A> {
    fn number(&self) -> u16 {
        self.cases.len() as u16 + 1
    }

    /// A case of frames made by hand.
    pub(crate) fn raw(
        &mut self,
        name: impl Into<String>,
        outcome: Outcome,
        make: impl FnOnce(&Target<A>, u16) -> Vec<Vec<u8>>,
    ) {
        let number = self.number();
        let frames = make(&self.target, number);
        let counted = frames.len() as u64;
        self.cases.push(Case {
            name: name.into(),
            number,
            frames,
            outcome,
            counted,
            unverified: false,
            for_the_stack: false,
            beyond_checksum: outcome,
        });
    }

    /// A usual frame with one change to its outer headers.
    pub(crate) fn outer(
        &mut self,
        name: impl Into<String>,
        outcome: Outcome,
        change: impl FnOnce(&mut Vxlan<A>),
    ) {
        self.raw(name, outcome, |target, number| {
            let mut frame = target.outer(target.inner(number, 40).bytes());
            change(&mut frame);
            vec![frame.bytes()]
        });
    }

    /// Changes the case just made.
    pub(crate) fn amend(&mut self, change: impl FnOnce(&mut Case)) {
        change(self.cases.last_mut().expect("a case"));
    }

    /// A usual frame with one change to its inner packet, as [`List::with_and_without_checksum`] says.
    pub(crate) fn inner(
        &mut self,
        name: &str,
        outcome: Outcome,
        change: impl Fn(&mut Inner<A>, &Target<A>),
    ) {
        self.inner_bytes(name, outcome, |target, number| {
            let mut inner = target.inner(number, 40);
            change(&mut inner, target);
            inner.bytes()
        });
    }

    /// Like [`List::inner`], of any bytes.
    pub(crate) fn inner_bytes(
        &mut self,
        name: &str,
        outcome: Outcome,
        make: impl Fn(&Target<A>, u16) -> Vec<u8>,
    ) {
        self.with_and_without_checksum(name, outcome, |target, number| {
            target.outer(make(target, number))
        });
    }

    /// A frame without a UDP checksum and with a right one, which eBPF leaves to the kernel's stack to verify. `too_short` comes first.
    /// Over IPv6 there is a checksum in any case.
    pub(crate) fn with_and_without_checksum(
        &mut self,
        name: &str,
        outcome: Outcome,
        make: impl Fn(&Target<A>, u16) -> Vxlan<A>,
    ) {
        self.raw(name, outcome, |target, number| {
            vec![make(target, number).bytes()]
        });
        if A::CSUM == Csum::Right {
            return;
        }
        self.raw(
            format!("{name}, with checksum"),
            outcome,
            |target, number| {
                let frame = Vxlan {
                    udp_csum: Csum::Right,
                    ..make(target, number)
                };
                vec![frame.bytes()]
            },
        );
        if outcome != Outcome::Left("too_short") {
            self.amend(|case| case.outcome = Outcome::Left("outer_checksum"));
        }
    }
}
