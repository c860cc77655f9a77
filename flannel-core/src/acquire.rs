//! Which subnet this node gets: upstream's `AcquireLease`, as a decision over what is stored.
//!
//! The caller lists the store, asks [`choose`], and writes with compare-and-swap; on a conflict it lists and asks
//! again. Nothing here picks at random or looks at a clock, so the same list gives the same answer.
//!
//! Where upstream is known to go wrong this does not follow it: leases of an IPv6-only node are matched by the IPv6
//! address, subnets are free when they overlap nothing (not merely when no key is equal), turning IPv6 on or off
//! keeps the IPv4 subnet, and a reservation stays one and is never deleted.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::config::{FamilyConf, NetConf};
use crate::lease::{Lease, SubnetKey};
use crate::subnet::{self, CANDIDATES};

/// Who this node is to the others. A lease belongs to the node whose address it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The IPv4 address other nodes send tunnel packets to.
    pub public_ip: Option<Ipv4Addr>,
    /// The IPv6 address other nodes send tunnel packets to.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// A lease with what the store knows about the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredLease {
    /// The lease.
    pub lease: Lease,
    /// Whether the key has no time to live: an administrator put it there for good.
    pub reserved: bool,
    /// Revision of the last change, for compare-and-swap.
    pub mod_revision: i64,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// How to get the subnet.
    pub choice: Choice,
    /// Key of a lease of ours that the configuration no longer allows, with its revision: delete it first, if it
    /// still has that revision. It does not count as taken.
    pub drop_incompatible: Option<(SubnetKey, i64)>,
    /// What deserves a line in the log.
    pub warnings: Vec<String>,
}

/// How to get the subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// A stored lease has our address: overwrite it if it still has that revision.
    Reuse {
        /// The key to overwrite.
        key: SubnetKey,
        /// Whether it is a reservation, to be written without time to live.
        reserved: bool,
        /// The revision it was seen at.
        mod_revision: i64,
    },
    /// The subnet of an earlier start is free: create it.
    Previous {
        /// The key to create.
        key: SubnetKey,
    },
    /// Take any of these, best at random, and create it.
    Pick {
        /// Free subnets in ascending order, at least one and at most [`CANDIDATES`].
        candidates: Vec<SubnetKey>,
    },
}

/// Why there is no subnet for this node.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AcquireError {
    /// Without an address, leases cannot be told apart.
    #[error(
        "this node has no public {family} address to hold a lease under: set --public-{flag} or --iface"
    )]
    NoAddress {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// `ip` or `ipv6`.
        flag: &'static str,
    },
    /// All subnets are held.
    #[error(
        "out of subnets: all /{subnet_len} subnets of {network} from {min} to {max} are taken ({taken} leases): \
         enlarge the network, raise the subnet length, or delete leases of nodes that are gone"
    )]
    OutOfSubnets {
        /// The network.
        network: String,
        /// Prefix length of a node's subnet.
        subnet_len: u8,
        /// Base of the first subnet that may be given out.
        min: String,
        /// Base of the last one.
        max: String,
        /// How many stored leases have a subnet of that family.
        taken: usize,
    },
}

/// Decides which subnet this node asks for.
///
/// `previous` is what `subnet.env` has from an earlier start, `stored` every lease in the store, ours included.
pub fn choose(
    conf: &NetConf,
    us: &Identity,
    previous: Option<SubnetKey>,
    stored: &[StoredLease],
) -> Result<Decision, AcquireError> {
    check_identity(conf, us)?;
    let mut warnings = Vec::new();
    let ours = |stored: &&StoredLease| is_ours(conf, us, &stored.lease);
    let mine: Vec<&StoredLease> = stored.iter().filter(ours).collect();
    if let Some(found) = best(conf, previous, &mine) {
        return Ok(Decision {
            choice: Choice::Reuse {
                key: found.lease.key,
                reserved: found.reserved,
                mod_revision: found.mod_revision,
            },
            drop_incompatible: None,
            warnings,
        });
    }
    for kept in mine.iter().filter(|mine| mine.reserved) {
        warnings.push(format!(
            "reservation {} for this node is not compatible with the network config, leaving it alone",
            kept.lease.key
        ));
    }
    let dropped = mine.iter().find(|mine| !mine.reserved);
    let dropped_key = dropped.map(|mine| mine.lease.key);
    let others = stored.iter().map(|stored| stored.lease.key);
    let others: Vec<SubnetKey> = others.filter(|key| Some(*key) != dropped_key).collect();
    let free = Free {
        dropped: dropped_key,
        previous,
        v4: others.iter().filter_map(|key| key.v4).collect(),
        v6: others.iter().filter_map(|key| key.v6).collect(),
    };
    Ok(Decision {
        choice: free.choice(conf, &mut warnings)?,
        drop_incompatible: dropped.map(|mine| (mine.lease.key, mine.mod_revision)),
        warnings,
    })
}

