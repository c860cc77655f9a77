//! What a device leaves to hardware: the checksums of what it sends.

use std::{io, os::fd::AsRawFd as _};

/// `ETHTOOL_GTXCSUM`, `ETHTOOL_STXCSUM` and `struct ethtool_value` in `include/uapi/linux/ethtool.h`.
const GET_TX_CHECKSUM: u32 = 0x16;
const SET_TX_CHECKSUM: u32 = 0x17;
/// `SIOCETHTOOL` in `include/uapi/linux/sockios.h`: the C libraries do not agree on its type.
const SIOCETHTOOL: libc::Ioctl = 0x8946;

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Whether the device leaves checksums to hardware.
pub(crate) fn leaves_checksums(name: &str) -> io::Result<bool> {
    ask(name, GET_TX_CHECKSUM).map(|on| on != 0)
}

/// Has the kernel fill in all checksums of what the device sends, whatever the protocol. Without them it does not leave it a super-packet
/// either: the device gets segments (`harmonize_features`).
pub(crate) fn fill_checksums(name: &str) -> io::Result<()> {
    ask(name, SET_TX_CHECKSUM).map(drop)
}

#[expect(unsafe_code, reason = "no safe wrapper knows this ioctl")]
fn ask(name: &str, command: u32) -> io::Result<u32> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut value = EthtoolValue { command, data: 0 };
    // SAFETY: a plain C struct for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value that it points at live through the call, and the kernel writes no more than the value.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if answer == 0 {
        Ok(value.data)
    } else {
        Err(io::Error::last_os_error())
    }
}
