//! What a change of the network configuration asks of a node that runs.

use std::fmt::Display;

use super::range::Network;
use super::{Backend, FamilyConf, NetConf};

/// What a change of the configuration asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: both say the same.
    Same,
    /// It can be applied while running.
    Live,
    /// It takes a restart. One line for each key, with what it was, what it shall be, and why.
    Restart(Vec<String>),
}

/// Tells whether a node that runs by `running` can go on by `new`.
///
/// The ranges that new subnets are taken from concern nodes that come, so that `SubnetMin`, `SubnetMax` and a `SubnetLen` change
/// nothing for one that has its lease, as long as the lease could still be given out.
pub fn change(running: &NetConf, new: &NetConf) -> Change {
    if is_same(running, new) {
        return Change::Same;
    }
    let mut reasons = Vec::new();
    let families = "the node's lease and its devices are made for the families it started with";
    note(
        &mut reasons,
        "EnableIPv4",
        &running.enable_ipv4,
        &new.enable_ipv4,
        families,
    );
    note(
        &mut reasons,
        "EnableIPv6",
        &running.enable_ipv6,
        &new.enable_ipv6,
        families,
    );
    range(&mut reasons, running.ipv4.as_ref(), new.ipv4.as_ref());
    range(&mut reasons, running.ipv6.as_ref(), new.ipv6.as_ref());
    let (was, is) = (&running.backend, &new.backend);
    note(
        &mut reasons,
        "Backend.Type",
        &was.kind,
        &is.kind,
        "nodes of different backends do not reach each other, and what this one has is made for the backend it started with",
    );
    if was.kind == is.kind {
        backend(&mut reasons, was, is);
    }
    if reasons.is_empty() {
        Change::Live
    } else {
        Change::Restart(reasons)
    }
}

/// Settings of one backend. Those that other nodes need not agree with are applied while running.
fn backend(reasons: &mut Vec<String>, was: &Backend, is: &Backend) {
    let port = "nodes with different ports do not reach each other, and the nodes do not change at the same moment";
    note(
        reasons,
        "Backend.VNI",
        &was.vxlan.vni,
        &is.vxlan.vni,
        "it is in the name of the device and in what peers know of this node",
    );
    note(
        reasons,
        "Backend.Port",
        &was.vxlan.port,
        &is.vxlan.port,
        port,
    );
    let (was, is) = (&was.wireguard, &is.wireguard);
    note(reasons, "Backend.ListenPort", &was.port, &is.port, port);
    note(
        reasons,
        "Backend.ListenPortV6",
        &was.port_v6,
        &is.port_v6,
        port,
    );
    note(
        reasons,
        "Backend.Mode",
        &was.mode,
        &is.mode,
        "the devices and what peers know of this node are made for the mode it started with",
    );
    if was.psk != is.psk {
        reasons.push(
            "Backend.PSK is another one now: nodes with different keys do not reach each other, and the nodes do not change at \
             the same moment"
                .to_owned(),
        );
    }
}

/// Whether both say the same, however they are written.
fn is_same(one: &NetConf, other: &NetConf) -> bool {
    let (a, b) = (&one.backend.vxlan, &other.backend.vxlan);
    one.enable_ipv4 == other.enable_ipv4
        && one.enable_ipv6 == other.enable_ipv6
        && one.enable_nftables == other.enable_nftables
        && one.ipv4 == other.ipv4
        && one.ipv6 == other.ipv6
        && one.backend.kind == other.backend.kind
        && one.backend.fast_path == other.backend.fast_path
        && (a.vni, a.port, a.mtu) == (b.vni, b.port, b.mtu)
        && (a.gbp, a.learning, a.direct_routing) == (b.gbp, b.learning, b.direct_routing)
        && one.backend.wireguard == other.backend.wireguard
}

fn range<N, A>(
    reasons: &mut Vec<String>,
    running: Option<&FamilyConf<N, A>>,
    new: Option<&FamilyConf<N, A>>,
) where
    N: Network + PartialEq,
{
    let (Some(running), Some(new)) = (running, new) else {
        return;
    };
    note(
        reasons,
        N::KEY,
        &running.network,
        &new.network,
        "the node's subnet, routes and rules are made for the network it started with",
    );
    note(
        reasons,
        N::LEN_KEY,
        &running.subnet_len,
        &new.subnet_len,
        "the node's subnet has the length it was leased with",
    );
}

