//! A bridge that kept its address while this node got another subnet, which the bridge plugin refuses to touch.
//!
//! The address is replaced only if it is certain that it is flannel's and that nobody uses it; in doubt the error says what to do.

mod look;

use std::fmt;

use ipnet::Ipv4Net;

use crate::{delegate::Delegate, error::CniError, subnet_env::SubnetEnv};

/// How the bridge plugin says it (upstream: plugins' `bridge.go`, `ensureAddr`).
const REFUSAL: &str = "already has an IP address different from";
/// The agent's device that only makes room in packets, see `flannel_core::headroom`; it never carries any.
const HEADROOM: &str = "flannel-hr.";

/// What is on a bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Names of its ports, and their kinds.
    ports: Vec<(String, String)>,
    addresses: Vec<Ipv4Net>,
}

/// Why the address is left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Doubt {
    /// Pods, or devices that somebody has added.
    Ports(Vec<String>),
    /// Not one address, or not one of flannel's.
    Addresses(Vec<Ipv4Net>),
    /// It could not be looked at.
    Unseen(String),
}

/// Whether a delegate failed because its bridge has an address of another subnet.
pub(crate) fn is_refusal(error: &CniError) -> bool {
    error.msg.contains(REFUSAL)
}

/// Whether the address may be replaced: the one that may go, or the error to end with.
pub(crate) fn may_move(
    delegate: &Delegate,
    env: &SubnetEnv,
    error: CniError,
) -> Result<(String, Ipv4Net), CniError> {
    let (Some(bridge), Some(own)) = (delegate.bridge(), env.subnet) else {
        return Err(error);
    };
    let verdict = match look::look(bridge) {
        Ok(seen) => judge(&seen, &env.networks, own),
        Err(reason) => Err(Doubt::Unseen(reason)),
    };
    verdict
        .map(|old| (bridge.to_owned(), old))
        .map_err(|doubt| {
            let advice = format!(
                "this node's subnet is {own} now; {doubt}; delete the pods of the old subnet, or drain the node and run \
                 `ip link delete {bridge}`"
            );
            error.with_details(advice)
        })
}

/// Decides. The network is flannel's, the configuration names the bridge as flannel's, and the address is the one that the bridge plugin
/// gives to the gateway of a node's subnet there: all of it must agree.
fn judge(seen: &Seen, networks: &[Ipv4Net], own: Ipv4Net) -> Result<Ipv4Net, Doubt> {
    let ports: Vec<String> = seen
        .ports
        .iter()
        .filter(|(name, kind)| !(name.starts_with(HEADROOM) && kind == "vxlan"))
        .map(|(name, _)| name.clone())
        .collect();
    if !ports.is_empty() {
        return Err(Doubt::Ports(ports));
    }
    match *seen.addresses.as_slice() {
        [old]
            if old.prefix_len() == own.prefix_len()
                && old.trunc() != own
                && flannel_core::pods::gateway(old.trunc().into()) == Some(old.into())
                && networks.iter().any(|network| network.contains(&old)) =>
        {
            Ok(old)
        }
        _ => Err(Doubt::Addresses(seen.addresses.clone())),
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports(names) => write!(f, "the bridge still has ports ({})", names.join(", ")),
            Self::Addresses(addresses) => {
                let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "its addresses ({}) are not just the gateway of an earlier subnet",
                    texts.join(", ")
                )
            }
            Self::Unseen(reason) => f.write_str(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(ports: &[(&str, &str)], addresses: &[&str]) -> Result<String, Doubt> {
        let seen = Seen {
            ports: ports
                .iter()
                .map(|(name, kind)| ((*name).to_owned(), (*kind).to_owned()))
                .collect(),
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let networks = ["10.244.0.0/16".parse().unwrap()];
        judge(&seen, &networks, "10.244.7.0/24".parse().unwrap()).map(|old| old.to_string())
    }

    #[test]
    fn only_an_empty_bridge_with_a_gateway_of_ours_is_moved() {
        let hr = ("flannel-hr.1", "vxlan");
        assert_eq!(judged(&[], &["10.244.1.1/24"]), Ok("10.244.1.1/24".into()));
        assert_eq!(
            judged(&[hr], &["10.244.1.1/24"]),
            Ok("10.244.1.1/24".into())
        );
        for ports in [
            &[hr, ("veth1", "veth")][..],
            &[("flannel-hr.1", "veth")],
            &[("eth1", "")],
        ] {
            assert!(
                matches!(judged(ports, &["10.244.1.1/24"]), Err(Doubt::Ports(_))),
                "{ports:?}"
            );
        }
        for addresses in [
            &[][..],
            &["10.244.7.1/24"],
            &["10.244.1.2/24"],
            &["10.244.1.1/25"],
            &["192.168.1.1/24"],
            &["10.244.1.1/24", "10.244.2.1/24"],
            &["10.244.1.1/24", "192.168.1.1/24"],
        ] {
            assert!(
                matches!(judged(&[], addresses), Err(Doubt::Addresses(_))),
                "{addresses:?}"
            );
        }
    }

    #[test]
    fn the_plugins_words_are_known() {
        let said = r#"failed to set bridge addr: "cni0" already has an IP address different from 10.244.1.1/24"#;
        assert!(is_refusal(&CniError::internal(said)));
        assert!(!is_refusal(&CniError::internal(
            "failed to set bridge addr: permission denied"
        )));
    }
}
