//! Messages of the kernel's WireGuard interface: generic netlink, written and read as bytes.
//!
//! Numbers are those of `include/uapi/linux/{netlink,genetlink,wireguard}.h`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
};

use ipnet::IpNet;
use thiserror::Error;

use super::{Inner, Peer, SESSION_SECONDS, SeenPeer};
use crate::key::{LEN, PublicKey, SecretKey};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct genlmsghdr`.
const GENERIC: usize = 4;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const F_REQUEST: u16 = 1;
const F_ACK: u16 = 4;
const F_DUMP: u16 = 0x300;
const NESTED: u16 = 1 << 15;
/// What of an attribute's kind is its number.
const KIND: u16 = 0x3fff;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;

const DEVICE_NAME: u16 = 2;
const DEVICE_PRIVATE_KEY: u16 = 3;
const DEVICE_PUBLIC_KEY: u16 = 4;
const DEVICE_LISTEN_PORT: u16 = 6;
const DEVICE_PEERS: u16 = 8;

const PEER_PUBLIC_KEY: u16 = 1;
const PEER_PRESHARED_KEY: u16 = 2;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_KEEPALIVE: u16 = 5;
const PEER_LAST_HANDSHAKE: u16 = 6;
const PEER_RX_BYTES: u16 = 7;
const PEER_TX_BYTES: u16 = 8;
const PEER_ALLOWED: u16 = 9;

const REMOVE_ME: u32 = 1;
const REPLACE_ALLOWED: u32 = 2;

const ALLOWED_FAMILY: u16 = 1;
const ALLOWED_ADDRESS: u16 = 2;
const ALLOWED_MASK: u16 = 3;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// An answer that is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// It ends too early, or a length in it is wrong.
    #[error("the kernel's answer is cut short")]
    Short,
    /// The kernel's own error.
    #[error("the kernel refuses: errno {0}")]
    Errno(i32),
}

/// A message that is being written.
#[derive(Debug)]
struct Message(Vec<u8>);

impl Message {
    fn new(family: u16, flags: u16, command: u8) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes.extend([command, 1, 0, 0]);
        for (at, value) in [(4, family), (6, F_REQUEST | flags)] {
            for (to, from) in bytes.iter_mut().skip(at).zip(value.to_ne_bytes()) {
                *to = from;
            }
        }
        Self(bytes)
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        let length = value.len() as u16 + 4;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let at = self.0.len();
        self.put(kind | NESTED, &[]);
        inside(self);
        let length = (self.0.len() - at) as u16;
        for (to, from) in self.0.iter_mut().skip(at).zip(length.to_ne_bytes()) {
            *to = from;
        }
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        for (to, from) in self.0.iter_mut().zip(length.to_ne_bytes()) {
            *to = from;
        }
        self.0
    }
}

fn name_bytes(name: &str) -> Vec<u8> {
    name.bytes().chain([0]).collect()
}

/// Asks for the number of the generic netlink family `wireguard`. Without the module the kernel answers `ENOENT`.
pub fn ask_family() -> Vec<u8> {
    let mut message = Message::new(GENL_ID_CTRL, F_ACK, CTRL_CMD_GETFAMILY);
    message.put(CTRL_ATTR_FAMILY_NAME, &name_bytes("wireguard"));
    message.finish()
}

/// Asks for all of a device.
pub fn ask_device(family: u16, device: &str) -> Vec<u8> {
    let mut message = Message::new(family, F_DUMP, WG_CMD_GET_DEVICE);
    message.put(DEVICE_NAME, &name_bytes(device));
    message.finish()
}

/// Sets private key and port of a device.
pub fn set_device(family: u16, device: &str, private: &SecretKey, port: u16) -> Vec<u8> {
    let mut message = Message::new(family, F_ACK, WG_CMD_SET_DEVICE);
    message.put(DEVICE_NAME, &name_bytes(device));
    message.put(DEVICE_PRIVATE_KEY, private.bytes());
    message.put(DEVICE_LISTEN_PORT, &port.to_ne_bytes());
    message.finish()
}

/// Adds or changes a peer. What it may send is replaced as a whole; what another peer had of that goes over to this one.
pub fn put_peer(
    family: u16,
    device: &str,
    key: &PublicKey,
    peer: &Peer,
    endpoint: bool,
) -> Vec<u8> {
    set_peer(family, device, |message| {
        message.put(PEER_PUBLIC_KEY, key.bytes());
        let none = SecretKey::new([0; LEN]);
        message.put(
            PEER_PRESHARED_KEY,
            peer.psk.as_ref().unwrap_or(&none).bytes(),
        );
        message.put(PEER_FLAGS, &REPLACE_ALLOWED.to_ne_bytes());
        if endpoint {
            message.put(PEER_ENDPOINT, &socket_address(peer.endpoint));
        }
        message.put(PEER_KEEPALIVE, &peer.keepalive.to_ne_bytes());
        message.nest(PEER_ALLOWED, |message| {
            for net in &peer.allowed {
                message.nest(0, |message| {
                    let (family, address) = match net.network() {
                        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
                        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
                    };
                    message.put(ALLOWED_FAMILY, &family.to_ne_bytes());
                    message.put(ALLOWED_ADDRESS, &address);
                    message.put(ALLOWED_MASK, &[net.prefix_len()]);
                });
            }
        });
    })
}

/// Removes a peer; one that is not there is removed already.
pub fn remove_peer(family: u16, device: &str, key: &PublicKey) -> Vec<u8> {
    set_peer(family, device, |message| {
        message.put(PEER_PUBLIC_KEY, key.bytes());
        message.put(PEER_FLAGS, &REMOVE_ME.to_ne_bytes());
    })
}

fn set_peer(family: u16, device: &str, peer: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::new(family, F_ACK, WG_CMD_SET_DEVICE);
    message.put(DEVICE_NAME, &name_bytes(device));
    message.nest(DEVICE_PEERS, |message| message.nest(0, peer));
    message.finish()
}

/// `struct sockaddr_in` or `sockaddr_in6`.
fn socket_address(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(v4) => {
            bytes.extend(AF_INET.to_ne_bytes());
            bytes.extend(v4.port().to_be_bytes());
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend(AF_INET6.to_ne_bytes());
            bytes.extend(v6.port().to_be_bytes());
            bytes.extend(v6.flowinfo().to_be_bytes());
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn read_socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(array(bytes, 2)?);
    match u16::from_ne_bytes(array(bytes, 0)?) {
        AF_INET => Some((Ipv4Addr::from(array::<4>(bytes, 4)?), port).into()),
        AF_INET6 => {
            let ip = Ipv6Addr::from(array::<16>(bytes, 8)?);
            // The scope counts for link-local addresses alone, and these are in no lease.
            Some(SocketAddrV6::new(ip, port, 0, 0).into())
        }
        _ => None,
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// What one read of the socket has given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The attributes of each message.
    pub parts: Vec<&'a [u8]>,
    /// Whether nothing more comes.
    pub done: bool,
}

/// Takes what was read from the socket apart.
pub fn answer(bytes: &[u8]) -> Result<Answer<'_>, WireError> {
    let mut found = Answer::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        let length = array(rest, 0)
            .map(u32::from_ne_bytes)
            .ok_or(WireError::Short)?;
        let length = usize::try_from(length).map_err(|_huge| WireError::Short)?;
        let kind = array(rest, 4)
            .map(u16::from_ne_bytes)
            .ok_or(WireError::Short)?;
        let message = rest
            .get(..length)
            .filter(|message| message.len() >= HEADER)
            .ok_or(WireError::Short)?;
        match kind {
            NLMSG_ERROR | NLMSG_DONE => {
                let code = array(message, HEADER).map_or(0, i32::from_ne_bytes);
                if code < 0 {
                    return Err(WireError::Errno(code.saturating_neg()));
                }
                found.done = true;
            }
            _ => found
                .parts
                .push(message.get(HEADER + GENERIC..).ok_or(WireError::Short)?),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

/// The attributes of a message, by number, in order.
fn attributes(bytes: &[u8]) -> Result<Vec<(u16, &[u8])>, WireError> {
    let mut found = Vec::new();
    let mut rest = bytes;
    while rest.len() >= 4 {
        let length = array(rest, 0).map_or(0, u16::from_ne_bytes);
        let kind = array(rest, 2).map_or(0, u16::from_ne_bytes);
        let value = rest.get(4..usize::from(length)).ok_or(WireError::Short)?;
        found.push((kind & KIND, value));
        let next = usize::from(length).next_multiple_of(4);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(found)
}

/// The number of the family, from the answer to [`ask_family`].
pub fn family(part: &[u8]) -> Result<Option<u16>, WireError> {
    let found = attributes(part)?.into_iter();
    let mut ids = found.filter(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID);
    Ok(ids
        .next()
        .and_then(|(_, value)| array(value, 0))
        .map(u16::from_ne_bytes))
}

/// Adds one message of the answer to [`ask_device`] to what earlier ones have told: a device with many peers comes in several, and so
/// does a peer with many networks. `now` is in seconds since 1970.
pub fn read_device(inner: &mut Inner, part: &[u8], now: u64) -> Result<(), WireError> {
    for (kind, value) in attributes(part)? {
        match kind {
            DEVICE_PRIVATE_KEY => inner.private = secret(value),
            DEVICE_PUBLIC_KEY => inner.public = array(value, 0).map(PublicKey::new),
            DEVICE_LISTEN_PORT => inner.port = array(value, 0).map_or(0, u16::from_ne_bytes),
            DEVICE_PEERS => {
                for (_, peer) in attributes(value)? {
                    read_peer(&mut inner.peers, peer, now)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn read_peer(
    peers: &mut BTreeMap<PublicKey, SeenPeer>,
    bytes: &[u8],
    now: u64,
) -> Result<(), WireError> {
    let found = attributes(bytes)?;
    let value = |wanted: u16| {
        found
            .iter()
            .find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| *value)
    };
    let Some(key) = value(PEER_PUBLIC_KEY).and_then(|value| array(value, 0)) else {
        return Err(WireError::Short);
    };
    let peer = peers.entry(PublicKey::new(key)).or_default();
    if let Some(value) = value(PEER_PRESHARED_KEY) {
        peer.psk = secret(value);
    }
    if let Some(value) = value(PEER_ENDPOINT) {
        peer.endpoint = read_socket_address(value);
    }
    let number = |kind| {
        value(kind)
            .and_then(|value| array(value, 0))
            .map(u64::from_ne_bytes)
    };
    if let Some(value) = value(PEER_KEEPALIVE) {
        peer.keepalive = array(value, 0).map_or(0, u16::from_ne_bytes);
    }
    if let Some(seconds) = number(PEER_LAST_HANDSHAKE) {
        peer.handshake = seconds;
        peer.alive = seconds != 0 && now.saturating_sub(seconds) < SESSION_SECONDS;
    }
    peer.received = number(PEER_RX_BYTES).unwrap_or(peer.received);
    peer.sent = number(PEER_TX_BYTES).unwrap_or(peer.sent);
    for (_, allowed) in attributes(value(PEER_ALLOWED).unwrap_or_default())? {
        peer.allowed.extend(read_allowed(allowed)?);
    }
    Ok(())
}

fn read_allowed(bytes: &[u8]) -> Result<Option<IpNet>, WireError> {
    let (mut address, mut mask) = (None, None);
    for (kind, value) in attributes(bytes)? {
        match (kind, value.len()) {
            (ALLOWED_ADDRESS, 4) => address = array::<4>(value, 0).map(IpAddr::from),
            (ALLOWED_ADDRESS, 16) => address = array::<16>(value, 0).map(IpAddr::from),
            (ALLOWED_MASK, _) => mask = value.first().copied(),
            _ => {}
        }
    }
    let net = address
        .zip(mask)
        .map(|(address, mask)| IpNet::new(address, mask));
    Ok(net.and_then(Result::ok))
}

/// A key of zeroes is none.
fn secret(value: &[u8]) -> Option<SecretKey> {
    array(value, 0)
        .filter(|bytes| *bytes != [0; LEN])
        .map(SecretKey::new)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(endpoint: &str, allowed: &[&str]) -> Peer {
        Peer {
            endpoint: endpoint.parse().unwrap(),
            allowed: allowed.iter().map(|net| net.parse().unwrap()).collect(),
            psk: Some(SecretKey::new([9; LEN])),
            keepalive: 25,
        }
    }

    /// The kernel answers with the attributes that it takes.
    #[test]
    fn what_is_written_is_read_back() {
        let key = PublicKey::new([7; LEN]);
        for (endpoint, allowed) in [
            ("192.0.2.1:51820", &["10.244.1.0/24"][..]),
            ("[2001:db8::1]:51821", &["10.244.1.0/24", "fd00:1::/64"][..]),
        ] {
            let peer = peer(endpoint, allowed);
            let bytes = put_peer(33, "flannel-wg", &key, &peer, true);
            let parts = answer(&bytes).unwrap();
            assert_eq!((parts.parts.len(), parts.done), (1, false));
            let mut inner = Inner::default();
            read_device(&mut inner, parts.parts[0], 0).unwrap();
            let seen = &inner.peers[&key];
            assert_eq!(seen.endpoint, Some(peer.endpoint));
            assert_eq!(seen.allowed, peer.allowed);
            assert_eq!(seen.psk, peer.psk);
            assert_eq!(seen.keepalive, 25);
            assert!(!seen.alive);
        }
    }

    /// Laid out by hand from the kernel's headers.
    #[test]
    fn every_byte_is_where_the_kernel_looks() {
        let bytes = set_device(0x21, "flannel-wg", &SecretKey::new([0x48; LEN]), 51_820);
        let mut wanted = Vec::new();
        wanted.extend(80u32.to_ne_bytes());
        wanted.extend(0x21u16.to_ne_bytes());
        wanted.extend([5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]);
        wanted.extend(*b"\x0f\0\x02\0flannel-wg\0\0");
        wanted.extend([36, 0, 3, 0]);
        wanted.extend([0x48; LEN]);
        wanted.extend([6, 0, 6, 0]);
        wanted.extend(51_820u16.to_ne_bytes());
        wanted.extend([0, 0]);
        let length = u32::try_from(wanted.len()).unwrap();
        wanted[..4].copy_from_slice(&length.to_ne_bytes());
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn errors_and_ends_are_told_apart() {
        let message = |kind: u16, code: i32| {
            let mut bytes = 20u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert_eq!(answer(&message(NLMSG_ERROR, -2)), Err(WireError::Errno(2)));
        assert!(answer(&message(NLMSG_ERROR, 0)).unwrap().done);
        assert!(answer(&message(NLMSG_DONE, 0)).unwrap().done);
    }

    #[test]
    fn a_peer_in_two_messages_is_one() {
        let key = PublicKey::new([7; LEN]);
        let mut inner = Inner::default();
        for allowed in ["10.244.1.0/24", "10.244.2.0/24"] {
            let bytes = put_peer(
                33,
                "flannel-wg",
                &key,
                &peer("192.0.2.1:1", &[allowed]),
                true,
            );
            read_device(&mut inner, answer(&bytes).unwrap().parts[0], 0).unwrap();
        }
        assert_eq!(inner.peers[&key].allowed.len(), 2);
    }

    /// Laid out by hand from the kernel's headers, as a kernel answers.
    #[test]
    fn figures_of_a_peer_are_read() {
        let attribute = |kind: u16, value: &[u8]| {
            let length = u16::try_from(value.len()).unwrap() + 4;
            let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
            bytes.extend(value);
            bytes
        };
        let timespec = |seconds: i64| [seconds.to_ne_bytes(), 999i64.to_ne_bytes()].concat();
        let part = |handshake: i64| {
            let peer = [
                attribute(1, &[7; LEN]),
                attribute(6, &timespec(handshake)),
                attribute(7, &(1u64 << 40).to_ne_bytes()),
                attribute(8, &148u64.to_ne_bytes()),
            ];
            attribute(8 | NESTED, &attribute(NESTED, &peer.concat()))
        };
        for (handshake, alive) in [(0, false), (1_000, true), (821, true), (820, false)] {
            let mut inner = Inner::default();
            read_device(&mut inner, &part(handshake), 1_000).unwrap();
            let wanted = SeenPeer {
                handshake: u64::try_from(handshake).unwrap(),
                alive,
                received: 1 << 40,
                sent: 148,
                ..SeenPeer::default()
            };
            assert_eq!(inner.peers[&PublicKey::new([7; LEN])], wanted);
            // The rest of a peer with many networks comes without figures.
            let more = attribute(8 | NESTED, &attribute(NESTED, &attribute(1, &[7; LEN])));
            read_device(&mut inner, &more, 1_000).unwrap();
            assert_eq!(inner.peers[&PublicKey::new([7; LEN])], wanted);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(answer) = answer(&bytes) {
                for part in answer.parts {
                    let _result = read_device(&mut Inner::default(), part, 0);
                    let _result = family(part);
                }
            }
            let _result = read_device(&mut Inner::default(), &bytes, 0);
        }
    }
}
