//! Which of the installed variants of iptables to use, and what it can do.

use super::iptables::Dump;

/// Where rules of iptables end up in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// The tables of old.
    Legacy,
    /// nftables.
    Nft,
}

impl Backend {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Legacy, Self::Nft];

    /// What programs of the variant carry in their names: `iptables-legacy-save`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }
}

/// What `iptables --version` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Major, minor, patch.
    pub number: (u32, u32, u32),
    /// The back end that the program drives.
    pub backend: Backend,
}

impl Version {
    /// Reads `iptables v1.8.9 (nf_tables)`. Before 1.8 there was one back end, and no word of it.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let number = words.find_map(|word| word.strip_prefix('v'))?;
        let mut parts = number
            .split('.')
            .map(|part| part.parse::<u32>().unwrap_or(0));
        let backend = match words.next() {
            Some("(nf_tables)") => Backend::Nft,
            _ => Backend::Legacy,
        };
        Some(Self {
            number: (parts.next()?, parts.next()?, parts.next().unwrap_or(0)),
            backend,
        })
    }

    /// Whether source ports can be drawn at random, `--random-fully` (upstream asks for the same version).
    pub fn knows_random_fully(&self) -> bool {
        self.number >= (1, 6, 2)
    }

    /// Whether `iptables-restore` can wait for others that change rules.
    pub fn can_wait(&self) -> bool {
        self.number >= (1, 6, 2)
    }
}

/// What was found of one back end.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Rules in it.
    pub dump: Dump,
    /// Whether its programs are installed under its own name.
    pub installed: bool,
}

/// Which back end to use, and why another than the installed `iptables` drives.
///
/// As the wrapper of Kubernetes' images does (kubernetes-sigs/iptables-wrappers): the one in which kubelet has left its hint, else
/// the one with more rules. Ours do not count: they may be left over from another choice.
pub fn choose(default: Backend, legacy: &Found, nft: &Found) -> (Backend, Option<String>) {
    let (mine, theirs, other) = match default {
        Backend::Legacy => (legacy, nft, Backend::Nft),
        Backend::Nft => (nft, legacy, Backend::Legacy),
    };
    if !theirs.installed || mine.dump.has_hint() {
        return (default, None);
    }
    let (here, there) = (mine.dump.foreign_rules(), theirs.dump.foreign_rules());
    let reason = if theirs.dump.has_hint() {
        "kubelet's rules are there".to_owned()
    } else if there > here {
        format!(
            "the node has {there} rules there, and {here} where the installed iptables puts them"
        )
    } else {
        return (default, None);
    };
    (other, Some(reason))
}
