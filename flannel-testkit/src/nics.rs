//! Network cards as the uplinks of a lab, instead of veth pairs: what only a real driver does shows there alone.
//!
//! All cards are on one wire (a hub, a bridge of the host). The first is the switch's, the others are the nodes', in order. A card
//! is known by its MAC address: names change when a card goes from one namespace to another.

use crate::eventually::try_eventually;
use crate::json::ip_json;
use crate::netns::Netns;
use anyhow::Context as _;
use serde_json::Value;
use std::time::Duration;

/// Names the cards by their MAC addresses, separated by commas.
pub(crate) const ENV: &str = "FLANNEL_LAB_NICS";
/// How long a card may take to come back from a namespace that somebody else has removed.
const BACK: Duration = Duration::from_secs(20);
/// What drivers switch on by themselves, by the names that `ethtool -K` takes; see [`reset`].
const DEFAULT_ON: [&str; 6] = ["rx", "tx", "sg", "tso", "gso", "gro"];

/// The cards that labs may take, and the namespace to which they return. One lab at a time.
#[derive(Clone, Debug)]
pub struct Nics {
    home: Netns,
    macs: Vec<String>,
}

impl Nics {
    /// Cards in the namespace `home`, by their MAC addresses.
    pub fn new(home: &Netns, macs: impl IntoIterator<Item = String>) -> Nics {
        Nics {
            home: home.clone(),
            macs: macs.into_iter().map(|mac| mac.to_lowercase()).collect(),
        }
    }

    /// The cards that `FLANNEL_LAB_NICS` names, in the namespace of this process.
    pub fn from_env() -> Option<Nics> {
        let listed = std::env::var(ENV).ok()?;
        let macs = listed.split(',').map(str::trim).map(str::to_owned);
        // A path, because no name stands for this namespace.
        let home = Netns::existing(&format!("/proc/{}/ns/net", std::process::id()));
        let macs: Vec<String> = macs.filter(|mac| !mac.is_empty()).collect();
        (!macs.is_empty()).then(|| Nics::new(&home, macs))
    }

    /// Number of nodes for which they are enough.
    pub fn nodes(&self) -> usize {
        self.macs.len().saturating_sub(1)
    }

    /// Makes sure that every card is there and takes frames off the wire: for one that is down the wire keeps them, and what is
    /// of an earlier lab would arrive in a later one.
    pub(crate) fn gather(&self) -> anyhow::Result<()> {
        for number in 0..self.macs.len() {
            let name = try_eventually(BACK, &format!("card {number} is free"), || {
                self.name_in(&self.home, number)?
                    .with_context(|| format!("{} has no card {number}", self.home.name()))
            })?;
            self.rest(&name)?;
        }
        Ok(())
    }

    /// Moves a card into a namespace, under this name, up and as its driver made it.
    pub(crate) fn take(
        &self,
        number: usize,
        ns: &Netns,
        ifname: &str,
        mtu: u32,
    ) -> anyhow::Result<()> {
        let found = self.name_in(&self.home, number)?;
        let name =
            found.with_context(|| format!("card {number} is not free: one lab at a time"))?;
        self.home.ip(&format!(
            "link set dev {name} down netns {} name {ifname}",
            ns.name()
        ))?;
        reset(ns, ifname);
        ns.ip(&format!("link set dev {ifname} mtu {mtu} up"))?;
        Ok(())
    }

    /// Takes back the cards that are in a namespace.
    pub(crate) fn take_back(&self, ns: &Netns) -> anyhow::Result<()> {
        let links = ip_json(ns, &["-d", "link", "show"])?;
        for number in 0..self.macs.len() {
            let Some(name) = self.find(&links, number) else {
                continue;
            };
            let resting = format!("nic{number}");
            // An address of its own is all that a move does not take from it.
            ns.ip(&format!(
                "link set dev {name} down address {}",
                self.macs[number]
            ))?;
            ns.ip(&format!(
                "link set dev {name} netns {} name {resting}",
                self.home.name()
            ))?;
            self.rest(&resting)?;
        }
        Ok(())
    }

    /// Up, and silent.
    fn rest(&self, name: &str) -> anyhow::Result<()> {
        self.home
            .set_sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
        self.home.ip(&format!("link set dev {name} up")).map(drop)
    }

    fn name_in(&self, ns: &Netns, number: usize) -> anyhow::Result<Option<String>> {
        Ok(self.find(&ip_json(ns, &["-d", "link", "show"])?, number))
    }

    fn find(&self, links: &Value, number: usize) -> Option<String> {
        let mac = self.macs.get(number)?.as_str();
        let is_it = |link: &&Value| link["permaddr"] == mac || link["address"] == mac;
        // A bridge has the address of its first port.
        let is_port = |link: &Value| link["linkinfo"]["info_kind"] != "bridge";
        let mut found = links.as_array()?.iter().filter(is_it);
        let found = found.find(|link| is_port(link))?;
        found["ifname"].as_str().map(str::to_owned)
    }
}

/// Switches on what drivers switch on by themselves; what a device does not have stays off.
fn reset(ns: &Netns, ifname: &str) {
    for feature in DEFAULT_ON {
        drop(ns.exec(["ethtool", "-K", ifname, feature, "on"]));
    }
}

/// Switches features off that a device lets one switch, and makes sure of it.
pub(crate) fn switch_off(ns: &Netns, ifname: &str, features: &[&str]) -> anyhow::Result<()> {
    for feature in features {
        // One that is off for good cannot be switched off either.
        drop(ns.exec(["ethtool", "-K", ifname, feature, "off"]));
    }
    let text = ns.exec(["ethtool", "--json", "-k", ifname])?;
    let shown: Value = serde_json::from_str(&text).context("output of ethtool --json -k")?;
    let left = features.iter().map(|feature| long_name(feature));
    let left: Vec<&str> = left
        .filter(|name| shown[0][name]["active"] == true && shown[0][name]["fixed"] != true)
        .collect();
    anyhow::ensure!(
        left.is_empty(),
        "{ifname} in {} keeps {left:?} on",
        ns.name()
    );
    Ok(())
}

/// What `ethtool -k` calls a feature.
fn long_name(feature: &str) -> &str {
    match feature {
        "rx" => "rx-checksumming",
        "tx" => "tx-checksumming",
        "sg" => "scatter-gather",
        "tso" => "tcp-segmentation-offload",
        "gso" => "generic-segmentation-offload",
        "gro" => "generic-receive-offload",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_card_is_known_by_the_address_it_was_made_with() {
        let nics = Nics::new(
            &Netns::existing("home"),
            ["52:54:00:00:79:0A", "52:54:00:00:79:0b"].map(str::to_owned),
        );
        let links = json!([
            {"ifname": "br0", "address": "52:54:00:00:79:0a", "linkinfo": {"info_kind": "bridge"}},
            {"ifname": "dev2", "address": "52:54:00:00:79:0a"},
            {"ifname": "eth0", "address": "02:00:00:00:00:01", "permaddr": "52:54:00:00:79:0b"},
        ]);
        assert_eq!(nics.find(&links, 0).as_deref(), Some("dev2"));
        assert_eq!(nics.find(&links, 1).as_deref(), Some("eth0"));
        assert_eq!(nics.find(&links, 2), None);
        assert_eq!(nics.nodes(), 1);
    }
}
