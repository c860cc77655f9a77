//! Leases in the Kubernetes API, with the annotations of upstream flannel: this node's subnet is the pod CIDR of its Node object.
//!
//! All nodes are listed and watched once, by one task; everything else reads what that task knows. Where upstream's behaviour loses
//! traffic or ends the process this store differs: it waits for a pod CIDR instead of ending, follows its own Node object, publishes
//! nothing under a subnet that is not inside the network, and starts from what it knew last when the API does not answer.

mod acquire;
mod condition;
mod conf;
mod connection;
mod credentials;
mod events;
mod feed;
mod keeper;
mod memory;
mod name;

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flannel_core::{
    acquire::Identity,
    addr::Family,
    config::NetConf,
    kube::{Families, Field, Names, Node, granularity, read_cluster, stored_attrs, subnets_of},
    lease::{Lease, SubnetKey},
};
use ipnet::IpNet;
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{connection::Connection, events::Recorder, feed::Known, name::OwnName};
use super::{Held, LeaseError, Offer, Snapshot, View};
use crate::health::Board;

/// How long a start waits for an answer of the API before it goes by the last known state.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(5);
/// How often something that is waited for is said again.
const REMINDER: Duration = Duration::from_secs(10);

/// How to reach the Kubernetes API, and who we are in it.
#[derive(Clone)]
pub struct KubeOptions {
    /// URL of the API, in place of the one in the kubeconfig.
    pub api_url: Option<String>,
    /// A kubeconfig; without it and without a URL the one of the pod's service account is used.
    pub kubeconfig: Option<PathBuf>,
    /// What annotations start with.
    pub annotation_prefix: String,
    /// The network configuration.
    pub net_config_path: PathBuf,
    /// Where the last known state of the cluster is kept; `None` to keep none.
    pub memory: Option<PathBuf>,
    /// Whether to keep the node's condition `NetworkUnavailable`.
    pub set_network_unavailable: bool,
    /// `NODE_NAME`.
    pub node_name: Option<String>,
    /// `POD_NAME`, by which the node's name is found where it is not given.
    pub pod_name: Option<String>,
    /// `POD_NAMESPACE`.
    pub pod_namespace: Option<String>,
    /// `EVENT_QUEUE_DEPTH`, which is only looked at: there is no such queue.
    pub event_queue_depth: Option<String>,
    /// How long a start waits for an answer before it goes by the last known state: [`DEFAULT_PATIENCE`] but in tests.
    pub patience: Duration,
}

impl Default for KubeOptions {
    fn default() -> Self {
        Self {
            api_url: None,
            kubeconfig: None,
            annotation_prefix: flannel_core::kube::DEFAULT_PREFIX.to_owned(),
            net_config_path: "/etc/kube-flannel/net-conf.json".into(),
            memory: None,
            set_network_unavailable: true,
            node_name: None,
            pod_name: None,
            pod_namespace: None,
            event_queue_depth: None,
            patience: DEFAULT_PATIENCE,
        }
    }
}

impl fmt::Debug for KubeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A URL may carry a password in front of an `@`.
        let url = self.api_url.as_deref().map(without_credentials);
        f.debug_struct("KubeOptions")
            .field("api_url", &url)
            .field("kubeconfig", &self.kubeconfig)
            .field("annotation_prefix", &self.annotation_prefix)
            .field("net_config_path", &self.net_config_path)
            .field("memory", &self.memory)
            .field("set_network_unavailable", &self.set_network_unavailable)
            .field("node_name", &self.node_name)
            .finish_non_exhaustive()
    }
}

/// A URL without user name and password.
fn without_credentials(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    if scheme.is_empty() {
        host.to_owned()
    } else {
        format!("{scheme}://{host}")
    }
}

/// What an administrator has written to this node's own Node object about its addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeAddresses {
    /// `node-public-ip`, in place of `--public-ip`.
    pub public_ip: Option<std::net::Ipv4Addr>,
    /// `node-public-ipv6`, in place of `--public-ipv6`.
    pub public_ipv6: Option<std::net::Ipv6Addr>,
}

