//! Noticing that the packet filter's rules have changed, without listing them.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsRawFd as _,
};

use flannel_core::addr::Family;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, Socket, SocketAddr, TokioSocket};
use tokio::sync::mpsc::{self, error::TrySendError};

/// `NFNL_SUBSYS_NFTABLES` in `include/uapi/linux/netfilter/nfnetlink.h`.
const SUBSYSTEM: u16 = 10;
/// `NFNLGRP_NFTABLES`, there.
const GROUP: u32 = 7;
/// `NFT_MSG_NEWGEN` and `NFT_MSG_GETGEN` in `include/uapi/linux/netfilter/nf_tables.h`.
const NEWGEN: u16 = 15;
const GETGEN: u16 = 16;
/// `NFTA_GEN_ID`, there.
const GEN_ID: u16 = 1;
/// Bytes of `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 20;
/// `IPT_SO_GET_INFO` in `include/uapi/linux/netfilter_ipv4/ip_tables.h`, and `IP6T_SO_GET_INFO` in its IPv6 counterpart.
const GET_INFO: libc::c_int = 64;
/// `sizeof(struct ipt_getinfo)`, which `struct ip6t_getinfo` equals: the name, eleven words, the number of entries, and their size.
const INFO: usize = 84;
/// `XT_TABLE_MAXNAMELEN`.
const TABLE_NAME: usize = 32;

/// The generation of the nftables rules of this network namespace: another number with every change. `None` where the kernel has
/// no nftables.
pub(crate) fn generation() -> Option<u32> {
    let mut socket = Socket::new(libc::NETLINK_NETFILTER as isize).ok()?;
    socket.bind_auto().ok()?;
    let mut request = [0u8; HEADERS];
    let length = HEADERS as u32;
    let kind = SUBSYSTEM << 8 | GETGEN;
    for (at, byte) in length
        .to_ne_bytes()
        .into_iter()
        .chain(kind.to_ne_bytes())
        .chain((libc::NLM_F_REQUEST as u16).to_ne_bytes())
        .enumerate()
    {
        *request.get_mut(at)? = byte;
    }
    socket.send_to(&request, &SocketAddr::new(0, 0), 0).ok()?;
    // The kernel answers within the call.
    socket.set_non_blocking(true).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    generation_of(&answer)
}

fn generation_of(answer: &[u8]) -> Option<u32> {
    let word = |at: usize| -> Option<u16> {
        let bytes = answer.get(at..at.checked_add(2)?)?;
        Some(u16::from_ne_bytes(bytes.try_into().ok()?))
    };
    if word(4)? != SUBSYSTEM << 8 | NEWGEN {
        return None;
    }
    let mut at = HEADERS;
    loop {
        let length = usize::from(word(at)?);
        if word(at.checked_add(2)?)? == GEN_ID {
            let value = answer.get(at.checked_add(4)?..at.checked_add(8)?)?;
            return Some(u32::from_be_bytes(value.try_into().ok()?));
        }
        at = at.checked_add(length.max(4).next_multiple_of(4))?;
    }
}

/// Sends a word for every change of the nftables rules, until the receiver is gone or the socket fails.
pub(crate) async fn watch(out: mpsc::Sender<()>) -> io::Result<()> {
    let mut socket = TokioSocket::new(libc::NETLINK_NETFILTER as isize)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_mut().add_membership(GROUP)?;
    loop {
        match socket.recv_from_full().await {
            // More changes at once than the socket holds: that is a change, too.
            Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error),
            _ => {}
        }
        // A full channel already says what there is to say.
        if let Err(TrySendError::Closed(())) = out.try_send(()) {
            return Ok(());
        }
    }
}

/// What the kernel tells of a legacy table in a few bytes: hooks, offsets, numbers and sizes of its rules. A change that leaves all
/// of them alone goes unnoticed here. The table must be known to exist: asking for one makes it.
pub(super) fn legacy_shape(table: &str, family: Family) -> Option<[u8; INFO]> {
    let (socket, level) = match family {
        Family::V4 => (UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)), libc::SOL_IP),
        // Loopback need not have an address where IPv6 is switched off on devices.
        Family::V6 => (UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)), libc::SOL_IPV6),
    };
    let socket = socket.ok()?;
    let mut info = [0u8; INFO];
    let name = table.as_bytes();
    if name.len() >= TABLE_NAME {
        return None;
    }
    info.get_mut(..name.len())?.copy_from_slice(name);
    let mut length = INFO as libc::socklen_t;
    // SAFETY: the buffer is as long as `length` says, and the descriptor is open for the duration of the call.
    #[expect(unsafe_code, reason = "no safe wrapper knows this socket option")]
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    (answer == 0).then_some(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_is_found_among_attributes() {
        let mut answer = vec![0; HEADERS];
        answer[4..6].copy_from_slice(&(SUBSYSTEM << 8 | NEWGEN).to_ne_bytes());
        let mut attribute = |kind: u16, value: &[u8]| {
            answer.extend(((value.len() + 4) as u16).to_ne_bytes());
            answer.extend(kind.to_ne_bytes());
            answer.extend(value);
            answer.resize(answer.len().next_multiple_of(4), 0);
        };
        attribute(3, b"nft\0\0");
        attribute(GEN_ID, &7u32.to_be_bytes());
        assert_eq!(generation_of(&answer), Some(7));
        for length in 0..answer.len() {
            assert_eq!(generation_of(&answer[..length]), None);
        }
    }
}
