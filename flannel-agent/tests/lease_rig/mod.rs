//! Agents without a kernel: a lease store each, kept running in a task, and what they log.

use std::{
    io::Write,
    net::{Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex},
    time::Duration,
};

use flannel_agent::leases::{Held, Offer, Snapshot, Store, StoreConfig, View};
use flannel_core::{
    acquire::Identity,
    addr::VtepMac,
    config::{BackendKind, NetConf},
    key::PublicKey,
    lease::{LeaseAttrs, SubnetKey, VxlanData, WireguardData},
};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

/// How long anything may take that is expected to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// 254 subnets.
pub(crate) const CONF: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// Exactly five: the first subnet of a network is left out.
pub(crate) const FIVE: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.10.0","SubnetMax":"10.5.14.0","Backend":{"Type":"vxlan"}}"#;

/// What node `node` publishes: address 192.168.77.`node`, a MAC address that ends in `node`.
pub(crate) fn attrs(node: u8) -> LeaseAttrs {
    let mac: VtepMac = format!("0a:00:00:00:00:{node:02x}").parse().expect("mac");
    LeaseAttrs::vxlan_v4(Ipv4Addr::new(192, 168, 77, node), 1, mac)
}

/// What node `node` asks for.
pub(crate) fn offer(node: u8, conf: &str) -> Offer {
    let attrs = attrs(node);
    Offer {
        conf: NetConf::parse(conf).expect("network configuration"),
        identity: Identity {
            public_ip: attrs.public_ip,
            public_ipv6: attrs.public_ipv6,
        },
        attrs,
        previous: None,
    }
}

/// A network of both families.
pub(crate) fn dual_conf(kind: BackendKind) -> String {
    format!(
        r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd05::/48","Backend":{{"Type":"{kind}"}}}}"#
    )
}

/// A network of IPv6 alone.
pub(crate) fn v6_conf(kind: BackendKind) -> String {
    format!(
        r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd05::/48","Backend":{{"Type":"{kind}"}}}}"#
    )
}

/// What node `node` of both families asks for: as [`attrs`], and fd77::`node`.
pub(crate) fn dual(node: u8, kind: BackendKind) -> Offer {
    let data = |family: u8| match kind {
        BackendKind::Vxlan => {
            let mac = VtepMac::new([0x0a, 0, 0, 0, family, node]);
            Some(VxlanData { vni: 1, mac }.into())
        }
        BackendKind::Wireguard => Some(
            WireguardData {
                public_key: PublicKey::new([node; 32]),
                port: 51_820 + u16::from(family),
            }
            .into(),
        ),
        BackendKind::HostGw | BackendKind::Alloc => None,
    };
    let public_ipv6: Ipv6Addr = format!("fd77::{node:x}").parse().expect("address");
    let attrs = LeaseAttrs {
        public_ip: Some(Ipv4Addr::new(192, 168, 77, node)),
        // Upstream's alloc publishes none.
        public_ipv6: (kind != BackendKind::Alloc).then_some(public_ipv6),
        backend_type: kind.lease_type().to_owned(),
        v4: data(0),
        v6: data(1),
    };
    Offer {
        conf: NetConf::parse(&dual_conf(kind)).expect("network configuration"),
        identity: Identity {
            public_ip: attrs.public_ip,
            public_ipv6: Some(public_ipv6),
        },
        attrs,
        previous: None,
    }
}

/// What node `node` of IPv6 alone asks for.
pub(crate) fn v6_only(node: u8, kind: BackendKind) -> Offer {
    let mut offer = dual(node, kind);
    offer.conf = NetConf::parse(&v6_conf(kind)).expect("network configuration");
    offer.identity.public_ip = None;
    offer.attrs = LeaseAttrs {
        public_ip: None,
        public_ipv6: offer.identity.public_ipv6,
        v4: None,
        ..offer.attrs
    };
    offer
}

/// The offer of a node that held `subnet` before its restart.
pub(crate) fn with_previous(offer: Offer, subnet: &str) -> Offer {
    Offer {
        previous: Some(key(subnet)),
        ..offer
    }
}

pub(crate) fn key(text: &str) -> SubnetKey {
    text.parse().expect("subnet key")
}

/// An agent's lease half.
pub(crate) struct Agent {
    /// The lease as first acquired.
    pub(crate) held: Held,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) offer: watch::Sender<Offer>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Agent {
    pub(crate) async fn start(config: &StoreConfig, offer: Offer) -> Agent {
        let store = Store::open(config).await.expect("open the store");
        Agent::start_with(store, offer).await
    }

    /// The same with a store that is open.
    pub(crate) async fn start_with(store: Store, offer: Offer) -> Agent {
        let cancel = CancellationToken::new();
        let acquired = timeout(PATIENCE, store.acquire_until(&offer, &cancel))
            .await
            .expect("a lease in time");
        let held = acquired.expect("not cancelled").expect("a lease");
        let (out, view) = watch::channel(View::default());
        let (offer, offers) = watch::channel(offer);
        let task = tokio::spawn(store.run(held.clone(), offers, out, cancel.clone()));
        Agent {
            held,
            view,
            offer,
            cancel,
            task,
        }
    }

    /// Waits for a view; panics with the last one.
    pub(crate) async fn until(&mut self, what: &str, wanted: impl Fn(&View) -> bool) -> View {
        let waited = timeout(PATIENCE, self.view.wait_for(|view| wanted(view))).await;
        let found = waited.ok().and_then(Result::ok).map(|view| view.clone());
        found.unwrap_or_else(|| panic!("{what}: last view {:#?}", *self.view.borrow()))
    }

    /// Waits until the snapshot has exactly these leases.
    pub(crate) async fn until_leases(&mut self, what: &str, wanted: &Snapshot) -> View {
        self.until(what, |view| view.snapshot.as_deref() == Some(wanted))
            .await
    }

    pub(crate) fn subnet(&self) -> SubnetKey {
        let own = self.view.borrow().own.clone();
        own.expect("an own lease").key
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        timeout(PATIENCE, self.task)
            .await
            .expect("stops in time")
            .expect("no panic");
    }
}

/// A snapshot of leases given as key and node number.
pub(crate) fn snapshot(leases: &[(&str, u8)]) -> Snapshot {
    Snapshot {
        leases: leases
            .iter()
            .map(|(name, node)| (key(name), attrs(*node)))
            .collect(),
    }
}

/// What this thread logs from now on.
pub(crate) struct Log {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: tracing::subscriber::DefaultGuard,
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("log").write(text)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Everything down to TRACE, of the libraries too: a secret must not show anywhere.
    pub(crate) fn capture() -> Log {
        let text = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&text);
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || Sink(Arc::clone(&sink)))
            .finish();
        Log {
            text,
            _guard: tracing::subscriber::set_default(subscriber),
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("log")).into_owned()
    }

    /// The lines of our own crate that contain all of these.
    pub(crate) fn lines(&self, parts: &[&str]) -> Vec<String> {
        let text = self.text();
        let ours = text.lines().filter(|line| line.contains("flannel_agent"));
        ours.filter(|line| parts.iter().all(|part| line.contains(part)))
            .map(ToOwned::to_owned)
            .collect()
    }

    pub(crate) async fn until(&self, parts: &[&str]) {
        let seen = async {
            while self.lines(parts).is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = timeout(PATIENCE, seen).await;
        assert!(
            waited.is_ok(),
            "no line with {parts:?} in:\n{}",
            self.text()
        );
    }
}
