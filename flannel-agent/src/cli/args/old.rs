//! Flags that flannel no longer has or never had, and that units and manifests pass all the same.

/// What becomes of such a flag. The text completes a sentence that begins with the flag.
#[derive(Clone, Copy, Debug)]
pub(super) enum Flag {
    /// It is called otherwise.
    Renamed(&'static str, &'static str),
    /// It has no effect.
    Ignored {
        /// Whether it takes a boolean, and so no separate value.
        boolean: bool,
        /// Why.
        why: &'static str,
    },
    /// Whoever passes it expects what does not exist.
    Refused(&'static str),
}

/// To switch this one off asks for what is the case.
pub(super) const SILENT_WHEN_OFF: &str = "use-multi-cluster-cidr";

const MULTI_NETWORK: &str = "belongs to the multi-network mode, which flannel dropped in 0.8.0: run one agent for each network, with its own \
     --etcd-prefix and --subnet-file";
const CLIENT_SERVER: &str = "belongs to the client/server mode, which flannel dropped in 0.8.0: point the agent on each node at etcd with \
     --etcd-endpoints";

/// The flag of this name, if it is such a one.
pub(super) fn find(name: &str) -> Option<Flag> {
    Some(match name {
        "interface" => Flag::Renamed(
            "iface",
            "has never been a flag of flannel's: read as --iface",
        ),
        "etcd-endpoint" => Flag::Renamed(
            "etcd-endpoints",
            "is called --etcd-endpoints since flannel 0.2.0: read as that",
        ),
        "logtostderr" | "alsologtostderr" => Flag::Ignored {
            boolean: true,
            why: "is no flag since flannel 0.8.0 and has no effect: log lines always go to standard error",
        },
        "stderrthreshold" | "log_dir" => Flag::Ignored {
            boolean: false,
            why: "is no flag since flannel 0.8.0 and has no effect: log lines always go to standard error",
        },
        "subnet-dir" => Flag::Ignored {
            boolean: false,
            why: "is no flag since flannel 0.8.0 and has no effect: --subnet-file says where the node's subnet is written",
        },
        SILENT_WHEN_OFF => Flag::Ignored {
            boolean: true,
            why: "is no flag since flannel 0.23.0 and has no effect: there is one cluster network, the one of the network configuration",
        },
        "networks" | "watch-networks" => Flag::Refused(MULTI_NETWORK),
        "listen" | "remote" | "remote-keyfile" | "remote-certfile" | "remote-cafile" => {
            Flag::Refused(CLIENT_SERVER)
        }
        _ => return None,
    })
}
