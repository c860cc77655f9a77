//! Whether the number of nodes costs anything: agents that know more and more of them, side by side.

use std::time::Duration;

use anyhow::Context as _;

use crate::{
    check_stop,
    cluster::Strangers,
    meter::Meter,
    mode::{self, Mode},
    result::{Ratio, Samples},
    rig::{Plan, Rig},
    session::Pace,
    stats,
    workload::{self, Load},
};

/// A network with room for all of them.
const NETWORK: &str = "10.0.0.0/8";
/// The mode whose rows these are.
pub const MODE: &str = "agent-established";

/// Numbers of nodes. The last is as many as the network has subnets, apart from the first, which flannel leaves out.
pub const COUNTS: [u32; 4] = [1, 256, 4096, 65_536];
/// For a quick run.
pub const QUICK_COUNTS: [u32; 2] = [1, 1024];

/// Name of the row of a number of nodes.
pub fn row(count: u32) -> String {
    format!("nodes_{count}")
}

/// Measures packets a second for each number; the ratios are to the first of them.
pub fn run(
    counts: &[u32],
    pace: Pace,
    samples: &mut Samples,
    meter: &mut Meter,
) -> anyhow::Result<Vec<Ratio>> {
    let mode: Mode = *mode::ALL
        .iter()
        .find(|mode| mode.name == MODE)
        .context("no such mode")?;
    let mut rigs = Vec::new();
    for count in counts {
        check_stop()?;
        meter.stage(&format!("agents that know {count} nodes"));
        let plan = Plan {
            network: NETWORK.into(),
            strangers: strangers(*count),
            ..Plan::default()
        };
        rigs.push(Rig::build(mode, &plan)?);
    }
    let udp = workload::select(&["udp64".to_owned()], false)?;
    let udp = udp.first().context("no such workload")?;
    let load = Load {
        length: pace.length,
        half_rate: 0.0,
    };
    meter.stage("nodes");
    for round in 0..pace.rounds {
        for turn in stats::order(round, rigs.len()) {
            check_stop()?;
            meter.step(&format!("round {}, {} nodes", round + 1, counts[turn]));
            let values = udp.sample(&rigs[turn], &load)?;
            let rate = *values.first().context("no value")?;
            samples.add(&row(counts[turn]), "1/s", MODE, round, rate);
        }
    }
    let first = row(counts.first().copied().unwrap_or(1));
    Ok(counts
        .iter()
        .skip(1)
        .map(|count| ratio(samples, &row(*count), &first))
        .collect())
}

fn ratio(samples: &Samples, of: &str, to: &str) -> Ratio {
    let interval = stats::interval(&stats::ratios(samples.of(of, MODE), samples.of(to, MODE)));
    Ratio {
        workload: "nodes".into(),
        of: of.into(),
        to: to.into(),
        median: interval.median,
        lo: interval.lo,
        hi: interval.hi,
    }
}

/// Leases so that, with the two nodes that there are, an agent knows `count` others, or as many as there are subnets.
fn strangers(count: u32) -> Strangers {
    /// Subnets of the network, apart from the first and those of the two nodes.
    const MOST: u32 = 65_536 - 3;
    let leases = (1..=count.saturating_sub(1).min(MOST)).map(|number| {
        // From the far end: the agents take the first free subnets or any.
        let subnet = std::net::Ipv4Addr::from((10 << 24) | ((65_536 - number) << 8));
        let ip = std::net::Ipv4Addr::from((172 << 24) | (16 << 16) | number);
        let [.., a, b] = number.to_be_bytes();
        let lease = format!(
            r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:{a:02x}:{b:02x}"}}}}"#
        );
        (format!("{subnet}-24"), lease)
    });
    Strangers {
        leases: leases.collect(),
        patience: Duration::from_secs(u64::from(count / 150)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_have_subnets_of_their_own() {
        assert!(strangers(1).leases.is_empty());
        let all = strangers(65_536).leases;
        assert_eq!(all.len(), 65_533);
        let names: std::collections::BTreeSet<_> = all.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), all.len());
        assert!(!names.contains(&"10.0.0.0-24".to_owned()));
        assert!(names.contains(&"10.255.255.0-24".to_owned()));
    }
}
