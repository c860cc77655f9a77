//! UDP sockets, and whose they are.

use std::{collections::BTreeMap, fs};

use flannel_core::check::{Owner, Sockets, UdpSocket};

use crate::dataplane::netlink::Survey;

/// Looks at sockets of this namespace; `ours` and `headroom` are devices of our own.
pub(super) fn look(survey: &Survey, ours: &str, headroom: &str) -> Sockets {
    let vxlan = survey
        .vxlans
        .iter()
        .filter(|other| other.name != ours && other.name != headroom)
        .cloned()
        .collect();
    Sockets { udp: udp(), vxlan }
}

/// The bound UDP sockets, those of tunnel devices included.
fn udp() -> Vec<UdpSocket> {
    let mut found: Vec<(bool, u16, u64)> = Vec::new();
    for (file, is_v4) in [("/proc/self/net/udp", true), ("/proc/self/net/udp6", false)] {
        let text = fs::read_to_string(file).unwrap_or_default();
        found.extend(text.lines().skip(1).filter_map(|line| socket(line, is_v4)));
    }
    let owners = owners_of_sockets();
    found
        .into_iter()
        .map(|(takes_v4, port, inode)| UdpSocket {
            takes_v4,
            port,
            owner: match owners.get(&inode) {
                Some(pid) => Owner::Process {
                    pid: *pid,
                    name: fs::read_to_string(format!("/proc/{pid}/comm"))
                        .unwrap_or_default()
                        .trim_end()
                        .to_owned(),
                },
                None => Owner::Unknown,
            },
        })
        .collect()
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …`
fn socket(line: &str, is_v4: bool) -> Option<(bool, u16, u64)> {
    let mut words = line.split_whitespace();
    let (address, port) = words.nth(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let inode = words.nth(7)?.parse().ok()?;
    // Nothing here says of an IPv6 socket that it refuses IPv4, which few do.
    let takes_v4 = is_v4 || address.bytes().all(|digit| digit == b'0');
    Some((takes_v4, port, inode))
}

/// The process of each socket, by inode, as far as they may be seen.
fn owners_of_sockets() -> BTreeMap<u64, u32> {
    let mut owners = BTreeMap::new();
    for pid in processes() {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.filter_map(Result::ok) {
            let inode = fs::read_link(entry.path()).ok().and_then(|target| {
                let text = target.to_str()?;
                text.strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse()
                    .ok()
            });
            if let Some(inode) = inode {
                owners.entry(inode).or_insert(pid);
            }
        }
    }
    owners
}

/// All processes that can be seen.
pub(super) fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_net_udp_is_read() {
        let line = " 1234: 0100007F:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4242 2 0000000000000000 0";
        assert_eq!(socket(line, true), Some((true, 8472, 4242)));
        assert_eq!(socket(line, false), Some((false, 8472, 4242)));
        let any = line.replace("0100007F", "00000000000000000000000000000000");
        assert_eq!(socket(&any, false), Some((true, 8472, 4242)));
        assert_eq!(socket("nonsense", true), None);
    }
}
