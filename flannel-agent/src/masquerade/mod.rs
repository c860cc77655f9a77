//! Keeping the node's masquerade and forward rules as `flannel_core::masquerade` wants them, and the blackhole route.
//!
//! Nothing is taken away at the end: pods keep talking while no agent runs. It must never touch a rule that is not ours.

mod blackhole;
mod iptables;
pub(crate) mod leftovers;
mod nftables;
mod obstacles;
mod programs;

use std::{collections::BTreeSet, fs, time::Duration};

use flannel_core::{
    addr::Family,
    config::NetConf,
    lease::SubnetKey,
    masquerade::{Request, backend::Backend, iptables::Moment, nft::Ruleset},
    subnet_env::{self, Previous},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{Args, RulesetChoice},
    fastpath::netfilter,
    health::{Board, Part},
};

/// Changes that come together are looked at together.
const COALESCE: Duration = Duration::from_millis(50);
/// The shortest rest after a look: others change many rules often.
const REST: Duration = Duration::from_millis(500);
/// The longest.
const MAX_REST: Duration = Duration::from_secs(5);

/// How often to look for rules of others that drop what ours accept.
const OBSTACLES: Duration = Duration::from_secs(30);

/// Networks of one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nets<N> {
    /// The cluster network.
    pub network: N,
    /// This node's subnet.
    pub subnet: N,
    /// Both as an earlier start left them in `subnet.env`.
    pub previous: Option<(N, N)>,
}

/// What the node is to have.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of upstream's, independent of the others"
)]
pub struct Wanted {
    /// Rules go to nftables, not to iptables.
    pub nftables: bool,
    /// Which rules nftables gets.
    pub ruleset: Ruleset,
    /// Masquerade what leaves the cluster network.
    pub masq: bool,
    /// Draw source ports at random, where iptables can.
    pub random_fully: bool,
    /// Accept what is forwarded from and to the cluster network.
    pub forward: bool,
    /// Keep a blackhole route for the own subnet.
    pub blackhole: bool,
    /// How often to look.
    pub resync: Duration,
    /// IPv4, where the node has it.
    pub v4: Option<Nets<Ipv4Net>>,
    /// IPv6, where the node has it.
    pub v6: Option<Nets<Ipv6Net>>,
    /// Network and subnet of a family that the node had before and has no longer: its rules go.
    pub given_up: Option<(IpNet, IpNet)>,
}

impl Wanted {
    /// What the flags ask for, of a node with these networks. The earlier ones are read from the subnet file.
    ///
    /// A family has rules if it has a network and this node a subnet of it. Upstream looks at the network alone, and makes rules about
    /// `::/0` of an `IPv6Network` that is not used.
    pub(crate) fn from_args(args: &Args, conf: &NetConf, own: &SubnetKey) -> Self {
        let text = fs::read_to_string(&args.subnet_file).unwrap_or_default();
        let previous = subnet_env::parse_previous(&text);
        let flags = &args.firewall;
        Self {
            nftables: conf.enable_nftables,
            ruleset: match flags.nftables_ruleset {
                RulesetChoice::Upstream => Ruleset::Upstream,
                RulesetChoice::Correct => Ruleset::Correct,
            },
            masq: flags.ip_masq,
            random_fully: !flags.ip_masq_fully_random_disable,
            forward: flags.iptables_forward_rules,
            blackhole: flags.ip_blackhole_route,
            resync: Duration::from_secs(flags.iptables_resync.into()),
            given_up: given_up(own, &previous),
            v4: conf.ipv4.zip(own.v4).map(|(conf, subnet)| Nets {
                network: conf.network,
                subnet,
                previous: previous.network.zip(previous.subnet),
            }),
            v6: conf.ipv6.zip(own.v6).map(|(conf, subnet)| Nets {
                network: conf.network,
                subnet,
                previous: previous.ipv6_network.zip(previous.ipv6_subnet),
            }),
        }
    }

    /// The node's subnets, each with the one before it.
    fn subnets(&self) -> Vec<(IpNet, Option<IpNet>)> {
        let v4 = self.v4.map(|nets| {
            let before = nets.previous.map(|(_, subnet)| subnet.trunc().into());
            (nets.subnet.trunc().into(), before)
        });
        let v6 = self.v6.map(|nets| {
            let before = nets.previous.map(|(_, subnet)| subnet.trunc().into());
            (nets.subnet.trunc().into(), before)
        });
        v4.into_iter().chain(v6).collect()
    }

    /// What each of the families wants, as far as the node has it or had it.
    fn requests(&self) -> [Option<Request>; 2] {
        let request = |network, subnet, previous| Request {
            network,
            subnet,
            previous,
            masq: self.masq,
            forward: self.forward,
            random_fully: self.random_fully,
        };
        let v4 = self.v4.map(|nets| {
            let before = nets
                .previous
                .map(|(n, p)| (IpNet::V4(n.trunc()), IpNet::V4(p.trunc())));
            request(
                nets.network.trunc().into(),
                nets.subnet.trunc().into(),
                before,
            )
        });
        let v6 = self.v6.map(|nets| {
            let before = nets
                .previous
                .map(|(n, p)| (IpNet::V6(n.trunc()), IpNet::V6(p.trunc())));
            request(
                nets.network.trunc().into(),
                nets.subnet.trunc().into(),
                before,
            )
        });
        let gone = |family| {
            let (network, subnet) = self.given_up?;
            let gone = request(network, subnet, None).withdrawn();
            (Family::of_net(&network) == family).then_some(gone)
        };
        [
            v4.or_else(|| gone(Family::V4)),
            v6.or_else(|| gone(Family::V6)),
        ]
    }
}

