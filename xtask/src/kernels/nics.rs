//! Machines whose labs have network cards for uplinks: what only a driver shows, and the same traffic as over veth pairs.
//!
//! All cards of a machine are on one wire. A hub of QEMU's needs no privilege, but passes whole frames alone. A bridge in a namespace
//! of this machine, with a tap for each card, also passes what the driver left to the card: checksums and segmentation.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process;

/// One for the labs' switch, and three nodes.
const COUNT: u8 = 4;
/// Queues of a card that has several.
const QUEUES: u8 = 2;

/// What the cards are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cards {
    /// virtio, without offloads.
    Hub,
    /// virtio with checksum offload and segmentation, as hypervisors have it.
    Tap,
    /// The same with several queues, in a machine of as many processors.
    Queues,
    /// virtio that receives into big buffers: its driver takes XDP programs and never runs them.
    Silent,
}

impl Cards {
    /// For files.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Hub => "cards-hub",
            Self::Tap => "cards-tap",
            Self::Queues => "cards-queues",
            Self::Silent => "cards-silent",
        }
    }

    /// For people, behind the name of the kernel.
    pub(super) const fn description(self) -> &'static str {
        match self {
            Self::Hub => " on network cards (virtio, hub)",
            Self::Tap => " on network cards (virtio, tap)",
            Self::Queues => " on network cards (virtio, tap, several queues)",
            Self::Silent => " on network cards (virtio, tap, mrg_rxbuf=off)",
        }
    }

    pub(super) const fn processors(self) -> u8 {
        match self {
            Self::Queues => QUEUES,
            Self::Hub | Self::Tap | Self::Silent => 1,
        }
    }

    /// What the tests are told (`flannel_testkit::Nics`).
    pub(super) fn addresses() -> String {
        (0..COUNT).map(address).collect::<Vec<_>>().join(",")
    }

    /// For QEMU.
    pub(super) fn arguments(self) -> Vec<String> {
        let card = |number: u8| {
            let (backend, options) = match self {
                Self::Hub => (format!("hubport,id=nic{number},hubid=1"), String::new()),
                Self::Tap => (tap(number), String::new()),
                Self::Silent => (tap(number), ",mrg_rxbuf=off".to_owned()),
                Self::Queues => (
                    format!("{},queues={QUEUES}", tap(number)),
                    // For each queue a vector in and one out, and two for the rest.
                    format!(",mq=on,vectors={}", 2 * QUEUES + 2),
                ),
            };
            let address = address(number);
            [
                "-netdev".to_owned(),
                backend,
                "-device".to_owned(),
                format!("virtio-net-pci,netdev=nic{number},romfile=,mac={address}{options}"),
            ]
        };
        (0..COUNT).flat_map(card).collect()
    }

    /// Makes the wire, if it is one of this machine's.
    pub(super) fn wire(self) -> Result<Option<Wire>> {
        let queues = match self {
            Self::Hub => return Ok(None),
            Self::Tap | Self::Silent => "",
            Self::Queues => " multi_queue",
        };
        process::require_root("a machine with taps", "test --kernel")?;
        Wire::new(self, queues).map(Some)
    }
}

fn address(number: u8) -> String {
    format!("52:54:00:00:77:{number:02x}")
}

fn tap(number: u8) -> String {
    format!("tap,id=nic{number},ifname=tap{number},script=no,downscript=no")
}

/// A bridge with taps, in a namespace of its own that goes with it.
pub(super) struct Wire {
    namespace: String,
}

impl Wire {
    fn new(cards: Cards, queues: &str) -> Result<Self> {
        // As labs name theirs, so that one that is left behind is found.
        let namespace = format!("fe-{}-0-{}", std::process::id(), cards.name());
        let wire = Self { namespace };
        ip(&format!("netns add {}", wire.namespace))?;
        // It floods, so that the switch's card sees everything, as on a hub.
        wire.ip("link add wire mtu 9000 type bridge ageing_time 0 mcast_snooping 0")?;
        wire.ip("link set wire up")?;
        for number in 0..COUNT {
            wire.ip(&format!(
                "tuntap add dev tap{number} mode tap vnet_hdr{queues}"
            ))?;
            wire.ip(&format!("link set tap{number} mtu 9000 master wire up"))?;
        }
        Ok(wire)
    }

    fn ip(&self, line: &str) -> Result<()> {
        ip(&format!("-n {} {line}", self.namespace))
    }

    /// A program in the namespace. Nothing stands between: it is the child.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = process::command("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Err(error) = ip(&format!("netns del {}", self.namespace)) {
            eprintln!("xtask: {error:#}");
        }
    }
}

fn ip(line: &str) -> Result<()> {
    process::run(process::command("ip").args(line.split_whitespace()))
        .with_context(|| format!("ip {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_card_has_an_address_that_the_tests_know() {
        for cards in [Cards::Hub, Cards::Tap, Cards::Queues, Cards::Silent] {
            let words = cards.arguments().join(" ");
            for address in Cards::addresses().split(',') {
                assert_eq!(words.matches(&format!("mac={address}")).count(), 1);
            }
            assert_eq!(words.contains("mrg_rxbuf=off"), cards == Cards::Silent);
        }
    }
}