/// Tells whether the configuration allows a node to hold the subnets of `key`: each enabled family present and
/// fitting, and no other.
pub fn compatible(conf: &NetConf, key: &SubnetKey) -> bool {
    let v4 = match (&conf.ipv4, key.v4) {
        (Some(conf), Some(subnet)) => subnet::fits(conf, subnet),
        (conf, subnet) => conf.is_none() && subnet.is_none(),
    };
    let v6 = match (&conf.ipv6, key.v6) {
        (Some(conf), Some(subnet)) => subnet::fits_v6(conf, subnet),
        (conf, subnet) => conf.is_none() && subnet.is_none(),
    };
    v4 && v6
}

/// Tells whether a lease is this node's: by the IPv4 address, and by the IPv6 address where there is no IPv4.
pub fn is_ours(conf: &NetConf, us: &Identity, lease: &Lease) -> bool {
    if conf.enable_ipv4 {
        us.public_ip.is_some() && lease.attrs.public_ip == us.public_ip
    } else {
        us.public_ipv6.is_some() && lease.attrs.public_ipv6 == us.public_ipv6
    }
}

fn check_identity(conf: &NetConf, us: &Identity) -> Result<(), AcquireError> {
    let missing4 = us.public_ip.is_none_or(|ip| ip.is_unspecified());
    let missing6 = us.public_ipv6.is_none_or(|ip| ip.is_unspecified());
    if conf.enable_ipv4 && missing4 {
        let (family, flag) = ("IPv4", "ip");
        return Err(AcquireError::NoAddress { family, flag });
    }
    if conf.enable_ipv6 && missing6 {
        let (family, flag) = ("IPv6", "ipv6");
        return Err(AcquireError::NoAddress { family, flag });
    }
    Ok(())
}

/// Of several leases of ours, prefers a reservation, then the subnet that is in use on this node, then the first key.
fn best<'a>(
    conf: &NetConf,
    previous: Option<SubnetKey>,
    mine: &[&'a StoredLease],
) -> Option<&'a StoredLease> {
    let usable = mine.iter().filter(|mine| compatible(conf, &mine.lease.key));
    let in_use = |key: SubnetKey| previous.is_some_and(|p| p.v4 == key.v4 && p.v6 == key.v6);
    let rank = |mine: &StoredLease| (!mine.reserved, !in_use(mine.lease.key), mine.lease.key);
    usable.min_by_key(|mine| rank(mine)).copied()
}

/// What is wanted again, and what is in the way.
struct Free {
    dropped: Option<SubnetKey>,
    previous: Option<SubnetKey>,
    v4: BTreeSet<Ipv4Net>,
    v6: BTreeSet<Ipv6Net>,
}

impl Free {
    fn choice(&self, conf: &NetConf, warnings: &mut Vec<String>) -> Result<Choice, AcquireError> {
        let v4 = conf.ipv4.map(|conf| self.again_v4(&conf, warnings));
        let v6 = conf.ipv6.map(|conf| self.again_v6(&conf, warnings));
        if v4 != Some(None) && v6 != Some(None) {
            let (v4, v6) = (v4.flatten(), v6.flatten());
            let key = SubnetKey { v4, v6 };
            return Ok(Choice::Previous { key });
        }
        // One candidate for a family whose subnet is settled, many for the other.
        let list4 = match (&conf.ipv4, v4.flatten()) {
            (_, Some(subnet)) => Some(vec![subnet]),
            (Some(conf), None) => Some(self.list_v4(conf)?),
            (None, None) => None,
        };
        let list6 = match (&conf.ipv6, v6.flatten()) {
            (_, Some(subnet)) => Some(vec![subnet]),
            (Some(conf), None) => Some(self.list_v6(conf)?),
            (None, None) => None,
        };
        let candidates = pair(list4, list6);
        Ok(Choice::Pick { candidates })
    }

