//! Flags about masquerade and forward rules, and about what belongs to them.

use clap::{Args as Group, ValueEnum};

use super::boolean;

/// Flags about rules in iptables or nftables.
#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "Firewall")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of upstream's, independent of the others"
)]
pub struct FirewallArgs {
    /// Masquerade what leaves the cluster network.
    #[arg(
        long,
        env = "FLANNELD_IP_MASQ",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub ip_masq: bool,

    /// Masquerade without drawing source ports at random.
    #[arg(
        long,
        env = "FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub ip_masq_fully_random_disable: bool,

    /// Seconds between two looks at the rules and at the blackhole route.
    #[arg(
        long,
        env = "FLANNELD_IPTABLES_RESYNC",
        default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=86_400),
        value_name = "SECONDS"
    )]
    pub iptables_resync: u32,

    /// Accept forwarded traffic from and to the cluster network.
    #[arg(
        long,
        env = "FLANNELD_IPTABLES_FORWARD_RULES",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = true,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub iptables_forward_rules: bool,

    /// Keep a blackhole route for this node's subnet, for nodes without a bridge that owns it.
    #[arg(
        long,
        env = "FLANNELD_IP_BLACKHOLE_ROUTE",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub ip_blackhole_route: bool,

    /// Which rules nftables gets, when the network configuration chooses nftables.
    #[arg(long, env = "FLANNELD_NFTABLES_RULESET", value_enum, default_value_t = RulesetChoice::Upstream, value_name = "CHOICE")]
    pub nftables_ruleset: RulesetChoice,
}

/// `--nftables-ruleset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RulesetChoice {
    /// Upstream's, to the letter: what a host or a NodePort sends to a pod of another node is not masqueraded.
    Upstream,
    /// What upstream's iptables rules say, in nftables.
    Correct,
}
