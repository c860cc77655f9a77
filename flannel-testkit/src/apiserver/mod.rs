//! An HTTPS server that behaves as `kube-apiserver` does for nodes, pods and events, with faults on demand.
//!
//! It speaks HTTP/1.1 and JSON. Lists come in pages and by version, watches with bookmarks and 410, patches are merge or
//! strategic merge, `/status` is a resource of its own, roles are obeyed, refusals have Kubernetes' words, and an update that
//! changes nothing makes no version. What is not there: protobuf, tables, server-side apply, JSON patch, admission,
//! graceful deletion, and taking ownership away in `managedFields`.

mod auth;
mod clock;
mod control;
mod discovery;
mod events;
mod fault;
mod kubeconfig;
mod managed;
mod nodes;
mod patch;
mod read;
mod refusal;
mod request;
mod serve;
mod store;
#[cfg(test)]
mod tests;
mod tls;
mod watch;
mod write;

pub use auth::{Rule, User};
pub use fault::{Failure, Gone, WatchEnd};
pub use nodes::{full_size_node, node};
pub use request::Verb;
pub use serve::Asked;
pub use store::Kind;
pub use tls::Identity;

use crate::netns::Netns;
use anyhow::{Context as _, bail};
use auth::Users;
use fault::Faults;
use kubeconfig::Proof;
use request::Attributes;
use serde_json::Value;
use serve::{Shared, State};
use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use store::Store;
use tls::{Authority, Validity};

/// How long the socket may take to open or close.
const LIMIT: Duration = Duration::from_secs(20);
/// Namespace and name of the service account that flannel's manifests make.
const NAMESPACE: &str = "kube-flannel";
const ACCOUNT: &str = "flannel";
/// Who writes what a test writes.
const TESTER: &str = "kube-controller-manager";

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    address: SocketAddr,
    /// Signs the server's certificate; another one after [`ApiServer::change_authority`].
    authority: Mutex<Authority>,
    /// Signs the certificates of clients.
    clients: Authority,
    tokens: Mutex<BTreeMap<String, String>>,
}

/// The rules of upstream's ClusterRole `flannel`.
pub fn upstream_rules() -> Vec<Rule> {
    vec![
        Rule::core("pods", &["get"]),
        Rule::core("nodes", &["get", "list", "watch"]),
        Rule::core("nodes/status", &["patch"]),
    ]
}

/// The name of the user that the service account `kube-flannel/flannel` is.
pub fn service_account() -> String {
    format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}")
}

impl ApiServer {
    /// Starts a server on a free port of `ip` in `ns` (the caller's namespace if `None`; give it a loopback address then), and
    /// returns when it listens. The service account `kube-flannel/flannel` may do what upstream's manifest says.
    pub fn start(ns: Option<&Netns>, ip: Ipv4Addr) -> anyhow::Result<ApiServer> {
        ApiServer::start_on(ns, ip, 0)
    }

    /// Like [`ApiServer::start`] on a port of the caller's choice.
    pub fn start_on(ns: Option<&Netns>, ip: Ipv4Addr, port: u16) -> anyhow::Result<ApiServer> {
        let port = match (port, ns) {
            (0, Some(ns)) => ns.try_run(|| free_port(ip))??,
            (0, None) => free_port(ip)?,
            (port, _) => port,
        };
        let address = SocketAddr::from((ip, port));
        let authority = Authority::new("kubernetes")?;
        let clients = Authority::new("kubernetes-clients")?;
        let tls = authority.server(ip, &clients, Validity::Current)?;
        let shared = Arc::new(Shared::new(State {
            store: Store::new(),
            users: Users::default(),
            faults: Faults::default(),
            namespaces: ["default", "kube-system", "kube-public", NAMESPACE]
                .map(str::to_owned)
                .to_vec(),
            tls,
            asked: Vec::new(),
            bound: false,
            bind_error: None,
            connections: BTreeMap::new(),
            stopping: false,
        }));
        let serving = Arc::clone(&shared);
        let ns = ns.cloned();
        let thread = std::thread::Builder::new()
            .name("kube-apiserver".into())
            .spawn(move || {
                if let Some(Err(error)) = ns.map(|ns| ns.enter()) {
                    serving.change(|state| state.bind_error = Some(format!("{error:#}")));
                    serving.socket.notify_all();
                    return;
                }
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("a runtime");
                // Ending the runtime ends all connections.
                runtime.block_on(serve::run(serving, address));
            })?;
        let server = ApiServer {
            shared,
            thread: Some(thread),
            address,
            authority: Mutex::new(authority),
            clients,
            tokens: Mutex::new(BTreeMap::new()),
        };
        server.wait_bound(true)?;
        server.add_user(User::admin());
        server.add_user(User::service_account(NAMESPACE, ACCOUNT, upstream_rules()));
        Ok(server)
    }

