//! What the Kubernetes API changes about a start and about what is followed afterwards.

use std::sync::Arc;

use flannel_core::{addr::Family, config::NetConf, kube::granularity};
use tokio::sync::watch;

use super::{Setting, StartError, open as open_store};
use crate::{
    cli::Args,
    health::{Board, Part},
    leases::{Origin, Store, View},
};

/// Opens the store, waits until the cluster is known, and takes over what the own Node object says about this node's addresses.
pub(super) async fn open(
    args: &mut Args,
    board: &Board,
) -> Result<(Store, String, NetConf), StartError> {
    let (store, text, mut conf) = open_store(args, board).await?;
    let Store::Kube(kube) = &store else {
        return Ok((store, text, conf));
    };
    let origin = kube
        .sync(&conf, |waiting| board.lack(Part::Lease, waiting))
        .await;
    if let Origin::Memory(text) = origin {
        board.note(Part::Lease, Some(text));
    }
    let addresses = kube.node_addresses();
    args.uplink.public_ip = addresses.public_ip.or(args.uplink.public_ip);
    args.uplink.public_ipv6 = addresses.public_ipv6.or(args.uplink.public_ipv6);
    for family in conf.families() {
        if let Some((network, len)) = conf.range(family) {
            set_len(&mut conf, family, kube.granularity(network, len));
        }
    }
    Ok((store, text, conf))
}

/// Sets the prefix length that the table of subnets of one family is made for.
pub(super) fn set_len(conf: &mut NetConf, family: Family, len: u8) {
    match (family, &mut conf.ipv4, &mut conf.ipv6) {
        (Family::V4, Some(range), _) => range.subnet_len = len,
        (Family::V6, _, Some(range)) => range.subnet_len = len,
        (Family::V4, None, _) | (Family::V6, _, None) => {}
    }
}

/// Follows the cluster where its nodes decide about this one: the eBPF table of subnets is made for the smallest of them.
#[derive(Debug)]
pub(super) struct Follower {
    pub(super) views: watch::Receiver<View>,
    pub(super) settings: Arc<watch::Sender<Setting>>,
    pub(super) board: Board,
}

impl Follower {
    pub(super) async fn run(mut self) {
        loop {
            self.look();
            if self.views.changed().await.is_err() {
                return;
            }
        }
    }

    fn look(&mut self) {
        let view = self.views.borrow_and_update().clone();
        if view.connected {
            self.board.note(Part::Lease, None);
        } else if let Some(error) = &view.last_error {
            let text = format!("the other nodes are as they were last known: {error}");
            self.board.note(Part::Lease, Some(text));
        }
        for family in Family::ALL {
            let Some((network, before)) = self.settings.borrow().conf.range(family) else {
                continue;
            };
            let others = view.snapshot.iter().flat_map(|all| all.leases.keys());
            let own = view.own.iter().map(|lease| &lease.key);
            let subnets = others.chain(own).filter_map(|key| key.subnet(family));
            let len = granularity(network, subnets, before);
            if len == before {
                continue;
            }
            tracing::info!(
                before,
                now = len,
                "there are smaller subnets than before: making the table of subnets anew"
            );
            self.settings
                .send_modify(|setting| set_len(&mut setting.conf, family, len));
        }
    }
}
