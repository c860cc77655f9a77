//! The payload of an overlay datagram that the stack has put together from fragments: what eBPF does to whole packets, for the
//! node where eBPF works alone and no vxlan device waits behind it.

use flannel_common::{DropReason, checksum, ecn, header::VXLAN_I};

use crate::addr::{Vni, VtepMac};

const VXLAN_LEN: usize = 8;
const ETH_LEN: usize = 14;
const IPV4_LEN: usize = 20;
const BROADCAST: [u8; 6] = [0xff; 6];

/// This node as a receiver, by the rules of `vxlan_rcv` (`drivers/net/vxlan/vxlan_core.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
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
        let header = packet
            .first_chunk::<IPV4_LEN>()
            .ok_or(DropReason::TooShort)?;
        if *ethertype != [0x08, 0x00] {
            return Err(DropReason::NotIpv4);
        }
        if *source == self.mac.octets() {
            return Err(DropReason::OwnSource);
        }
        if *destination != self.mac.octets() && *destination != BROADCAST {
            return Err(DropReason::OtherHost);
        }
        let [version, tos, ..] = *header;
        let bits = match ecn::decap(outer_tos, tos) {
            ecn::Decap::Drop => return Err(DropReason::Ecn),
            ecn::Decap::Keep => return Ok(frame.to_vec()),
            ecn::Decap::SetCe => ecn::CE,
            ecn::Decap::SetEct1 => ecn::ECT_1,
        };
        let marked = (tos & !ecn::MASK) | bits;
        let [.., c1, c2, _, _, _, _, _, _, _, _] = *header;
        let check = checksum::replace(
            u16::from_be_bytes([c1, c2]),
            u16::from_be_bytes([version, tos]),
            u16::from_be_bytes([version, marked]),
        );
        let mut frame = frame.to_vec();
        if let Some(byte) = frame.get_mut(ETH_LEN + 1) {
            *byte = marked;
        }
        if let Some(bytes) = frame.get_mut(ETH_LEN + 10..ETH_LEN + 12) {
            bytes.copy_from_slice(&check.to_be_bytes());
        }
        Ok(frame)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn receiver() -> Receiver {
        Receiver {
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