    /// `https://<ip>:<port>`.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The authority's certificate, as PEM.
    pub fn ca(&self) -> String {
        let authority = self.authority.lock();
        let authority = authority.unwrap_or_else(PoisonError::into_inner);
        authority.pem.clone()
    }

    /// Adds or replaces a user, and gives it a token if it has none.
    pub fn add_user(&self, user: User) {
        let name = user.name.clone();
        self.shared.change(|state| state.users.add(user));
        let known = self.lock_tokens().contains_key(&name);
        if !known {
            self.rotate_token(&name);
        }
    }

    /// Replaces what a user may do, from its next request on.
    pub fn set_rules(&self, user: &str, rules: Vec<Rule>) {
        self.shared
            .change(|state| state.users.set_rules(user, rules));
    }

    /// The token of the service account.
    pub fn token(&self) -> String {
        self.token_of(&service_account())
    }

    /// The token of a user.
    #[track_caller]
    pub fn token_of(&self, user: &str) -> String {
        let tokens = self.lock_tokens();
        let token = tokens.get(user);
        token.unwrap_or_else(|| panic!("no user {user}")).clone()
    }

    /// Gives a user another token: from now on the old one is refused with 401.
    pub fn rotate_token(&self, user: &str) -> String {
        let token = format!("lab.{}", write::uid());
        self.lock_tokens().insert(user.to_owned(), token.clone());
        self.shared.change(|state| {
            state.users.drop_tokens(user);
            state.users.add_token(user, token.clone());
        });
        token
    }

    /// A kubeconfig for the service account.
    pub fn kubeconfig(&self) -> String {
        self.kubeconfig_of(&service_account())
    }

    /// A kubeconfig for one who may do everything.
    pub fn admin_kubeconfig(&self) -> String {
        self.kubeconfig_of(&User::admin().name)
    }

    /// A kubeconfig with the token of a user.
    pub fn kubeconfig_of(&self, user: &str) -> String {
        let token = self.token_of(user);
        kubeconfig::text(&self.url(), &self.ca(), Proof::Token(&token))
    }

    /// A kubeconfig that proves nothing.
    pub fn anonymous_kubeconfig(&self) -> String {
        kubeconfig::text(&self.url(), &self.ca(), Proof::Nothing)
    }

    /// A kubeconfig with a client certificate of a user.
    pub fn kubeconfig_with_certificate(&self, user: &User) -> anyhow::Result<String> {
        let (identity, der) = self.clients.client(&user.name, &user.groups)?;
        self.add_user(user.clone());
        self.shared
            .change(|state| state.users.add_certificate(&user.name, der));
        let proof = Proof::Certificate(&identity);
        Ok(kubeconfig::text(&self.url(), &self.ca(), proof))
    }

    /// Writes `token`, `ca.crt` and `namespace` into a directory, as a pod of the service account has them.
    pub fn write_service_account(&self, dir: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(dir)?;
        let files = [
            ("token", self.token()),
            ("ca.crt", self.ca()),
            ("namespace", NAMESPACE.to_owned()),
        ];
        for (name, text) in files {
            let scratch = dir.join(format!(".{name}"));
            fs::write(&scratch, text)?;
            fs::rename(&scratch, dir.join(name)).with_context(|| format!("put {name} in place"))?;
        }
        Ok(())
    }

    /// Adds an object as a controller would; `metadata` may lack all but the name. Gives it as it is stored.
    pub fn create(&self, kind: Kind, object: Value) -> anyhow::Result<Value> {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        let namespace = if kind.namespaced() && namespace.is_empty() {
            "default"
        } else {
            namespace
        };
        let namespace = namespace.to_owned();
        self.shared
            .change(|state| write::create(&mut state.store, kind, &namespace, TESTER, object))
            .map(|object| object.value())
            .map_err(|refusal| anyhow::anyhow!(refusal.body))
    }

    /// Adds a node with this subnet; see [`node`] for what it looks like.
    pub fn create_node(&self, name: &str, pod_cidr: &str) -> anyhow::Result<Value> {
        self.create(Kind::Node, node(name, &[pod_cidr]))
    }

