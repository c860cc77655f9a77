//! The keeper of masquerade rules by itself in a namespace, and what the real tools show of what it did.

#![allow(
    dead_code,
    unused_imports,
    reason = "every test binary uses a part of it"
)]

mod connections;
mod goldens;

use std::{sync::mpsc, thread::JoinHandle, time::Duration};

use flannel_agent::{
    health::{Board, Part},
    masquerade::{self, Nets, Wanted},
};
use flannel_core::masquerade::nft::Ruleset;
use flannel_testkit::{Lab, LabOptions, Netns};
use tokio_util::sync::CancellationToken;

pub(crate) use connections::Connections;
pub(crate) use goldens::{LISTED, SAVED_V4, SAVED_V6, tables_of};

/// How long anything may take that is expected to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A lab without nodes, for namespaces of their own.
pub(crate) fn lab() -> Lab {
    let options = LabOptions {
        nodes: 0,
        ..LabOptions::default()
    };
    Lab::new(options).expect("a lab")
}

/// The period of [`wanted`].
pub(crate) const RESYNC: Duration = Duration::from_secs(1);

/// What node a of the samples is to have: 10.5.0.0/16 and fd05::/48, both with all rules.
pub(crate) fn wanted() -> Wanted {
    Wanted {
        nftables: false,
        ruleset: Ruleset::Upstream,
        masq: true,
        random_fully: true,
        forward: true,
        blackhole: false,
        resync: RESYNC,
        v4: Some(nets("10.5.0.0/16", "10.5.6.0/24")),
        v6: Some(nets("fd05::/48", "fd05:0:0:13::/64")),
        given_up: None,
    }
}

pub(crate) fn in_nftables() -> Wanted {
    Wanted {
        nftables: true,
        ..wanted()
    }
}

/// An instance of flannel with another network.
pub(crate) fn another() -> Wanted {
    Wanted {
        v4: Some(nets("10.12.0.0/16", "10.12.1.0/24")),
        v6: Some(nets("fd12::/48", "fd12:0:0:1::/64")),
        ..wanted()
    }
}

pub(crate) fn nets<N: std::str::FromStr>(network: &str, subnet: &str) -> Nets<N>
where
    N::Err: std::fmt::Debug,
{
    Nets {
        network: network.parse().expect("a network"),
        subnet: subnet.parse().expect("a subnet"),
        previous: None,
    }
}

/// A keeper at work in a namespace. Dropping it ends it, as the end of an agent does.
pub(crate) struct Kept {
    pub(crate) board: Board,
    cancel: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Kept {
    /// Starts it and waits until its first pass is over.
    pub(crate) fn start(ns: &Netns, wanted: Wanted) -> Kept {
        let (board, cancel) = (Board::default(), CancellationToken::new());
        let (done, started) = mpsc::channel();
        let (ns, token, shown) = (ns.clone(), cancel.clone(), board.clone());
        let thread = std::thread::spawn(move || {
            ns.enter().expect("enter the namespace");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let keeper = masquerade::start(wanted, shown, token).await;
                done.send(()).expect("tell the test");
                keeper.stopped().await;
            });
        });
        started.recv_timeout(PATIENCE).expect("the first pass ends");
        Kept {
            board,
            cancel,
            thread: Some(thread),
        }
    }

    /// What the firewall part lacks.
    pub(crate) fn lacking(&self) -> Option<String> {
        self.board.watch().borrow().get(&Part::Firewall).cloned()
    }

    /// Ends it and waits for the end.
    pub(crate) fn stop(self) {
        drop(self);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the keeper panicked");
        }
    }
}

/// One variant of iptables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    /// `nft` or `legacy`.
    pub(crate) backend: &'static str,
}

pub(crate) const NFT: Variant = Variant { backend: "nft" };
pub(crate) const LEGACY: Variant = Variant { backend: "legacy" };
pub(crate) const VARIANTS: [Variant; 2] = [NFT, LEGACY];

impl Variant {
    /// Puts a rule there for each family, which says that the node uses this variant.
    pub(crate) fn make_preferred(self, ns: &Netns) {
        for program in ["iptables", "ip6tables"] {
            let program = format!("{program}-{}", self.backend);
            ns.exec([&program, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT"])
                .expect("a rule of somebody else's");
        }
    }

    /// What `iptables-save` (4) or `ip6tables-save` (6) shows, without comments and counters, and without the rule above.
    pub(crate) fn save(self, ns: &Netns, family: u8) -> String {
        let six = if family == 6 { "6" } else { "" };
        let program = format!("ip{six}tables-{}-save", self.backend);
        let text = ns.exec([&program]).expect("list rules");
        text.lines()
            .filter(|line| !line.starts_with('#') && *line != "-A INPUT -i lo -j ACCEPT")
            .map(|line| match line.split_once('[') {
                Some((chain, _counters)) if line.starts_with(':') => format!("{chain}[0:0]"),
                _ => line.to_owned(),
            })
            .fold(String::new(), |all, line| all + &line + "\n")
    }

    /// Runs the program of the family with the words of `line`.
    pub(crate) fn run(self, ns: &Netns, family: u8, line: &str) -> String {
        let six = if family == 6 { "6" } else { "" };
        let program = format!("ip{six}tables-{}", self.backend);
        let words = line.split_whitespace().map(str::to_owned);
        ns.exec(std::iter::once(program).chain(words))
            .unwrap_or_else(|error| panic!("{line}: {error:#}"))
    }

    /// Feeds `iptables-restore --noflush`.
    pub(crate) fn restore(self, ns: &Netns, family: u8, text: &str) {
        let six = if family == 6 { "6" } else { "" };
        let script = format!(
            "ip{six}tables-{}-restore --noflush <<'END'\n{text}END\n",
            self.backend
        );
        ns.exec(["sh", "-c", &script]).expect("put rules there");
    }
}

/// What nft shows with handles: another number for every rule that was ever made.
pub(crate) fn handles(ns: &Netns) -> String {
    ns.exec(["nft", "-a", "list", "ruleset"])
        .expect("list rules")
}

/// Our nftables tables as nft shows them.
pub(crate) fn flannels(ns: &Netns) -> String {
    let script = "for t in 'ip flannel-ipv4' 'ip6 flannel-ipv6'; do nft list table $t 2>/dev/null; done; true";
    ns.exec(["sh", "-c", script]).unwrap()
}

/// The lines of a text in another order.
pub(crate) fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}
