//! A container runtime's use of CNI: chains of plugins, run as containerd runs them with libcni, on a node of the lab.
//!
//! The plugins are real: the flannel plugin under test, and those of the distribution. What they and libcni keep lies in
//! the node's run directory; nothing is written to the machine's own `/var/lib/cni`.

mod runtime;

pub use runtime::plugin_error;

use crate::netns::Netns;
use crate::node::{Node, Pod};
use crate::process::{self, Finished};
use anyhow::Context as _;
use serde_json::{Value, json};
use std::fmt;
use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Where distributions and Kubernetes put the standard plugins.
pub const PLUGIN_DIRS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];
/// How long a plugin may take.
const LIMIT: Duration = Duration::from_secs(30);

/// How long building the plugin may take.
const BUILD_LIMIT: Duration = Duration::from_mins(10);

/// What a plugin said when it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginError {
    /// The plugin's type.
    pub plugin: String,
    pub code: u64,
    pub msg: String,
    pub details: String,
    pub stderr: String,
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}) {}",
            self.plugin, self.msg, self.code, self.details
        )
    }
}

impl std::error::Error for PluginError {}

/// A network namespace to be connected, with what a runtime knows of it.
#[derive(Clone, Debug)]
pub struct Container {
    pub id: String,
    pub ns: Netns,
    pub ifname: String,
    /// Arguments by capability, such as `portMappings`.
    pub capabilities: Value,
}

/// The CNI side of a node's container runtime.
#[derive(Debug)]
pub struct Runtime {
    node: Netns,
    dir: PathBuf,
    /// `CNI_PATH`.
    pub path: Vec<PathBuf>,
    /// The network configuration list.
    pub list: Value,
    containers: AtomicU32,
}

impl Runtime {
    /// kube-flannel's network on a node: the plugin `flannel`, portmap and bandwidth, with all directories in the node's own.
    pub fn new(node: &Node, flannel: &Path) -> anyhow::Result<Runtime> {
        let dir = node.run_dir.join("cni");
        let bin = dir.join("bin");
        fs::create_dir_all(&bin).with_context(|| format!("make {}", bin.display()))?;
        fs::create_dir_all(dir.join("cache/results"))?;
        put_plugin(&bin, flannel)?;
        let mut path = vec![bin];
        path.extend(PLUGIN_DIRS.iter().map(PathBuf::from).filter(|d| d.is_dir()));
        Ok(Runtime {
            node: node.ns.clone(),
            list: kube_flannel(&dir, &node.run_dir.join("subnet.env")),
            dir,
            path,
            containers: AtomicU32::new(0),
        })
    }

    /// Puts another flannel plugin in place, as an upgrade does.
    pub fn replace_plugin(&self, flannel: &Path) -> anyhow::Result<()> {
        put_plugin(&self.dir.join("bin"), flannel)
    }

    /// A new namespace, named after the node, that is connected to nothing.
    pub fn container(&self) -> anyhow::Result<Container> {
        let number = self.containers.fetch_add(1, Ordering::Relaxed) + 1;
        let ns = Netns::add(&format!("{}c{number}", self.node.name()))?;
        ns.ip("link set lo up")?;
        if self.node.is_prepared() {
            ns.prepare_ipv6(false)?;
        }
        Ok(Container {
            id: format!("{:064x}", u64::from(number) * 0x9e37_79b9 + 1),
            ns,
            ifname: "eth0".to_owned(),
            capabilities: json!({}),
        })
    }

    /// Connects a container and gives it as one of the lab's pods.
    pub fn add_pod(&self, name: &str) -> anyhow::Result<(Container, Pod)> {
        let container = self.container()?;
        let result = self.add(&container)?;
        let pod = self.pod(name, &container, &result)?;
        Ok((container, pod))
    }