    /// Adds many nodes of the size that kubelets make them (see [`full_size_node`]), with numbers from `range`.
    pub fn create_full_size_nodes(&self, range: std::ops::Range<u32>) {
        self.shared.change(|state| {
            for number in range {
                nodes::insert(&mut state.store, number);
            }
        });
    }

    /// A node as it is stored, without `kind` and `apiVersion`.
    pub fn node(&self, name: &str) -> Option<Value> {
        let key = (String::new(), name.to_owned());
        let object = self.shared.lock().store.get(Kind::Node, &key).cloned();
        object.map(|object| object.value())
    }

    /// All objects of a kind.
    pub fn all(&self, kind: Kind) -> Vec<Value> {
        let objects: Vec<_> = self.shared.lock().store.all(kind).cloned().collect();
        objects.iter().map(|object| object.value()).collect()
    }

    /// Changes a node in any way, also in those that the API does not allow, such as to another subnet.
    pub fn edit_node(&self, name: &str, edit: impl FnOnce(&mut Value)) -> anyhow::Result<Value> {
        let key = (String::new(), name.to_owned());
        self.shared.change(|state| {
            let old = state.store.get(Kind::Node, &key);
            let mut node = old.with_context(|| format!("no node {name}"))?.value();
            edit(&mut node);
            Ok(state.store.put(Kind::Node, node).value())
        })
    }

    /// Merges annotations into a node; `None` removes one.
    pub fn annotate(&self, name: &str, annotations: &[(&str, Option<&str>)]) -> anyhow::Result<()> {
        let merged: serde_json::Map<String, Value> = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Value::from(*value)))
            .collect();
        let patch = serde_json::json!({"metadata": {"annotations": merged}});
        self.edit_node(name, |node| patch::merge(node, &patch))
            .map(drop)
    }

    /// The annotations of a node.
    #[track_caller]
    pub fn annotations(&self, name: &str) -> BTreeMap<String, String> {
        let node = self.node(name).unwrap_or_else(|| panic!("no node {name}"));
        let annotations = node["metadata"]["annotations"].as_object();
        let pairs = annotations.into_iter().flatten();
        pairs
            .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect()
    }

    /// Removes a node.
    pub fn delete_node(&self, name: &str) -> anyhow::Result<()> {
        self.delete(Kind::Node, "", name)
    }

    /// Removes an object.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) -> anyhow::Result<()> {
        let asked = Attributes {
            kind,
            verb: Verb::Delete,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            status: false,
        };
        let gone = self
            .shared
            .change(|state| write::delete(&mut state.store, &asked, &Value::Null));
        gone.map(drop)
            .map_err(|refusal| anyhow::anyhow!(refusal.body))
    }

    /// The number of the last change.
    pub fn revision(&self) -> u64 {
        self.shared.lock().store.revision
    }

    /// What was asked so far, in order of the answers.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.lock().asked.clone()
    }

    /// Forgets what was asked.
    pub fn forget_asked(&self) {
        self.shared.lock().asked.clear();
    }
}

impl ApiServer {
    fn wait_bound(&self, wanted: bool) -> anyhow::Result<()> {
        let waiting = |state: &mut State| state.bound != wanted && state.bind_error.is_none();
        let state = self.shared.lock();
        let (mut state, timeout) = self
            .shared
            .socket
            .wait_timeout_while(state, LIMIT, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = state.bind_error.take() {
            bail!("{error}");
        }
        if timeout.timed_out() {
            bail!("the socket of {} is not open ({wanted})", self.address);
        }
        Ok(())
    }

    /// Waits until no connection is open that was accepted before `epoch`.
    fn wait_cut(&self, epoch: u64) -> anyhow::Result<()> {
        let waiting = |state: &mut State| state.connections.range(..epoch).next().is_some();
        let state = self.shared.lock();
        let (_state, timeout) = self
            .shared
            .socket
            .wait_timeout_while(state, LIMIT, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("connections to {} do not close", self.address);
        }
        Ok(())
    }

    fn lock_tokens(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.change(|state| state.stopping = true);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has already been reported by it.
            drop(thread.join());
        }
    }
}

fn free_port(ip: Ipv4Addr) -> anyhow::Result<u16> {
    let listener = TcpListener::bind((ip, 0)).with_context(|| format!("a free port on {ip}"))?;
    Ok(listener.local_addr()?.port())
}