fn note<T: PartialEq + Display>(reasons: &mut Vec<String>, key: &str, was: &T, is: &T, why: &str) {
    if was != is {
        reasons.push(format!("{key} was {was} and is {is} now: {why}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: &str = r#""Network":"10.5.0.0/16","IPv6Network":"fd00::/48","EnableIPv6":true"#;

    fn conf(keys: &str, backend: &str) -> NetConf {
        let json = format!(r#"{{{keys},"Backend":{{"Type":"vxlan"{backend}}}}}"#);
        NetConf::parse(&json).unwrap_or_else(|error| panic!("{json}: {error}"))
    }

    fn changed(keys: &str, backend: &str) -> Change {
        change(
            &conf(RUNNING, ""),
            &conf(&format!("{RUNNING}{keys}"), backend),
        )
    }

    #[test]
    fn the_same_in_other_words() {
        for (keys, backend) in [
            ("", ""),
            (
                r#","Unknown":1,"EnableIPv4":true"#,
                r#","VNI":1,"Port":8472"#,
            ),
            (
                r#","SubnetLen":24,"SubnetMin":"10.5.1.0""#,
                r#","MTU":0,"GBP":false"#,
            ),
        ] {
            assert_eq!(changed(keys, backend), Change::Same, "{keys} {backend}");
        }
        let upper = RUNNING.replace("Network", "NETWORK");
        let upper =
            NetConf::parse(&format!(r#"{{{upper},"backend":{{"type":"VXLAN"}}}}"#)).unwrap();
        assert_eq!(change(&conf(RUNNING, ""), &upper), Change::Same);
    }

    #[test]
    fn what_concerns_devices_and_new_leases_is_applied_while_running() {
        for (keys, backend) in [
            (r#","EnableNFTables":true"#, ""),
            (r#","SubnetMin":"10.5.7.0""#, ""),
            (r#","SubnetMax":"10.5.7.0""#, ""),
            (r#","IPv6SubnetMin":"fd00:0:0:7::""#, ""),
            (r#","IPv6SubnetMax":"fd00:0:0:7::""#, ""),
            ("", r#","MTU":1400"#),
            ("", r#","GBP":true"#),
            ("", r#","Learning":true"#),
            ("", r#","DirectRouting":true"#),
            ("", r#","BpfFastPath":"off""#),
        ] {
            assert_eq!(changed(keys, backend), Change::Live, "{keys} {backend}");
        }
    }

    #[test]
    fn what_takes_a_restart_is_named_with_both_values() {
        for (keys, backend, expected) in [
            (
                r#","Network":"10.6.0.0/16""#,
                "",
                "Network was 10.5.0.0/16 and is 10.6.0.0/16 now: ",
            ),
            (
                r#","IPv6Network":"fd01::/48""#,
                "",
                "IPv6Network was fd00::/48 and is fd01::/48 now: ",
            ),
            (r#","SubnetLen":25"#, "", "SubnetLen was 24 and is 25 now: "),
            (
                r#","IPv6SubnetLen":65"#,
                "",
                "IPv6SubnetLen was 64 and is 65 now: ",
            ),
            (
                r#","EnableIPv4":false"#,
                "",
                "EnableIPv4 was true and is false now: ",
            ),
            (
                r#","EnableIPv6":false"#,
                "",
                "EnableIPv6 was true and is false now: ",
            ),
            ("", r#","VNI":2"#, "Backend.VNI was 1 and is 2 now: "),
            (
                "",
                r#","Port":4789"#,
                "Backend.Port was 8472 and is 4789 now: ",
            ),
        ] {
            let Change::Restart(lines) = changed(keys, backend) else {
                panic!("{keys} {backend}");
            };
            assert!(
                matches!(&lines[..], [line] if line.starts_with(expected)),
                "{lines:?}"
            );
        }
        let Change::Restart(lines) =
            changed(r#","Network":"10.6.0.0/16""#, r#","VNI":2,"MTU":1400"#)
        else {
            panic!("two keys");
        };
        assert_eq!(lines.len(), 2);
    }
}