/// Where the first list of nodes came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The API.
    Api,
    /// The file of the last known state, because the API does not answer. The text says so.
    Memory(String),
}

/// The lease store in the Kubernetes API. Clones share everything.
#[derive(Clone, Debug)]
pub struct KubeLeases {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: KubeOptions,
    connection: Arc<Connection>,
    names: Names,
    own: OwnName,
    known: watch::Sender<Known>,
    /// The task that lists and watches, once started.
    feeding: Mutex<Option<JoinHandle<()>>>,
    recorder: Recorder,
    /// Our last write of annotations: the watch shows it a moment later.
    written: Mutex<Option<Written>>,
}

/// A write to our Node object, or a look at it that found nothing to write.
#[derive(Clone, Debug)]
struct Written {
    /// Of the object.
    uid: String,
    /// The version of the object afterwards, 0 where that is not known.
    version: u64,
    at: Instant,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let feeding = self
            .feeding
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = feeding.take() {
            task.abort();
        }
    }
}

impl KubeLeases {
    pub(super) async fn open(options: &KubeOptions) -> Result<Self, LeaseError> {
        let names = Names::new(&options.annotation_prefix).map_err(LeaseError::KubePrefix)?;
        name::check_queue_depth(options.event_queue_depth.as_deref())?;
        name::check(options)?;
        let connection = Arc::new(Connection::open(options).await?);
        let recorder = Recorder::start(Arc::clone(&connection));
        Ok(Self {
            shared: Arc::new(Shared {
                own: OwnName::new(options.node_name.clone()),
                options: options.clone(),
                connection,
                names,
                known: watch::Sender::new(Known::default()),
                feeding: Mutex::default(),
                recorder,
                written: Mutex::default(),
            }),
        })
    }

    pub(super) fn twin(&self) -> Self {
        self.clone()
    }

    pub(super) fn describe(&self) -> String {
        let server = self.shared.connection.server();
        match self.shared.own.get() {
            Some(node) => format!("kubernetes {server} node {node}"),
            None => format!("kubernetes {server}"),
        }
    }

    pub(super) fn conf_origin(&self) -> String {
        self.shared.options.net_config_path.display().to_string()
    }

    pub(super) async fn net_conf(&self) -> Result<String, LeaseError> {
        conf::read(&self.shared.options.net_config_path).await
    }

    pub(super) async fn net_conf_after(&self, known: &str) -> String {
        conf::after(&self.shared.options.net_config_path, known).await
    }

    /// Follows what is known of the cluster, starting to learn it at the first call.
    fn known(&self) -> watch::Receiver<Known> {
        let receiver = self.shared.known.subscribe();
        let mut feeding = self
            .shared
            .feeding
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        feeding.get_or_insert_with(|| {
            let connection = Arc::clone(&self.shared.connection);
            tokio::spawn(feed::run(connection, self.shared.known.clone()))
        });
        receiver
    }

