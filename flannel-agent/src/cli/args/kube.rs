//! Flags about leases in the Kubernetes API.

use std::path::PathBuf;

use clap::Args as Group;

use super::boolean;

/// Flags about leases in the Kubernetes API: read, so that manifests and units that carry them are, but there is no such store.
#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubeArgs {
    /// Keep leases in the Kubernetes API. Not in this build: the agent ends with a hint.
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

    /// URL of the Kubernetes API. Only read with --kube-subnet-mgr.
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

    /// File with the way to the Kubernetes API. Only read with --kube-subnet-mgr.
    #[arg(long, env = "FLANNELD_KUBECONFIG_FILE", value_name = "FILE")]
    pub kubeconfig_file: Option<PathBuf>,

    /// Tell the Kubernetes API when the node's network is ready. Only read with --kube-subnet-mgr.
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
}
