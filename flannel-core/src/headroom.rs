//! A port of the pods' bridge that makes room in front of what pods send.
//!
//! Outer headers need 50 bytes in front of a packet. A pod's socket leaves room for Ethernet alone, so that every datagram is copied
//! when it is encapsulated. A bridge tells the largest need of its ports to all of them (`update_headroom` in
//! `net/bridge/br_if.c`), and a veth tells its peer (`veth_set_rx_headroom`): a vxlan device among the ports, which is never set
//! up and carries nothing, has the pods' sockets leave the room at once. Its price: the bridge's `tso_max_size` is then 64 KiB.

use crate::addr::IfIndex;

/// MAC address of the device: the highest of all, for a bridge without an address of its own takes the lowest of its ports.
pub const MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

/// What there should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The pods' bridge.
    pub bridge: IfIndex,
    /// Its MTU in bytes: a bridge without one of its own takes the smallest of its ports.
    pub mtu: u32,
}

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct There {
    /// Interface index.
    pub index: IfIndex,
    /// The bridge whose port it is.
    pub bridge: Option<IfIndex>,
    /// MTU in bytes.
    pub mtu: u32,
}

/// A change to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make the device, as a port of the bridge.
    Create(Wanted),
    /// Remove the device.
    Remove(IfIndex),
}

/// The next change, if there is one. A device that is another's port is removed, and made anew by the change after.
pub fn change(wanted: Option<Wanted>, there: Option<There>) -> Option<Change> {
    match (wanted, there) {
        (None, None) => None,
        (Some(wanted), None) => Some(Change::Create(wanted)),
        // A bridge that takes the smallest MTU of its ports must not be held down by this one.
        (Some(wanted), Some(there))
            if there.bridge == Some(wanted.bridge) && there.mtu >= wanted.mtu =>
        {
            None
        }
        (_, Some(there)) => Some(Change::Remove(there.index)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(number: u32) -> IfIndex {
        IfIndex::try_from(number).unwrap()
    }

    #[test]
    fn made_kept_moved_and_removed() {
        let wanted = Wanted {
            bridge: index(5),
            mtu: 1450,
        };
        let there = There {
            index: index(9),
            bridge: Some(index(5)),
            mtu: 1450,
        };
        assert_eq!(change(None, None), None);
        assert_eq!(change(Some(wanted), None), Some(Change::Create(wanted)));
        assert_eq!(change(Some(wanted), Some(there)), None);
        let remove = Some(Change::Remove(index(9)));
        assert_eq!(change(None, Some(there)), remove);
        for elsewhere in [
            There {
                bridge: None,
                ..there
            },
            There {
                bridge: Some(index(6)),
                ..there
            },
            There { mtu: 1400, ..there },
        ] {
            assert_eq!(change(Some(wanted), Some(elsewhere)), remove);
        }
    }
}
