//! What the Kubernetes API changes about a start and about what is followed afterwards.

use std::sync::Arc;

use flannel_core::{config::NetConf, kube::granularity};
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
    if let Some(family) = &mut conf.ipv4 {
        family.subnet_len = kube.granularity(family.network, family.subnet_len);
    }
    Ok((store, text, conf))
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
        let Some(family) = self.settings.borrow().conf.ipv4 else {
            return;
        };
        let others = view.snapshot.iter().flat_map(|all| all.leases.keys());
        let own = view.own.iter().map(|lease| &lease.key);
        let subnets = others.chain(own).filter_map(|key| key.v4);
        let len = granularity(family.network, subnets, family.subnet_len);
        if len == family.subnet_len {
            return;
        }
        tracing::info!(
            before = family.subnet_len,
            now = len,
            "there are smaller subnets than before: making the table of subnets anew"
        );
        self.settings.send_modify(|setting| {
            if let Some(family) = &mut setting.conf.ipv4 {
                family.subnet_len = len;
            }
        });
    }
}
