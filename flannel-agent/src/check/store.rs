//! The lease store: which it is, and what it says.

use std::{fs, path::Path};

use flannel_core::check::{Certificate, StoreSeen, StoreTrouble, validity};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout_at},
};

use crate::{
    cli::{Args, KubeVariables},
    leases::{LeaseError, Store},
};

/// The arguments to look by, and where they come from: those given, else those of the running daemon, else what it left: the store's
/// name.
pub(super) fn arguments(
    given: &Args,
    left: Option<&str>,
    running: Option<u32>,
) -> (Args, &'static str) {
    if given.names_store() {
        return (given.clone(), "flags");
    }
    if let Some(args) = running.and_then(of_process) {
        return (
            Args {
                subnet_file: given.subnet_file.clone(),
                ..args
            },
            "the running agent's flags",
        );
    }
    let mut args = given.clone();
    if let Some(server) = left.and_then(|store| store.strip_prefix("kubernetes ")) {
        let node = server.split_once(" node ").map(|(_, node)| node.to_owned());
        args.kube.kube_subnet_mgr = true;
        args.kube.variables.node_name = args.kube.variables.node_name.or(node);
        return (args, "what the agent left");
    }
    if let Some(dir) = left.and_then(|store| store.strip_prefix("directory ")) {
        args.lease_dir = Some(dir.into());
        return (args, "what the agent left");
    }
    if let Some((endpoints, prefix)) = left
        .and_then(|store| store.strip_prefix("etcd "))
        .and_then(|store| store.split_once(" prefix "))
    {
        args.etcd.etcd_endpoints = endpoints.split(',').map(str::to_owned).collect();
        prefix.clone_into(&mut args.etcd.etcd_prefix);
        return (args, "what the agent left");
    }
    (args, "defaults")
}

/// The flags of a running daemon, its environment included.
fn of_process(pid: u32) -> Option<Args> {
    let words = |file: &str| -> Option<Vec<String>> {
        let bytes = fs::read(format!("/proc/{pid}/{file}")).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        Some(text.split_terminator('\0').map(str::to_owned).collect())
    };
    let line = words("cmdline")?;
    let (program, rest) = line.split_first()?;
    let environment = words("environ").unwrap_or_default();
    // Flags win over variables: the last one given counts.
    let variables = environment.iter().filter_map(|variable| {
        let (name, value) = variable.strip_prefix("FLANNELD_")?.split_once('=')?;
        let flag = name.to_lowercase().replace('_', "-");
        (!value.is_empty()).then(|| format!("--{flag}={value}"))
    });
    let all = std::iter::once(program.clone())
        .chain(variables)
        .chain(rest.iter().cloned());
    let mut args = Args::read(all.map(Into::into))
        .or_else(|_| Args::read(line.iter().map(Into::into)))
        .ok()?;
    args.kube.variables = KubeVariables::read(|name| {
        let mut pairs = environment
            .iter()
            .filter_map(|variable| variable.split_once('='));
        pairs
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value.to_owned())
    });
    Some(args)
}

/// Asks the store.
pub(super) async fn look(args: &Args, origin: &'static str, deadline: Instant) -> StoreSeen {
    let kubernetes = args.kube.kube_subnet_mgr;
    let is_etcd = args.lease_dir.is_none() && !kubernetes;
    let certificates = args.etcd.etcd_certfile.iter().chain(&args.etcd.etcd_cafile);
    let certificates = certificates
        .filter(|_| is_etcd)
        .map(|path| certificate(path))
        .collect();
    let mut seen = StoreSeen {
        name: String::new(),
        origin,
        net_conf: Err(StoreTrouble::Store("not asked".into())),
        leases: Err("not asked".into()),
        older_api: None,
        certificates,
        kubernetes: kubernetes.then_some(None),
    };
    let store = match Store::open(&args.store()).await {
        Ok(store) => store,
        Err(error) => {
            seen.name = if kubernetes {
                "kubernetes"
            } else if args.lease_dir.is_some() {
                "directory"
            } else {
                "etcd"
            }
            .into();
            seen.net_conf = Err(StoreTrouble::Store(error.chain()));
            seen.leases = Err(error.chain());
            return seen;
        }
    };
    seen.name = store.describe();
    let late = || format!("{}: no answer in time (--timeout)", store.describe());
    seen.net_conf = match timeout_at(deadline, store.net_conf()).await {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(
            error @ (LeaseError::NoNetConf { .. }
            | LeaseError::NoNetConfFile { .. }
            | LeaseError::KubeNetConf { .. }
            | LeaseError::NetConfText { .. }),
        )) => Err(StoreTrouble::Missing(error.chain())),
        Ok(Err(error)) => Err(StoreTrouble::Store(error.chain())),
        Err(_elapsed) => Err(StoreTrouble::Store(late())),
    };
    if !matches!(seen.net_conf, Err(StoreTrouble::Store(_))) {
        let listing = async {
            match &store {
                Store::Kube(store) => store
                    .look()
                    .await
                    .map(|(snapshot, own)| (snapshot, Some(own))),
                store => store.list().await.map(|snapshot| (snapshot, None)),
            }
        };
        seen.leases = match timeout_at(deadline, listing).await {
            Ok(Ok((snapshot, own))) => {
                seen.kubernetes = own;
                Ok(snapshot.leases)
            }
            Ok(Err(error)) => Err(error.chain()),
            Err(_elapsed) => Err(late()),
        };
    }
    if seen.net_conf.is_err() && is_etcd {
        for endpoint in &args.etcd.etcd_endpoints {
            let asked = timeout_at(deadline, older_api(endpoint, &args.etcd.etcd_prefix));
            if asked.await.ok().flatten().is_some() {
                seen.older_api = Some(endpoint.clone());
            }
        }
    }
    seen
}

fn certificate(path: &Path) -> Certificate {
    Certificate {
        file: path.display().to_string(),
        valid: fs::read_to_string(path).ok().and_then(|pem| validity(&pem)),
    }
}

/// Whether an endpoint has the configuration in its version 2 API. Only asked over plain HTTP.
async fn older_api(endpoint: &str, prefix: &str) -> Option<()> {
    let authority = endpoint.strip_prefix("http://")?.trim_end_matches('/');
    let mut stream = TcpStream::connect(authority).await.ok()?;
    let prefix = prefix.trim_matches('/');
    let request = format!(
        "GET /v2/keys/{prefix}/config HTTP/1.0\r\nHost: {authority}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    stream.take(65_536).read_to_end(&mut answer).await.ok()?;
    let answer = String::from_utf8_lossy(&answer);
    let is_found = answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200");
    (is_found && answer.contains("\"node\"")).then_some(())
}
