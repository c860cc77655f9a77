//! Packets to all other nodes at once: over the underlay, through the overlay, and as large as the overlay should carry.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use flannel_core::check::{PeerProbe, Probes};
use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;

use super::icmp::{ORDINARY, Pinger};

/// Peers that are asked at the same time.
const AT_ONCE: usize = 64;
/// How long, and how often, a first answer is waited for. The first packet may have to wait for a neighbour's address.
const FIRST: Duration = Duration::from_millis(500);
const ATTEMPTS: u32 = 3;
/// The least and the most that the answer to a large packet gets.
const LEAST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_millis(600);

/// Asks all `peers`, given by public address and the address of their tunnel device. `mtu` is our tunnel device's, if there is one.
pub(super) async fn all(
    peers: &BTreeMap<IpAddr, IpAddr>,
    mtu: Option<u32>,
    deadline: Instant,
) -> Probes {
    let mut probes = Probes::default();
    if let Some(first) = peers.keys().next()
        && let Err(error) = Pinger::open(*first)
        && error.kind() == std::io::ErrorKind::PermissionDenied
    {
        probes.refused = Some(format!("{error} (CAP_NET_RAW is missing)"));
        return probes;
    }
    let answers = stream::iter(peers.iter().map(|(public, tunnel)| async move {
        if Instant::now() >= deadline {
            return (*public, None);
        }
        (*public, Some(one(*public, *tunnel, mtu, deadline).await))
    }))
    .buffer_unordered(AT_ONCE)
    .collect::<Vec<_>>()
    .await;
    for (public, answer) in answers {
        match answer {
            Some(answer) => {
                probes.peers.insert(public, answer);
            }
            None => probes.unfinished += 1,
        }
    }
    probes
}

async fn one(public: IpAddr, tunnel: IpAddr, mtu: Option<u32>, deadline: Instant) -> PeerProbe {
    let through = async {
        match mtu {
            Some(mtu) => overlay(tunnel, mtu, deadline).await,
            None => (None, None),
        }
    };
    let (underlay, (overlay, passes)) = tokio::join!(reach(public, deadline), through);
    PeerProbe {
        underlay,
        overlay,
        passes,
    }
}

async fn reach(address: IpAddr, deadline: Instant) -> Option<Duration> {
    // Where there is no way to the address, there is no socket to it.
    let mut pinger = Pinger::open(address).ok()?;
    answered(&mut pinger, ORDINARY, FIRST, ATTEMPTS, deadline).await
}

async fn overlay(address: IpAddr, mtu: u32, deadline: Instant) -> (Option<Duration>, Option<u32>) {
    let Ok(mut pinger) = Pinger::open(address) else {
        return (None, None);
    };
    let Some(time) = answered(&mut pinger, ORDINARY, FIRST, ATTEMPTS, deadline).await else {
        return (None, None);
    };
    let wait = (time * 4).clamp(LEAST, MOST);
    let size = largest(&mut pinger, mtu, wait, deadline).await;
    (Some(time), size)
}

/// The largest packet that is answered, up to `mtu`; `None` when there was no time to find out.
async fn largest(pinger: &mut Pinger, mtu: u32, wait: Duration, deadline: Instant) -> Option<u32> {
    if answered(pinger, mtu, wait, ATTEMPTS, deadline)
        .await
        .is_some()
    {
        return Some(mtu);
    }
    let (mut passes, mut fails) = (ORDINARY, mtu);
    while passes + 1 < fails {
        if Instant::now() >= deadline {
            return None;
        }
        let middle = passes.midpoint(fails);
        if answered(pinger, middle, wait, ATTEMPTS - 1, deadline)
            .await
            .is_some()
        {
            passes = middle;
        } else {
            fails = middle;
        }
    }
    Some(passes)
}

async fn answered(
    pinger: &mut Pinger,
    size: u32,
    wait: Duration,
    attempts: u32,
    deadline: Instant,
) -> Option<Duration> {
    for _attempt in 0..attempts {
        let until = deadline.min(Instant::now() + wait);
        if let Some(time) = pinger.ask(size, until).await {
            return Some(time);
        }
        // A packet that could not even be sent says so at once; the cause may need the time.
        tokio::time::sleep_until(until).await;
        if Instant::now() >= deadline {
            break;
        }
    }
    None
}