/// What the node had of a family that it has no longer.
fn given_up(own: &SubnetKey, previous: &Previous) -> Option<(IpNet, IpNet)> {
    let v4 = previous.network.zip(previous.subnet);
    let v6 = previous.ipv6_network.zip(previous.ipv6_subnet);
    match (own.v4, own.v6) {
        (None, _) => v4.map(|(network, subnet)| (network.into(), subnet.into())),
        (_, None) => v6.map(|(network, subnet)| (network.into(), subnet.into())),
        (Some(_), Some(_)) => None,
    }
}

/// Something that is not as wanted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Trouble {
    /// What, and what to do about it.
    text: String,
    /// Whether the node lacks something that was asked for because of it.
    lacking: bool,
}

impl Trouble {
    fn lack(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            lacking: true,
        }
    }

    fn note(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            lacking: false,
        }
    }
}

/// The task that keeps the rules.
#[derive(Debug)]
pub struct Keeper {
    task: JoinHandle<()>,
}

impl Keeper {
    /// Waits for the task's end, which comes after cancellation.
    pub async fn stopped(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the task that keeps the firewall rules ended");
        }
    }
}

/// Puts everything in place, says so on the board, and keeps it in a task of its own until cancelled.
pub async fn start(wanted: Wanted, board: Board, cancel: CancellationToken) -> Keeper {
    let mut keeping = Keeping {
        wanted,
        board,
        iptables: iptables::Iptables::default(),
        nftables: nftables::Nftables::default(),
        said: BTreeSet::new(),
        seen: None,
        obstacles: BTreeSet::new(),
        looked: None,
        searched: None,
        retired: false,
    };
    cancel
        .run_until_cancelled(keeping.pass(Moment::Start))
        .await;
    let task = tokio::spawn(async move {
        cancel.run_until_cancelled(keeping.run()).await;
    });
    Keeper { task }
}

#[derive(Debug)]
struct Keeping {
    wanted: Wanted,
    board: Board,
    iptables: iptables::Iptables,
    nftables: nftables::Nftables,
    said: BTreeSet<Trouble>,
    /// The generation of the nftables rules at the last look that found everything in place.
    seen: Option<u32>,
    /// What drops pods' packets, and when that was looked for.
    obstacles: BTreeSet<Trouble>,
    looked: Option<Instant>,
    /// The generation of the nftables rules at that time.
    searched: Option<u32>,
    /// Whether the rules of the manager that is not wanted have been removed.
    retired: bool,
}

impl Keeping {
    async fn run(mut self) {
        let (changes_in, mut changes) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(error) = netfilter::watch(changes_in).await {
                tracing::debug!(%error, "watch the nftables rules");
            }
        });
        let mut ticks = interval(self.wanted.resync.max(REST));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Some(()) = changes.recv() => {
                    sleep(COALESCE).await;
                    while changes.try_recv().is_ok() {}
                }
            }
            let begun = Instant::now();
            self.pass(Moment::Resync).await;
            // A node with very many rules is not busy reading them.
            sleep((begun.elapsed() * 4).clamp(REST, MAX_REST)).await;
        }
    }

    async fn pass(&mut self, moment: Moment) {
        let mut troubles = BTreeSet::new();
        // Before the rules are read: what changes meanwhile makes another one.
        let generation = netfilter::generation();
        let unchanged = generation.is_some()
            && generation == self.seen
            && (self.wanted.nftables || self.iptables.is_nft_only());
        if !unchanged {
            self.seen = None;
            if self.wanted.nftables {
                troubles.extend(self.nftables.pass(&self.wanted, moment).await);
            } else {
                troubles.extend(self.iptables.pass(&self.wanted, moment).await);
            }
            // Rules of the other manager carry the node until those of this one do.
            if !self.retired && troubles.is_empty() {
                self.retired = true;
                tracing::info!("Cleaning-up unused traffic manager rules");
                if self.wanted.nftables {
                    troubles.extend(self.iptables.retire(&self.wanted).await);
                } else {
                    troubles.extend(nftables::retire().await);
                }
            }
            if troubles.is_empty() {
                self.seen = generation;
            }
        }
        if self.wanted.blackhole {
            troubles.extend(blackhole::pass(&self.wanted, moment).await);
        }
        if self
            .looked
            .is_none_or(|looked| looked.elapsed() >= OBSTACLES)
        {
            self.looked = Some(Instant::now());
            let legacy = Family::ALL
                .into_iter()
                .any(|family| programs::in_use(Backend::Legacy, family));
            // Programs are not run to hear the same again.
            if legacy || generation.is_none() || generation != self.searched {
                self.searched = generation;
                self.obstacles = obstacles::look(&self.wanted.requests())
                    .await
                    .into_iter()
                    .collect();
            }
        }
        troubles.extend(self.obstacles.iter().cloned());
        self.report(troubles);
    }

    /// Says each new trouble once, and when the last one is over.
    fn report(&mut self, troubles: BTreeSet<Trouble>) {
        for trouble in troubles.difference(&self.said) {
            tracing::warn!("{}", trouble.text);
        }
        let lacking: Vec<&str> = troubles
            .iter()
            .filter(|trouble| trouble.lacking)
            .map(|trouble| trouble.text.as_str())
            .collect();
        if lacking.is_empty() {
            if self.said.iter().any(|trouble| trouble.lacking) {
                tracing::info!("the firewall rules are in place again");
            }
            self.board.settle(Part::Firewall);
        } else {
            self.board.lack(Part::Firewall, lacking.join("; "));
        }
        self.said = troubles;
    }
}
