//! The alloc backend: a lease and `subnet.env`, and nobody's packets are touched, because somebody else routes them (upstream:
//! pkg/backend/alloc).

use std::time::Duration;

use flannel_core::{
    addr::Mtu,
    config::{self, BackendKind},
    lease::SubnetKey,
    subnet_env::SubnetEnv,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Leasing, Node, Setting, StartError, follow, former, own_of, previous_subnet};
use crate::{
    cli::cleanup,
    files,
    health::Part,
    leases::{Store, View},
    masquerade,
    state::{Bare, BareFile},
    telemetry::{chain, one_line},
};

/// How often to look whether `subnet.env` is still there.
const RESYNC: Duration = Duration::from_secs(5);

/// Runs until cancelled.
pub(super) async fn run(
    node: &Node<'_>,
    setting: &Setting,
    (store, text): (Store, String),
    cancel: &CancellationToken,
) -> Result<(), StartError> {
    let mtu = mtu(node, setting)?;
    retire(node).await;
    former::retire(&node.net, &node.args.subnet_file, setting).await;
    let previous = previous_subnet(&node.args.subnet_file);
    let offer = setting.offer(&node.macs, previous);
    let (conf_store, attending) = (store.twin(), store.twin());
    let Some(leasing) = Leasing::start(store, offer, &node.board, cancel).await? else {
        return Ok(());
    };
    if let Store::Kube(kube) = attending {
        tokio::spawn(kube.attend(node.board.clone(), cancel.clone()));
    }
    let views = leasing.views();
    let mut settings = follow::start(node, setting, (conf_store, text), views, cancel);
    let mut views = leasing.views();
    node.board.settle(Part::Datapath);
    let mut file = EnvFile {
        node,
        mtu,
        written: None,
        trouble: None,
        state: BareFile::default(),
    };
    loop {
        let setting = settings.borrow_and_update().clone();
        let (own, mut connected) = seen(&views.borrow_and_update());
        let session = cancel.child_token();
        // Its tasks end with it, however it ends.
        let _tasks = session.clone().drop_guard();
        file.mtu = self::mtu(node, &setting).unwrap_or(file.mtu);
        leasing.offer(setting.offer(&node.macs, None));
        if let Some(own) = &own {
            // Before `subnet.env`, as upstream has it.
            let wanted = masquerade::Wanted::from_args(node.args, &setting.conf, own);
            masquerade::start(wanted, node.board.clone(), session.clone()).await;
        }
        loop {
            if let Some(own) = &own {
                file.write(&setting, own);
            }
            file.save_state(&setting, own.as_ref(), connected);
            tokio::select! {
                () = cancel.cancelled() => {
                    leasing.end().await;
                    return Ok(());
                }
                Ok(()) = settings.changed() => break,
                () = another(&mut views, (own, connected)) => {
                    let now = seen(&views.borrow_and_update());
                    if now.0 != own {
                        break;
                    }
                    connected = now.1;
                }
                () = sleep(RESYNC) => {}
            }
        }
    }
}

/// What another backend has left would go on taking packets.
async fn retire(node: &Node<'_>) {
    const ADVICE: &str = "stop the agent, run flannel-agent cleanup, and start it again";
    match cleanup::retire(&node.net, &node.args.subnet_file).await {
        Ok(true) => {}
        Ok(false) => {
            tracing::error!("something of an earlier backend is left on this node: {ADVICE}");
        }
        Err(error) => tracing::error!(
            error = one_line(&format!("{error:#}")),
            "something of an earlier backend may be left on this node: {ADVICE}"
        ),
    }
}

fn mtu(node: &Node<'_>, setting: &Setting) -> Result<Mtu, StartError> {
    config::tunnel_mtu(&setting.conf, setting.uplink.mtu).map_err(|source| StartError::Config {
        origin: node.origin.clone(),
        source,
    })
}

/// This node's subnet, and whether changes in the store are being seen.
fn seen(view: &View) -> (Option<SubnetKey>, bool) {
    let own = view.own.as_ref().map(|lease| lease.key);
    (own, view.connected)
}

/// Until that is different; for ever if the store's task has ended.
async fn another(views: &mut tokio::sync::watch::Receiver<View>, known: (Option<SubnetKey>, bool)) {
    if views.wait_for(|view| seen(view) != known).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// `subnet.env`, kept.
struct EnvFile<'a> {
    node: &'a Node<'a>,
    mtu: Mtu,
    /// The text last written.
    written: Option<String>,
    /// Why it could not be written, once said.
    trouble: Option<String>,
    /// What `status` and `cleanup` read.
    state: BareFile,
}

impl EnvFile<'_> {
    fn write(&mut self, setting: &Setting, own: &SubnetKey) {
        let (path, board) = (&self.node.args.subnet_file, &self.node.board);
        let text = SubnetEnv {
            network: setting.conf.ipv4.map(|range| range.network),
            subnet: own.v4,
            ipv6_network: setting.conf.ipv6.map(|range| range.network),
            ipv6_subnet: own.v6,
            mtu: self.mtu.get(),
            ip_masq: self.node.args.firewall.ip_masq,
        }
        .render();
        if self.written.as_ref() == Some(&text) && path.exists() {
            return;
        }
        if let Err(error) = files::replace(path, &text) {
            let trouble = chain(&error);
            board.lack(Part::SubnetFile, trouble.as_str());
            if self.trouble.as_ref() != Some(&trouble) {
                tracing::error!("Failed to write subnet file: {trouble}");
                self.trouble = Some(trouble);
            }
            return;
        }
        tracing::info!(
            subnet = %own,
            "Wrote subnet file to {}",
            one_line(&path.display().to_string())
        );
        if self.written.is_none() {
            tracing::info!("flannel is ready");
            tracing::info!("Running backend.");
        }
        self.written = Some(text);
        self.trouble = None;
        board.settle(Part::SubnetFile);
        board.summarize(format!("backend alloc, subnet {own}"));
    }

    fn save_state(&mut self, setting: &Setting, own: Option<&SubnetKey>, connected: bool) {
        let (conf, uplink) = (&setting.conf, &setting.uplink);
        let families = || conf.families().into_iter();
        let state = Bare {
            backend: BackendKind::Alloc,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            devices: Vec::new(),
            mode: None,
            uplink: uplink.name.clone(),
            public_ips: families()
                .filter_map(|family| uplink.public(family))
                .collect(),
            public_key: None,
            networks: families()
                .filter_map(|family| Some(conf.range(family)?.0))
                .collect(),
            subnets: families()
                .filter_map(|family| own_of(own?, family))
                .collect(),
            mtu: self.mtu.get(),
            store: self.node.origin.clone(),
            store_connected: connected,
            problems: self.trouble.iter().cloned().collect(),
            subnet_file: self.node.args.subnet_file.clone(),
            blackhole: self.node.args.firewall.ip_blackhole_route,
        };
        self.node.metrics.know_bare(0, &state);
        self.state.save(state);
    }
}
