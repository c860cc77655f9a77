//! The payload of an overlay datagram that the stack has put together from fragments: what eBPF does to whole packets, for the
//! node where eBPF works alone and no vxlan device waits behind it.

use flannel_common::{DropReason, checksum, ecn, header::VXLAN_I};

use crate::addr::{Family, Vni, VtepMac};

const VXLAN_LEN: usize = 8;
const ETH_LEN: usize = 14;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const BROADCAST: [u8; 6] = [0xff; 6];

/// This node as a receiver, by the rules of `vxlan_rcv` (`drivers/net/vxlan/vxlan_core.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// What it receives.
    pub family: Family,
    /// Network identifier.
    pub vni: Vni,
    /// MAC address of our tunnel device.
    pub mac: VtepMac,
}

impl Receiver {
    /// The inner Ethernet frame of a UDP payload, to be received on the tunnel device. `outer_tos` is the TOS byte of the outer
    /// header.
    pub fn frame(&self, datagram: &[u8], outer_tos: u8) -> Result<Vec<u8>, DropReason> {
        let (vxlan, frame) = datagram
            .split_first_chunk::<VXLAN_LEN>()
            .ok_or(DropReason::TooShort)?;
        let [flags, r1, r2, r3, v1, v2, v3, r4] = *vxlan;
        if flags & VXLAN_I == 0 {
            return Err(DropReason::NoVni);
        }
        if u32::from_be_bytes([0, v1, v2, v3]) != self.vni.get() {
            return Err(DropReason::OtherVni);
        }
        if flags != VXLAN_I || [r1, r2, r3, r4] != [0; 4] {
            return Err(DropReason::Reserved);
        }
        let (destination, rest) = frame.split_first_chunk::<6>().ok_or(DropReason::TooShort)?;
        let (source, rest) = rest.split_first_chunk::<6>().ok_or(DropReason::TooShort)?;
        let (ethertype, packet) = rest.split_first_chunk::<2>().ok_or(DropReason::TooShort)?;
        let (wanted, other, header_len) = match self.family {
            Family::V4 => ([0x08, 0x00], DropReason::NotIpv4, IPV4_LEN),
            Family::V6 => ([0x86, 0xdd], DropReason::NotIpv6, IPV6_LEN),
        };
        if packet.len() < header_len {
            return Err(DropReason::TooShort);
        }
        if *ethertype != wanted {
            return Err(other);
        }
        if *source == self.mac.octets() {
            return Err(DropReason::OwnSource);
        }
        if *destination != self.mac.octets() && *destination != BROADCAST {
            return Err(DropReason::OtherHost);
        }
        let mut frame = frame.to_vec();
        let inner = frame.get_mut(ETH_LEN..).ok_or(DropReason::TooShort)?;
        mark(self.family, inner, outer_tos)?;
        Ok(frame)
    }
}

/// Propagates the congestion marks of the outer header (RFC 6040) to the inner one.
fn mark(family: Family, packet: &mut [u8], outer_tos: u8) -> Result<(), DropReason> {
    let Some([first, second, ..]) = packet.first_chunk_mut::<IPV4_LEN>() else {
        return Err(DropReason::TooShort);
    };
    // The traffic class of IPv6 is half in the one byte and half in the other.
    let tos = match family {
        Family::V4 => *second,
        Family::V6 => (*first << 4) | (*second >> 4),
    };
    let bits = match ecn::decap(outer_tos, tos) {
        ecn::Decap::Drop => return Err(DropReason::Ecn),
        ecn::Decap::Keep => return Ok(()),
        ecn::Decap::SetCe => ecn::CE,
        ecn::Decap::SetEct1 => ecn::ECT_1,
    };
    let marked = (tos & !ecn::MASK) | bits;
    let before = [*first, *second];
    match family {
        Family::V4 => *second = marked,
        Family::V6 => *second = (*second & 0x0f) | (marked << 4),
    }
    let after = [*first, *second];
    if family == Family::V4
        && let Some(check) = packet
            .get_mut(10..12)
            .and_then(|bytes| bytes.first_chunk_mut())
    {
        *check = checksum::replace(
            u16::from_be_bytes(*check),
            u16::from_be_bytes(before),
            u16::from_be_bytes(after),
        )
        .to_be_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn receiver() -> Receiver {
        Receiver {
            family: Family::V4,
            vni: Vni::try_from(1).unwrap(),
            mac: OWN.into(),
        }
    }

    /// A right datagram with a TOS byte inside.
    fn datagram(tos: u8) -> Vec<u8> {
        let mut ip = [
            0x45, tos, 0, 24, 0, 1, 0, 0, 64, 17, 0, 0, 10, 5, 1, 2, 10, 5, 2, 2,
        ];
        let check = checksum::finish(checksum::sum(&ip, 0));
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        [
            &[VXLAN_I, 0, 0, 0, 0, 0, 1, 0][..],
            &OWN,
            &PEER,
            &[8, 0],
            &ip,
            &[1, 2, 3, 4],
        ]
        .concat()
    }

    #[test]
    fn a_right_datagram_gives_its_frame() {
        let datagram = datagram(0);
        assert_eq!(receiver().frame(&datagram, 0), Ok(datagram[8..].to_vec()));
    }

    #[test]
    fn each_rule_refuses() {
        let cases: [(usize, u8, DropReason); 8] = [
            (0, 0x00, DropReason::NoVni),
            (0, 0x88, DropReason::Reserved),
            (2, 1, DropReason::Reserved),
            (7, 1, DropReason::Reserved),
            (6, 2, DropReason::OtherVni),
            (13, 9, DropReason::OtherHost),
            (19, 1, DropReason::OwnSource),
            (21, 6, DropReason::NotIpv4),
        ];
        for (at, value, reason) in cases {
            let mut datagram = datagram(0);
            datagram[at] = value;
            assert_eq!(receiver().frame(&datagram, 0), Err(reason), "byte {at}");
        }
        for len in 0..8 + 14 + 20 {
            assert_eq!(
                receiver().frame(&datagram(0)[..len], 0),
                Err(DropReason::TooShort),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn congestion_marks_come_through() {
        assert_eq!(
            receiver().frame(&datagram(0), ecn::CE),
            Err(DropReason::Ecn)
        );
        for (inner, outer, marked) in [(2, 3, 3), (1, 3, 3), (2, 1, 1)] {
            let frame = receiver().frame(&datagram(0xb8 | inner), outer).unwrap();
            assert_eq!(frame[15], 0xb8 | marked);
            let header: [u8; 20] = frame[14..34].try_into().unwrap();
            assert!(checksum::ipv4_header_is_valid(&header));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), tos: u8) {
            let _any = receiver().frame(&bytes, tos);
        }
    }
}