    /// The lab's view of a container that was added.
    pub fn pod(&self, name: &str, container: &Container, result: &Value) -> anyhow::Result<Pod> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let interfaces = result["interfaces"].as_array().context("no interfaces")?;
        let named = |wanted: &dyn Fn(&Value) -> bool| {
            interfaces
                .iter()
                .find(|interface| wanted(interface))
                .with_context(|| format!("an interface is missing in {result}"))
        };
        let inside = named(&|interface| interface["name"] == json!(container.ifname))?;
        let host = named(&|interface| text(&interface["name"]).starts_with("veth"))?;
        let addresses = result["ips"]
            .as_array()
            .context("no addresses")?
            .iter()
            .map(|ip| {
                let address = text(&ip["address"]);
                let (address, _) = address.split_once('/').context("no prefix length")?;
                anyhow::Ok((address.parse()?, text(&ip["gateway"]).parse()?))
            });
        let addresses: Vec<_> = addresses.collect::<anyhow::Result<_>>()?;
        let mac: Vec<u8> = text(&inside["mac"])
            .split(':')
            .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
            .collect();
        let mac: [u8; 6] = mac.try_into().ok().context("no MAC address")?;
        Ok(Pod::connected(
            name,
            container.ns.clone(),
            &addresses,
            mac,
            text(&host["name"]),
            &self.node,
        ))
    }

    /// Everything that the plugins and libcni keep.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// See [`cache_dir`].
    pub fn cache_dir(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// What the flannel plugin has saved of a container.
    pub fn saved(&self, id: &str) -> PathBuf {
        self.dir.join("flannel").join(id)
    }

    /// The addresses that host-local has given, with the container of each.
    pub fn reservations(&self) -> Vec<(String, String)> {
        let name = self.list["name"].as_str().unwrap_or_default();
        let entries = fs::read_dir(self.dir.join("networks").join(name));
        let mut all: Vec<(String, String)> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.parse::<std::net::IpAddr>().ok()?;
                let text = fs::read_to_string(entry.path()).ok()?;
                Some((name, text.lines().next()?.to_owned()))
            })
            .collect();
        all.sort();
        all
    }

    /// Runs one plugin, as a runtime does, with a configuration of the caller's.
    pub fn exec(
        &self,
        kind: &str,
        command: &str,
        container: Option<&Container>,
        conf: &Value,
    ) -> anyhow::Result<Result<String, PluginError>> {
        let done = self.exec_raw(kind, command, container, conf.to_string().as_bytes())?;
        if done.status.success() {
            return Ok(Ok(done.stdout));
        }
        let error: Value = serde_json::from_str(&done.stdout)
            .with_context(|| format!("{kind} {command} failed without an error: {done:?}"))?;
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        Ok(Err(PluginError {
            plugin: kind.to_owned(),
            code: error["code"].as_u64().unwrap_or(0),
            msg: text("msg"),
            details: text("details"),
            stderr: done.stderr,
        }))
    }

    /// Like [`Runtime::exec`], with any input, and all that the plugin prints.
    pub fn exec_raw(
        &self,
        kind: &str,
        command: &str,
        container: Option<&Container>,
        input: &[u8],
    ) -> anyhow::Result<Finished> {
        let mut files = self.path.iter().map(|dir| dir.join(kind));
        let program = files.find(|file| file.is_file());
        let program = program.with_context(|| format!("no plugin {kind} in {:?}", self.path))?;
        let mut run = self.node.command(program);
        run.env("CNI_COMMAND", command)
            .env("CNI_PATH", std::env::join_paths(&self.path)?);
        if let Some(container) = container {
            run.env("CNI_CONTAINERID", &container.id)
                .env("CNI_NETNS", container.ns.path())
                .env("CNI_IFNAME", &container.ifname)
                .env("CNI_ARGS", arguments(container));
        }
        let mut file = tempfile::tempfile()?;
        file.write_all(input)?;
        std::io::Seek::rewind(&mut file)?;
        process::finish_reading(&mut run, file, LIMIT)
    }
}

/// What containerd says of a pod in `CNI_ARGS`.
fn arguments(container: &Container) -> String {
    let pairs = runtime::arguments(container).map(|pair| pair.join("="));
    pairs.join(";")
}

fn put_plugin(bin: &Path, flannel: &Path) -> anyhow::Result<()> {
    let put = || -> std::io::Result<()> {
        let scratch = bin.join(".flannel");
        std::os::unix::fs::symlink(flannel, &scratch)?;
        fs::rename(scratch, bin.join("flannel"))
    };
    put().with_context(|| format!("put {} in place", flannel.display()))
}

/// The flannel plugin of this workspace: the program that the environment variable `FLANNEL_CNI` names, or else built now.
pub fn flannel_plugin() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("FLANNEL_CNI") {
        return Ok(path.into());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = std::process::Command::new(cargo);
    build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--quiet", "-p", "flannel-cni", "--bin", "flannel"])
        .args(["--message-format", "json"]);
    let messages = process::succeed(&mut build, BUILD_LIMIT).context("build the plugin")?;
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    };
    let mut built = messages.lines().filter_map(executable);
    built.next().context("cargo built no plugin")
}

/// Where a runtime on this node keeps results: the directory for the agent's `--cni-cache-dir`.
pub fn cache_dir(node: &Node) -> PathBuf {
    node.run_dir.join("cni/cache")
}

/// Upstream's own flannel plugin, version 0.9.0 of Debian 11, which `cargo xtask setup` fetches. It knows versions up to 0.4.0.
pub fn upstream_plugin() -> anyhow::Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/cni-0.9/usr/lib/cni/flannel")
        .canonicalize();
    path.context("upstream's plugin is fetched by `cargo xtask setup`")
}

/// The address that a result names first.
pub fn address(result: &Value) -> anyhow::Result<Ipv4Addr> {
    let text = result["ips"][0]["address"].as_str().unwrap_or_default();
    let address = text.split('/').next().unwrap_or_default();
    address
        .parse()
        .with_context(|| format!("no IPv4 address in {result}"))
}

/// The list of kube-flannel's ConfigMap, with bandwidth, and with directories below `dir` instead of the machine's own.
fn kube_flannel(dir: &Path, subnet_file: &Path) -> Value {
    json!({
        "name": "cbr0",
        "cniVersion": "1.0.0",
        "plugins": [
            {
                "type": "flannel",
                "subnetFile": subnet_file,
                "dataDir": dir.join("flannel"),
                "ipam": { "dataDir": dir.join("networks") },
                "delegate": { "hairpinMode": true, "isDefaultGateway": true },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
            { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        ],
    })
}
