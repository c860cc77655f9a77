//! What this node still lacks, for whoever asks: `/readyz`, systemd's status line, `status`.
//!
//! Every part of the agent reports here; nothing here decides anything.

mod answer;
mod pulse;
mod server;

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

pub(crate) use pulse::Pulse;
pub(crate) use server::serve;

/// A part of the agent that the node needs before pods can talk, in the order in which they come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The interface that carries the overlay.
    Uplink,
    /// The network configuration.
    Config,
    /// This node's lease.
    Lease,
    /// The tunnel device, routes, neighbours and programs.
    Datapath,
    /// The same of the overlay of IPv6 beside that of IPv4. Only a node with both has such a part.
    SecondDatapath,
    /// The rules in iptables or nftables.
    Firewall,
    /// `subnet.env`.
    SubnetFile,
}

impl Part {
    /// Those of every node.
    pub const ALL: [Self; 6] = [
        Self::Uplink,
        Self::Config,
        Self::Lease,
        Self::Datapath,
        Self::Firewall,
        Self::SubnetFile,
    ];

    /// Its name in `/readyz?verbose`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Config => "network-config",
            Self::Lease => "lease",
            Self::Datapath => "datapath",
            Self::SecondDatapath => "datapath-v6",
            Self::Firewall => "firewall",
            Self::SubnetFile => "subnet-file",
        }
    }
}

/// What a part lacks of which nothing was heard yet.
pub(crate) const NOT_YET: &str = "not yet";

/// What every part lacks: parts in place are absent.
pub type Lacking = BTreeMap<Part, String>;

/// What is to be known of parts that are in place.
pub type Notes = BTreeMap<Part, String>;

/// Where parts report, and what others read. Clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    lacking: Arc<watch::Sender<Lacking>>,
    notes: Arc<watch::Sender<Notes>>,
    summary: Arc<watch::Sender<String>>,
}

impl Default for Board {
    fn default() -> Self {
        let lacking = Part::ALL.map(|part| (part, NOT_YET.to_owned()));
        Self {
            lacking: Arc::new(watch::Sender::new(lacking.into())),
            notes: Arc::default(),
            summary: Arc::default(),
        }
    }
}

impl Board {
    /// The part is in place.
    pub fn settle(&self, part: Part) {
        self.lacking
            .send_if_modified(|lacking| lacking.remove(&part).is_some());
    }

    /// Whether the part is in place.
    pub fn is_settled(&self, part: Part) -> bool {
        !self.lacking.borrow().contains_key(&part)
    }

    /// The part is not in place, and this is why.
    pub fn lack(&self, part: Part, why: impl Into<String>) {
        let why = why.into();
        self.lacking.send_if_modified(|lacking| {
            let changed = lacking.get(&part) != Some(&why);
            if changed {
                lacking.insert(part, why);
            }
            changed
        });
    }

    /// Says something of a part that works all the same; `None` takes it back.
    pub fn note(&self, part: Part, text: Option<String>) {
        self.notes.send_if_modified(|notes| {
            let before = match text {
                Some(text) => notes.insert(part, text),
                None => notes.remove(&part),
            };
            before.as_ref() != notes.get(&part)
        });
    }

    /// What has been said of parts that work.
    pub fn notes(&self) -> Notes {
        self.notes.borrow().clone()
    }

    /// Follows the board.
    pub fn watch(&self) -> watch::Receiver<Lacking> {
        self.lacking.subscribe()
    }

    /// Says in a few words what the node does when nothing is lacking.
    pub fn summarize(&self, summary: String) {
        self.summary.send_if_modified(|current| {
            let changed = *current != summary;
            if changed {
                *current = summary;
            }
            changed
        });
    }

    /// Follows that summary.
    pub fn watch_summary(&self) -> watch::Receiver<String> {
        self.summary.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_lacks_until_it_is_settled() {
        let board = Board::default();
        let seen = board.watch();
        for part in Part::ALL {
            assert!(seen.borrow().contains_key(&part), "{part:?}");
            board.clone().settle(part);
        }
        assert_eq!(*seen.borrow(), Lacking::new());
        board.lack(Part::Lease, "lost");
        assert_eq!(
            seen.borrow().get(&Part::Lease).map(String::as_str),
            Some("lost")
        );
    }
}
