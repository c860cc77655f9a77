//! What `cleanup` finds of ours in the packet filter and among the routes, and how it goes.

use std::collections::BTreeMap;

use flannel_core::{
    addr::Family,
    masquerade::{
        Request,
        backend::Backend,
        iptables::{self, Dump, Moment, Plan},
        nft,
    },
};
use ipnet::IpNet;

use super::{
    nftables,
    programs::{self, PATIENCE, Tool, Tools},
};
use crate::{
    dataplane::netlink::{Netlink, NetlinkError},
    fastpath::{netfilter, rules::UNUSED},
    program::{self, ProgramError},
};

/// Something of ours.
#[derive(Debug)]
pub(crate) struct Leftover {
    /// What it is, for people.
    pub(crate) what: String,
    how: How,
}

#[derive(Debug)]
enum How {
    Iptables(Tool, Family),
    Table(Family),
    Blackhole(IpNet),
}

/// Why it cannot be removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoveError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// The networks that this node had, of each family, with its subnets of them.
pub(crate) type Own = BTreeMap<Family, (IpNet, Option<IpNet>)>;

/// What an agent with these networks has left. Without networks: everything that bears our names. Another instance's rules are
/// none of ours as long as ours are known. A `blackhole` route, which anybody might have made, is looked for only if we are known to
/// make one.
pub(crate) async fn find(own: &Own, blackhole: bool) -> Vec<Leftover> {
    let mut found = Vec::new();
    for family in Family::ALL {
        let tools = Tools::find(family).await;
        for backend in Backend::ALL {
            let Some(tool) = tools.of(backend) else {
                continue;
            };
            let plan = match tool.dump(family).await {
                Ok(dump) => removal(&dump, family, own),
                Err(error) => {
                    tracing::warn!(%error, "look for rules of ours");
                    continue;
                }
            };
            if plan.is_empty() {
                continue;
            }
            let name = programs::name(family);
            let rules = plan.stale.len();
            found.push(Leftover {
                what: format!("{rules} rules of flannel in {name}-{}", backend.as_str()),
                how: How::Iptables(tool.clone(), family),
            });
        }
    }
    if netfilter::generation().is_some_and(|generation| generation > UNUSED) {
        for family in Family::ALL {
            let Ok(Some(listed)) = nftables::list(family).await else {
                continue;
            };
            let networks = own.values().map(|(network, _)| *network);
            if !own.is_empty() && nft::other_network(family, &listed, networks).is_some() {
                continue;
            }
            found.push(Leftover {
                what: format!("nftables table {}", nft::table(family)),
                how: How::Table(family),
            });
        }
    }
    let subnets = own.values().filter_map(|(_, subnet)| *subnet);
    for subnet in subnets.filter(|_| blackhole) {
        if let Ok(net) = Netlink::open()
            && net.has_blackhole(subnet).await.unwrap_or(false)
        {
            found.push(Leftover {
                what: format!("route blackhole {subnet}"),
                how: How::Blackhole(subnet),
            });
        }
    }
    found
}

fn removal(dump: &Dump, family: Family, own: &Own) -> Plan {
    match own.get(&family) {
        None if own.is_empty() => iptables::clear(dump),
        // What is there of a family that this node did not have is another's.
        None => Plan::default(),
        Some((network, subnet)) => {
            let nothing = Request {
                network: *network,
                subnet: subnet.unwrap_or(*network),
                previous: None,
                masq: false,
                forward: false,
                random_fully: false,
            };
            iptables::plan(dump, &nothing, Moment::Start)
        }
    }
}

impl Leftover {
    /// Removes it.
    pub(crate) async fn remove(&self, own: &Own) -> Result<(), RemoveError> {
        match &self.how {
            How::Iptables(tool, family) => {
                let dump = tool.dump(*family).await?;
                let plan = removal(&dump, *family, own);
                if !plan.is_empty() {
                    tool.restore(&plan.payload).await?;
                }
            }
            How::Table(family) => {
                program::run("nft", &["-f", "-"], &nft::remove(*family), PATIENCE).await?;
            }
            How::Blackhole(subnet) => {
                Netlink::open()?.del_blackhole(*subnet).await?;
            }
        }
        Ok(())
    }
}
