//! Reading a bridge by netlink, since `/sys` may be another network namespace's.

use std::os::fd::AsRawFd as _;

use ipnet::Ipv4Net;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::Seen;

// include/uapi/linux/netlink.h and rtnetlink.h
const ERROR: u16 = 2;
const DONE: u16 = 3;
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_ADDR: u16 = 20;
const GET_ADDR: u16 = 22;
/// `NLM_F_REQUEST | NLM_F_DUMP`
const DUMP: u16 = 0x301;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFA_LOCAL: u16 = 2;
const HEADER: usize = 16;
const LINK: usize = 16;
const ADDRESS: usize = 8;

/// What is on the bridge of that name.
pub(super) fn look(bridge: &str) -> Result<Seen, String> {
    let links = dump(GET_LINK, LINK).map_err(|errno| format!("list interfaces: {errno}"))?;
    let links: Vec<Link> = messages(&links, NEW_LINK).filter_map(link).collect();
    let Some(is) = links.iter().find(|link| link.name == bridge) else {
        return Err(format!("there is no interface {bridge}"));
    };
    if is.kind != "bridge" {
        return Err(format!("{bridge} is not a bridge"));
    }
    let addresses = dump(GET_ADDR, ADDRESS).map_err(|errno| format!("list addresses: {errno}"))?;
    Ok(Seen {
        ports: links
            .iter()
            .filter(|link| link.master == Some(is.index))
            .map(|link| (link.name.clone(), link.kind.clone()))
            .collect(),
        addresses: messages(&addresses, NEW_ADDR)
            .filter_map(address)
            .filter(|(index, _)| *index == is.index)
            .map(|(_, address)| address)
            .collect(),
    })
}

#[derive(Debug, PartialEq)]
struct Link {
    index: u32,
    name: String,
    kind: String,
    master: Option<u32>,
}

/// Everything that the kernel answers to a request for all objects of a kind.
fn dump(kind: u16, body: usize) -> nix::Result<Vec<u8>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let length = HEADER + body;
    let mut request = Vec::with_capacity(length);
    request.extend((length as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.resize(length, 0);
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut all = Vec::new();
    // The kernel's dumps come in pieces of at most 32 KiB.
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let piece = buffer.get(..length).unwrap_or_default();
        for (kind, body) in split(piece) {
            if kind == ERROR {
                let errno = word(body, 0).unwrap_or(0) as i32;
                return Err(nix::Error::from_raw(errno.wrapping_neg()));
            }
            if kind == DONE {
                return Ok(all);
            }
        }
        if length == 0 {
            return Ok(all);
        }
        all.extend_from_slice(piece);
    }
}

fn messages(bytes: &[u8], kind: u16) -> impl Iterator<Item = &[u8]> {
    split(bytes).filter_map(move |(is, body)| (is == kind).then_some(body))
}

/// Takes messages apart into kinds and bodies.
fn split(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = word(bytes, 0)? as usize;
        let kind = half(bytes, 4)?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Takes attributes apart into kinds and values.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes, 0)?);
        // Without the flags for nested and for network byte order.
        let kind = half(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: word(body, 4)?,
        name: String::new(),
        kind: String::new(),
        master: None,
    };
    for (kind, value) in attributes(body.get(LINK..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MASTER => link.master = word(value, 0),
            IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

/// An IPv4 address and its interface.
fn address(body: &[u8]) -> Option<(u32, Ipv4Net)> {
    let (length, index) = (*body.get(1)?, word(body, 4)?);
    let local = attributes(body.get(ADDRESS..)?).find(|(kind, _)| *kind == IFA_LOCAL)?;
    let octets: [u8; 4] = local.1.try_into().ok()?;
    Some((index, Ipv4Net::new(octets.into(), length).ok()?))
}

fn text(value: &[u8]) -> String {
    let end = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(end).into_owned()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_loopback_is_no_bridge() {
        assert_eq!(look("lo"), Err("lo is not a bridge".to_owned()));
        assert_eq!(
            look("no-such"),
            Err("there is no interface no-such".to_owned())
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            for (_, body) in split(&bytes) {
                let _seen = (link(body), address(body));
            }
            let _seen = (link(&bytes), address(&bytes));
        }
    }
}