    fn written(&self) -> Option<Written> {
        let written = self.shared.written.lock();
        written.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_written(&self, uid: String, version: u64) {
        let written = self.shared.written.lock();
        *written.unwrap_or_else(PoisonError::into_inner) = Some(Written {
            uid,
            version,
            at: Instant::now(),
        });
    }

    /// Our own Node object as it is known.
    fn own_node(&self, known: &Known) -> Option<Node> {
        known.nodes.get(&self.shared.own.get()?).cloned()
    }

    /// Waits until the cluster is known: from the API, or, if that does not answer soon, from the file of the last known state. `tell`
    /// hears what is waited for.
    pub async fn sync(&self, conf: &NetConf, tell: impl Fn(&str)) -> Origin {
        acquire::sync(self, conf, &tell).await
    }

    /// What the own Node object says about this node's addresses, as far as it is known.
    pub fn node_addresses(&self) -> NodeAddresses {
        let known = self.shared.known.borrow();
        let Some(node) = self.own_node(&known) else {
            return NodeAddresses::default();
        };
        let names = &self.shared.names;
        NodeAddresses {
            public_ip: address_in(&node, names, Field::NodePublicIp),
            public_ipv6: address_in(&node, names, Field::NodePublicIpv6),
        }
    }

    /// The length of the smallest subnet in the cluster as far as it is known, not less than `at_least`.
    pub fn granularity(&self, network: IpNet, at_least: u8) -> u8 {
        let family = Family::of_net(&network);
        let families = Families { v4: true, v6: true };
        let known = self.shared.known.borrow();
        let own = self.shared.own.get();
        let subnets = known
            .nodes
            .values()
            .filter(|node| node.takes_part(&self.shared.names) || Some(&node.name) == own.as_ref())
            .filter_map(|node| subnets_of(node, families).ok()?.subnet(family));
        granularity(network, subnets, at_least)
    }

    pub(super) async fn own_stored(&self, _us: &Identity) -> Result<Option<Lease>, LeaseError> {
        let mut known = self.known();
        let node = match known.wait_for(Known::is_usable).await {
            Ok(known) => self.own_node(&known),
            Err(_closed) => None,
        };
        let Some(node) = node else { return Ok(None) };
        let both = Families { v4: true, v6: true };
        let key = subnets_of(&node, both).unwrap_or(SubnetKey { v4: None, v6: None });
        Ok(Some(Lease {
            key,
            attrs: stored_attrs(&node, &self.shared.names),
        }))
    }

    pub(super) async fn snapshot(&self) -> Result<Snapshot, LeaseError> {
        Ok(self.look().await?.0)
    }

    /// Lists all leases, once, and which of them is this node's.
    pub async fn look(&self) -> Result<(Snapshot, Option<SubnetKey>), LeaseError> {
        let conf = self.net_conf().await?;
        let both = Families { v4: true, v6: true };
        let conf = NetConf::parse_assigned(&conf);
        let families = conf.map_or(both, |conf| Families::from(&conf));
        let own = name::find(self).await?;
        let (nodes, _) = feed::list(&self.shared.connection, true).await?;
        let cluster = read_cluster(nodes.values(), &self.shared.names, families, "");
        let mut holders = cluster.holders.iter();
        let own = holders
            .find(|(_, holder)| **holder == own)
            .map(|(key, _)| *key);
        let snapshot = Snapshot {
            leases: cluster.leases,
        };
        Ok((snapshot, own))
    }

    pub(super) async fn acquire(&self, offer: &Offer) -> Result<Held, LeaseError> {
        acquire::attempt(self, offer).await
    }

    pub(super) async fn acquire_telling(&self, offer: &Offer, tell: &impl Fn(&str)) -> Held {
        acquire::acquire(self, offer, tell).await
    }

    pub(super) async fn run(
        &self,
        held: Held,
        offers: watch::Receiver<Offer>,
        out: &watch::Sender<View>,
    ) {
        keeper::run(self, held, offers, out).await;
    }

    /// Tells the cluster how this node is, until cancelled.
    pub async fn attend(self, board: Board, cancel: CancellationToken) {
        if self.shared.options.set_network_unavailable {
            let work = condition::attend(&self, &board);
            let _cancelled = cancel.run_until_cancelled(work).await;
        } else {
            let work = condition::announce(&self, &board);
            let _cancelled = cancel.run_until_cancelled(work).await;
        }
    }
}

/// An address that an administrator has written to a node.
fn address_in<A: std::str::FromStr>(node: &Node, names: &Names, field: Field) -> Option<A> {
    let text = node.get(names, field)?;
    let key = names.key(field);
    if let Ok(address) = text.parse() {
        tracing::info!("using {text} from node annotation '{key}' as public address");
        return Some(address);
    }
    tracing::warn!("invalid public IP address: {text} in node annotation '{key}': it is not used");
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_print_without_passwords() {
        let options = KubeOptions {
            api_url: Some("https://root:hunter2@api:6443".to_owned()),
            ..KubeOptions::default()
        };
        let text = format!("{options:?}");
        assert!(
            !text.contains("hunter2") && text.contains("https://api:6443"),
            "{text}"
        );
        assert_eq!(without_credentials("10.0.0.1:8080"), "10.0.0.1:8080");
    }
}
