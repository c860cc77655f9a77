//! `subnet.env`.

use ipnet::IpNet;

use super::{Finding, Observations};
use crate::addr::Family;

/// What `subnet.env` says of a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetFile {
    /// Its path.
    pub path: String,
    /// `FLANNEL_NETWORK` or `FLANNEL_IPV6_NETWORK`.
    pub network: Option<IpNet>,
    /// `FLANNEL_SUBNET` or `FLANNEL_IPV6_SUBNET`, without host bits.
    pub subnet: Option<IpNet>,
    /// `FLANNEL_MTU`.
    pub mtu: Option<u32>,
}

impl SubnetFile {
    /// Reads its text.
    pub fn parse(path: &str, text: &str, family: Family) -> Self {
        let infix = match family {
            Family::V4 => "",
            Family::V6 => "IPV6_",
        };
        let value = |name: &str| {
            text.lines()
                .rev()
                .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches(['"', '\'', ' ']))
        };
        Self {
            path: path.to_owned(),
            network: value(&format!("FLANNEL_{infix}NETWORK")).and_then(|value| value.parse().ok()),
            subnet: value(&format!("FLANNEL_{infix}SUBNET"))
                .and_then(|value| value.parse().ok())
                .map(|net: IpNet| net.trunc()),
            mtu: value("FLANNEL_MTU").and_then(|value| value.parse().ok()),
        }
    }
}

pub(super) fn judge(seen: &Observations) -> Finding {
    const NAME: &str = "subnet-file";
    let path = &seen.overlay.subnet_path;
    let Some(file) = &seen.overlay.subnet_file else {
        return if seen.agent.known {
            Finding::fail(
                NAME,
                format!("{path} does not exist: pods cannot be made"),
                "restart the agent, which writes it once everything is in place",
            )
        } else {
            Finding::skip(
                NAME,
                format!("{path} does not exist: the agent writes it when it is ready"),
            )
        };
    };
    let (Some(subnet), Some(network), Some(mtu)) = (file.subnet, file.network, file.mtu) else {
        let infix = match seen.overlay.family {
            Family::V4 => "",
            Family::V6 => "IPV6_",
        };
        return Finding::fail(
            NAME,
            format!(
                "{path} lacks FLANNEL_{infix}NETWORK, FLANNEL_{infix}SUBNET or FLANNEL_MTU, or one cannot be read"
            ),
            format!("delete {path} and restart the agent, which writes it anew"),
        );
    };
    let configured = seen
        .store
        .conf()
        .and_then(|conf| conf.range(seen.overlay.family))
        .map(|(network, _)| network);
    if let Some(configured) = configured.filter(|configured| *configured != network) {
        return Finding::fail(
            NAME,
            format!("{path} says network {network}, the configuration says {configured}"),
            "restart the agent, which writes it anew; then restart the pods of the old network",
        );
    }
    Finding::ok(NAME, format!("{path}: {subnet} of {network}, MTU {mtu}"))
}
