//! Flags about leases in the Kubernetes API.

use std::path::{Path, PathBuf};

use clap::Args as Group;

use super::boolean;
use crate::leases::{DEFAULT_PATIENCE, KubeOptions};

/// Flags about leases in the Kubernetes API.
#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubeArgs {
    /// Take this node's subnet and the other nodes from the Kubernetes API instead of etcd. NODE_NAME, or POD_NAME and POD_NAMESPACE,
    /// say which node this is.
    #[arg(
        long,
        env = "FLANNELD_KUBE_SUBNET_MGR",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub kube_subnet_mgr: bool,

    /// URL of the Kubernetes API, in place of the one in the kubeconfig. Only read with --kube-subnet-mgr.
    #[arg(long, env = "FLANNELD_KUBE_API_URL", value_name = "URL")]
    pub kube_api_url: Option<String>,

    /// Prefix of annotations of nodes. Only read with --kube-subnet-mgr.
    #[arg(
        long,
        env = "FLANNELD_KUBE_ANNOTATION_PREFIX",
        default_value = "flannel.alpha.coreos.com",
        value_name = "PREFIX"
    )]
    pub kube_annotation_prefix: String,

    /// File with the way to the Kubernetes API. Default: the pod's service account. Only read with --kube-subnet-mgr.
    #[arg(long, env = "FLANNELD_KUBECONFIG_FILE", value_name = "FILE")]
    pub kubeconfig_file: Option<PathBuf>,

    /// Keep the node's condition NetworkUnavailable as the network is. Only read with --kube-subnet-mgr.
    #[arg(
        long,
        env = "FLANNELD_SET_NODE_NETWORK_UNAVAILABLE",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = true,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub set_node_network_unavailable: bool,

    /// What is read from variables that are no flags.
    #[arg(skip)]
    pub variables: KubeVariables,
}

/// Variables that upstream reads in Kubernetes mode, beside the flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeVariables {
    /// `NODE_NAME`.
    pub node_name: Option<String>,
    /// `POD_NAME`.
    pub pod_name: Option<String>,
    /// `POD_NAMESPACE`.
    pub pod_namespace: Option<String>,
    /// `EVENT_QUEUE_DEPTH`.
    pub event_queue_depth: Option<String>,
}

impl KubeVariables {
    /// Reads them by a function that looks a variable up. An empty one is none.
    pub fn read(look_up: impl Fn(&str) -> Option<String>) -> Self {
        let look_up = |name| look_up(name).filter(|value| !value.is_empty());
        Self {
            node_name: look_up("NODE_NAME"),
            pod_name: look_up("POD_NAME"),
            pod_namespace: look_up("POD_NAMESPACE"),
            event_queue_depth: look_up("EVENT_QUEUE_DEPTH"),
        }
    }
}

impl KubeArgs {
    /// What the lease store needs to know.
    pub fn options(&self, net_config_path: &Path, subnet_file: &Path) -> KubeOptions {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        KubeOptions {
            api_url: given(&self.kube_api_url),
            kubeconfig: self
                .kubeconfig_file
                .clone()
                .filter(|path| !path.as_os_str().is_empty()),
            annotation_prefix: self.kube_annotation_prefix.clone(),
            net_config_path: net_config_path.to_owned(),
            memory: Some(last_known_state(subnet_file)),
            set_network_unavailable: self.set_node_network_unavailable,
            node_name: self.variables.node_name.clone(),
            pod_name: self.variables.pod_name.clone(),
            pod_namespace: self.variables.pod_namespace.clone(),
            event_queue_depth: self.variables.event_queue_depth.clone(),
            patience: DEFAULT_PATIENCE,
        }
    }
}

/// Where the last known state of the cluster is, beside `subnet.env`.
pub(crate) fn last_known_state(subnet_file: &Path) -> PathBuf {
    let mut name = subnet_file.file_name().unwrap_or_default().to_owned();
    name.push(".kube.json");
    subnet_file.with_file_name(name)
}
