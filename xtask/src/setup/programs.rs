//! What is installed: a program of the system, and the packages that bring it.

use super::Needs;

/// A program of the system and the packages that bring it.
pub(super) struct Tool {
    /// Something that is there when the package is: a program, or absolute paths with colons between them, one of which is there.
    pub(super) probe: &'static str,
    pub(super) debian: &'static str,
    pub(super) fedora: &'static str,
    pub(super) arch: &'static str,
    pub(super) needs: Needs,
}

/// Where distributions put the plugins, and where Kubernetes' own packages do.
const CNI_PLUGINS: &str = "/usr/lib/cni/portmap:/usr/libexec/cni/portmap:/opt/cni/bin/portmap";

/// What the schemas of etcd import; Debian only recommends them to `protoc`.
const PROTOBUF_TYPES: &str = "/usr/include/google/protobuf/descriptor.proto:/usr/local/include/google/protobuf/descriptor.proto";

const EBPF: &[[&str; 4]] = &[["cc", "build-essential", "gcc", "base-devel"]];

const BUILD: &[[&str; 4]] = &[
    ["pkg-config", "pkg-config", "pkgconf", "pkgconf"],
    [
        "protoc",
        "protobuf-compiler",
        "protobuf-compiler",
        "protobuf",
    ],
    [
        PROTOBUF_TYPES,
        "libprotobuf-dev",
        "protobuf-devel",
        "protobuf",
    ],
    [
        "/etc/ssl/certs",
        "ca-certificates",
        "ca-certificates",
        "ca-certificates",
    ],
];

const EVERYTHING: &[[&str; 4]] = &[
    [
        CNI_PLUGINS,
        "containernetworking-plugins",
        "containernetworking-plugins",
        "cni-plugins",
    ],
    ["ip", "iproute2", "iproute", "iproute2"],
    ["nft", "nftables", "nftables", "nftables"],
    ["iptables-nft", "iptables", "iptables-nft", "iptables"],
    ["iptables-legacy", "iptables", "iptables-legacy", "iptables"],
    [
        "conntrack",
        "conntrack",
        "conntrack-tools",
        "conntrack-tools",
    ],
    ["systemd-analyze", "systemd", "systemd", "systemd"],
    ["dash", "dash", "dash", "dash"],
    ["bash", "bash", "bash", "bash"],
    ["tc", "iproute2", "iproute-tc", "iproute2"],
    ["etcd", "etcd-server", "etcd", "etcd"],
    ["etcdctl", "etcd-client", "etcd", "etcd"],
    ["iperf3", "iperf3", "iperf3", "iperf3"],
    ["tcpdump", "tcpdump", "tcpdump", "tcpdump"],
    ["tshark", "tshark", "wireshark-cli", "wireshark-cli"],
    ["ethtool", "ethtool", "ethtool", "ethtool"],
    ["ping", "iputils-ping", "iputils", "iputils"],
    ["bpftool", "bpftool", "bpftool", "bpf"],
    ["openssl", "openssl", "openssl", "openssl"],
    [
        "kubectl",
        "kubernetes-client",
        "kubernetes-client",
        "kubectl",
    ],
    ["skopeo", "skopeo", "skopeo", "skopeo"],
    ["ps", "procps", "procps-ng", "procps-ng"],
    ["strace", "strace", "strace", "strace"],
];

const KERNELS: &[[&str; 4]] = &[
    [
        "qemu-system-x86_64",
        "qemu-system-x86",
        "qemu-system-x86-core",
        "qemu-system-x86",
    ],
    [
        "qemu-system-aarch64",
        "qemu-system-arm",
        "qemu-system-aarch64-core",
        "qemu-system-aarch64",
    ],
    ["depmod", "kmod", "kmod", "kmod"],
    ["xz", "xz-utils", "xz", "xz"],
];

/// All of them: probe, and the packages of Debian, Fedora and Arch.
pub(super) fn all() -> impl Iterator<Item = Tool> {
    let of = |needs, rows: &'static [[&'static str; 4]]| {
        rows.iter().map(move |&[probe, debian, fedora, arch]| Tool {
            probe,
            debian,
            fedora,
            arch,
            needs,
        })
    };
    of(Needs::Ebpf, EBPF)
        .chain(of(Needs::Build, BUILD))
        .chain(of(Needs::Everything, EVERYTHING))
        .chain(of(Needs::Kernels, KERNELS))
}
