//! The result, as a table and as JSON.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets::NOTHING};
use flannel_testkit::Family;
use serde::{Serialize, Serializer};

use bench_lab::cluster::Backend;

/// Which way the packets of a pair took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Path {
    /// Both pods are on one node.
    Local,
    /// The kernel's vxlan device carried at least some of them.
    Kernel,
    /// eBPF carried every one, at both ends, in both directions.
    Bpf,
    /// eBPF carried every one, and those of the TCP transfer from pod to pod, past the host's stack.
    BpfFast,
    /// The kernel routed at least some of them to a node on the same link, as they are.
    Direct,
    /// eBPF carried those of the TCP transfer so, past the host's stack.
    DirectFast,
    /// The kernel's device encrypted them.
    Wireguard,
}

impl Path {
    const ALL: [Self; 7] = [
        Self::Local,
        Self::Kernel,
        Self::Bpf,
        Self::BpfFast,
        Self::Direct,
        Self::DirectFast,
        Self::Wireguard,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Kernel => "kernel",
            Self::Bpf => "bpf",
            Self::BpfFast => "bpf-fast",
            Self::Direct => "direct",
            Self::DirectFast => "direct-fast",
            Self::Wireguard => "wireguard",
        }
    }
}

/// One ordered pair of pods.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Pair {
    pub(crate) from: String,
    pub(crate) to: String,
    #[serde(serialize_with = "number")]
    pub(crate) family: Family,
    pub(crate) ping: bool,
    pub(crate) ping_ms: Option<f64>,
    pub(crate) udp: bool,
    pub(crate) tcp_mbps: Option<f64>,
    pub(crate) path: Path,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) errors: Vec<String>,
}

impl Pair {
    fn ok(&self) -> bool {
        self.ping && self.udp && self.tcp_mbps.is_some()
    }
}

/// A family as 4 or 6.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn number<S: Serializer>(family: &Family, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u8(match family {
        Family::V4 => 4,
        Family::V6 => 6,
    })
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    /// `4`, `6` or `dual`.
    family: &'static str,
    backend: Backend,
    direct_routing: bool,
    nodes: usize,
    pods: usize,
    pairs: Vec<Pair>,
}

impl Report {
    pub(crate) fn new(
        (family, backend, direct_routing): (&'static str, Backend, bool),
        nodes: usize,
        pods: usize,
        pairs: Vec<Pair>,
    ) -> Self {
        Self {
            ok: pairs.iter().all(Pair::ok),
            family,
            backend,
            direct_routing,
            nodes,
            pods,
            pairs,
        }
    }

    /// One line.
    pub(crate) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        *table.style_mut() = NOTHING;
        table.set_header(["FROM", "TO", "PING", "UDP", "TCP", "PATH", ""]);
        for pair in &self.pairs {
            let ping = match (pair.ping, pair.ping_ms) {
                (true, Some(ms)) => format!("{ms:.2} ms"),
                _ => "FAILED".into(),
            };
            table.add_row([
                pair.from.clone(),
                pair.to.clone(),
                ping,
                if pair.udp { "ok" } else { "FAILED" }.into(),
                pair.tcp_mbps.map_or_else(|| "FAILED".into(), throughput),
                pair.path.as_str().into(),
                pair.errors.join("; "),
            ]);
        }
        for column in table.column_iter_mut().skip(2).take(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let lines: Vec<String> = table
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect();
        format!("\n{}\n", lines.join("\n"))
    }

    pub(crate) fn summary(&self, took: Duration) -> String {
        let failed = self.pairs.iter().filter(|pair| !pair.ok()).count();
        let paths: Vec<String> = Path::ALL
            .into_iter()
            .map(|path| {
                (
                    path,
                    self.pairs.iter().filter(|pair| pair.path == path).count(),
                )
            })
            .filter(|(_, count)| *count > 0)
            .map(|(path, count)| format!("{count} {}", path.as_str()))
            .collect();
        let verdict = if failed == 0 {
            "every pair works".into()
        } else {
            format!("{failed} pairs FAILED")
        };
        format!(
            "{} pairs, {verdict}; by path: {}; {:.1} s",
            self.pairs.len(),
            paths.join(", "),
            took.as_secs_f64()
        )
    }
}

fn throughput(mbps: f64) -> String {
    if mbps >= 1000.0 {
        format!("{:.1} Gbit/s", mbps / 1000.0)
    } else {
        format!("{mbps:.0} Mbit/s")
    }
}