    fn again_v4(
        &self,
        conf: &FamilyConf<Ipv4Net, Ipv4Addr>,
        warnings: &mut Vec<String>,
    ) -> Option<Ipv4Net> {
        let dropped = self.dropped.and_then(|key| key.v4);
        let previous = self.previous.and_then(|key| key.v4);
        let previous = previous.filter(|previous| dropped != Some(*previous));
        for subnet in [dropped, previous].into_iter().flatten() {
            let holder = self
                .v4
                .iter()
                .find(|taken| subnet::overlap(**taken, subnet));
            if let Some(reason) = not_again(subnet::fits(conf, subnet), holder) {
                warnings.push(format!("previously leased subnet {subnet} {reason}"));
            } else {
                return Some(subnet);
            }
        }
        None
    }

    fn again_v6(
        &self,
        conf: &FamilyConf<Ipv6Net, Ipv6Addr>,
        warnings: &mut Vec<String>,
    ) -> Option<Ipv6Net> {
        let dropped = self.dropped.and_then(|key| key.v6);
        let previous = self.previous.and_then(|key| key.v6);
        let previous = previous.filter(|previous| dropped != Some(*previous));
        for subnet in [dropped, previous].into_iter().flatten() {
            let holder = self
                .v6
                .iter()
                .find(|taken| subnet::overlap_v6(**taken, subnet));
            if let Some(reason) = not_again(subnet::fits_v6(conf, subnet), holder) {
                warnings.push(format!("previously leased subnet {subnet} {reason}"));
            } else {
                return Some(subnet);
            }
        }
        None
    }

    fn list_v4(&self, conf: &FamilyConf<Ipv4Net, Ipv4Addr>) -> Result<Vec<Ipv4Net>, AcquireError> {
        let found = subnet::candidate_subnets(conf, &self.v4, CANDIDATES);
        if found.is_empty() {
            return Err(out_of_subnets(conf, self.v4.len()));
        }
        Ok(found)
    }

    fn list_v6(&self, conf: &FamilyConf<Ipv6Net, Ipv6Addr>) -> Result<Vec<Ipv6Net>, AcquireError> {
        let found = subnet::candidate_subnets_v6(conf, &self.v6, CANDIDATES);
        if found.is_empty() {
            return Err(out_of_subnets(conf, self.v6.len()));
        }
        Ok(found)
    }
}

fn not_again<N: ToString>(fits: bool, holder: Option<N>) -> Option<String> {
    match holder {
        _ if !fits => Some("is not compatible with the network config, ignoring it".to_owned()),
        Some(holder) => Some(format!(
            "is taken by lease {}, ignoring it",
            holder.to_string()
        )),
        None => None,
    }
}

fn out_of_subnets<N: ToString, A: ToString>(conf: &FamilyConf<N, A>, taken: usize) -> AcquireError {
    AcquireError::OutOfSubnets {
        network: conf.network.to_string(),
        subnet_len: conf.subnet_len,
        min: conf.min.to_string(),
        max: conf.max.to_string(),
        taken,
    }
}

/// Makes keys of both lists. Each subnet is in one key only, so nodes that pick different keys share no subnet,
/// except where a list has one element because that subnet is settled.
fn pair(v4: Option<Vec<Ipv4Net>>, v6: Option<Vec<Ipv6Net>>) -> Vec<SubnetKey> {
    let key = |v4, v6| SubnetKey { v4, v6 };
    match (v4, v6) {
        (Some(v4), None) => v4.into_iter().map(|v4| key(Some(v4), None)).collect(),
        (None, Some(v6)) => v6.into_iter().map(|v6| key(None, Some(v6))).collect(),
        (None, None) => Vec::new(),
        (Some(v4), Some(v6)) => match (v4.as_slice(), v6.as_slice()) {
            (&[v4], v6) => v6.iter().map(|v6| key(Some(v4), Some(*v6))).collect(),
            (v4, &[v6]) => v4.iter().map(|v4| key(Some(*v4), Some(v6))).collect(),
            (v4, v6) => v4
                .iter()
                .zip(v6)
                .map(|(v4, v6)| key(Some(*v4), Some(*v6)))
                .collect(),
        },
    }
}

#[cfg(test)]
mod tests;
