//! What this kernel, and this process on it, can do: one finding per capability that a choice depends on.
//!
//! A feature is present when it was tried and a packet came out of it as it should. That the kernel took a program, or that its version
//! has the feature, proves nothing: 5.10 loads programs that ask for `ENCAP_L2_ETH` and then refuses every packet. [`climb`] says which
//! rung follows from the findings, and why none above it. Nothing here tries anything; the agent does.

mod cache;
mod ladder;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

pub use cache::{Cached, Key};
pub use ladder::{Attach, Course, Ladder, Rung, Wishes, climb};

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $label:literal, $title:literal, $without:literal;)*) => {
        /// A capability of kernel and process.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Feature { $($(#[$doc])* #[serde(rename = $label)] $name,)* }

        impl Feature {
            /// Every feature, in the order in which they are shown.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Its name in JSON, in the cache and in sentences.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label),* }
            }

            /// What it is.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),* }
            }

            /// What a node does without it.
            pub const fn without(self) -> &'static str {
                match self { $(Self::$name => $without),* }
            }
        }
    };
}

features! {
    /// `bpf(2)`.
    Bpf = "bpf", "the system call bpf(2) is permitted", "no eBPF";
    /// The just-in-time compiler.
    Jit = "jit", "programs run as machine code", "eBPF is interpreted, and slow";
    /// RLIMIT_MEMLOCK, against which kernels before 5.11 count maps.
    Memlock = "memlock", "maps of any size", "no eBPF";
    /// The file system of pins.
    Bpffs = "bpffs", "/sys/fs/bpf can be written", "no eBPF";
    /// Type information of the kernel.
    Btf = "btf", "type information of the kernel", "bpftool shows less; the agent needs none";
    /// `BPF_PROG_TYPE_SCHED_CLS`.
    SchedCls = "sched_cls", "programs for tc", "no eBPF";
    /// `BPF_PROG_TYPE_XDP`.
    Xdp = "xdp", "programs for XDP", "no native XDP";
    /// XDP on frames of several buffers (5.18).
    XdpFrags = "xdp_frags", "XDP on frames of several buffers", "no native XDP with jumbo frames";
    /// `BPF_MAP_TYPE_ARRAY`.
    Array = "array", "map type array", "no eBPF";
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray = "percpu_array", "map type percpu_array", "no eBPF";
    /// `BPF_MAP_TYPE_HASH`.
    Hash = "hash", "map type hash", "no eBPF";
    /// `BPF_MAP_TYPE_LRU_HASH`.
    LruHash = "lru_hash", "map type lru_hash", "no eBPF";
    /// `bpf_skb_load_bytes`.
    LoadBytes = "skb_load_bytes", "helper: read from a packet", "no eBPF";
    /// `bpf_skb_store_bytes`.
    StoreBytes = "skb_store_bytes", "helper: write into a packet", "no eBPF";
    /// `bpf_skb_pull_data`.
    PullData = "skb_pull_data", "helper: make headers linear", "no eBPF";
    /// `bpf_get_hash_recalc`.
    HashRecalc = "get_hash_recalc", "helper: a packet's flow hash", "no eBPF";
    /// `bpf_get_prandom_u32`.
    Random = "get_prandom_u32", "helper: random numbers", "no eBPF";
    /// `bpf_get_smp_processor_id`.
    Processor = "get_smp_processor_id", "helper: which CPU it is", "no fast path";
    /// `bpf_ktime_get_ns`.
    Clock = "ktime_get_ns", "helper: the clock", "no eBPF";
    /// `bpf_ktime_get_coarse_ns` (5.11).
    CoarseClock = "ktime_get_coarse_ns", "helper: the cheap clock", "the exact clock is read, some nanoseconds slower";
    /// `bpf_check_mtu` (5.12).
    CheckMtu = "check_mtu", "helper: whether an interface exists", "no connection is admitted by its SYN";
    /// `bpf_csum_level` (5.8).
    CsumLevel = "csum_level", "helper: how deep checksums are verified", "no eBPF";
    /// `bpf_skb_change_type`.
    ChangeType = "skb_change_type", "helper: for whom a packet is", "no fast path";
    /// `bpf_skb_adjust_room` with the flags of encapsulation, all but `ENCAP_L2_ETH`.
    RoomEncap = "adjust_room_encap", "helper: room for outer headers", "no eBPF";
    /// `BPF_F_ADJ_ROOM_ENCAP_L2_ETH`.
    EncapL2Eth = "adjust_room_encap_l2_eth", "flag ENCAP_L2_ETH", "encapsulation without it, which is correct too";
    /// `bpf_skb_adjust_room` with the flags of decapsulation, all but `DECAP_L4_UDP`.
    RoomDecap = "adjust_room_decap", "helper: outer headers off", "no eBPF";
    /// `BPF_F_ADJ_ROOM_DECAP_L4_UDP`.
    DecapL4Udp = "adjust_room_decap_l4_udp", "flag DECAP_L4_UDP", "super-packets are decapsulated by the kernel's device";
    /// `bpf_redirect`.
    Redirect = "redirect", "helper: send on an interface, and receive on one", "no eBPF";
    /// `bpf_redirect_peer` (5.10).
    RedirectPeer = "redirect_peer", "helper: into a pod", "no fast path";
    /// `bpf_redirect_neigh` (5.10).
    RedirectNeigh = "redirect_neigh", "helper: send, and have the next hop resolved", "no eBPF";
    /// `bpf_xdp_adjust_head`.
    AdjustHead = "xdp_adjust_head", "helper: outer headers off in XDP", "no native XDP";
    /// `bpf_xdp_adjust_meta`.
    AdjustMeta = "xdp_adjust_meta", "helper: a mark on a frame", "no native XDP";
    /// tcx links (6.6).
    Tcx = "tcx", "programs attached as tcx links", "programs are filters of a clsact qdisc";
    /// `sch_ingress` with `cls_bpf`.
    Clsact = "clsact", "programs attached as filters of a clsact qdisc", "tcx alone, or no eBPF";
    /// Native XDP on the uplink.
    NativeXdp = "native_xdp", "XDP in the uplink's driver", "the outer headers go in tc";
    /// vxlan devices.
    Vxlan = "vxlan", "vxlan devices", "a veth pair, and eBPF carries everything";
    /// `udp_flow_src_port` with the range's end in it (after 6.18).
    LastPort = "last_port", "vxlan devices take the last source port too", "source ports from the range without its end";
    /// veth pairs.
    Veth = "veth", "veth pairs", "no node without a vxlan device";
}

/// The errors that may be gone at the next start: EPERM, EINTR, EAGAIN, ENOMEM, EBUSY, ENFILE, EMFILE.
const PASSING: [i32; 7] = [1, 4, 11, 12, 16, 23, 24];

impl Feature {
    /// Whether its absence can end while the machine runs: by a module, a permission, a setting, another interface. What is left
    /// is in the kernel's own code.
    pub const fn may_come(self) -> bool {
        matches!(
            self,
            Self::Bpf
                | Self::Jit
                | Self::Memlock
                | Self::Bpffs
                | Self::Btf
                | Self::Clsact
                | Self::NativeXdp
                | Self::Vxlan
                | Self::Veth
        )
    }

    /// Whether it must be tried at every start, also if it was present: it can go while the machine runs, and costs next to nothing
    /// to try.
    pub const fn may_go(self) -> bool {
        matches!(
            self,
            Self::Bpf | Self::Jit | Self::Memlock | Self::Bpffs | Self::Btf | Self::NativeXdp
        )
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What came of trying a feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "finding", rename_all = "lowercase")]
pub enum Finding {
    /// It works.
    Present,
    /// It does not.
    Absent {
        /// The kernel's answer, where it was an error.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        errno: Option<i32>,
        /// In words.
        reason: String,
    },
    /// It could not be tried: only use will tell.
    Untried {
        /// What is needed to try it.
        reason: String,
    },
}

impl Finding {
    /// Absent, for a reason without an errno.
    pub fn absent(reason: impl Into<String>) -> Self {
        Self::Absent {
            errno: None,
            reason: reason.into(),
        }
    }

    /// Not tried.
    pub fn untried(reason: impl Into<String>) -> Self {
        Self::Untried {
            reason: reason.into(),
        }
    }

    /// For tables.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Absent { .. } => "absent",
            Self::Untried { .. } => "not tried",
        }
    }

    /// Why it is not present.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Present => None,
            Self::Absent { reason, .. } | Self::Untried { reason } => Some(reason),
        }
    }

    /// Whether the answer is the kernel's last word as long as the machine runs.
    fn is_lasting(&self, feature: Feature) -> bool {
        match self {
            Self::Present => !feature.may_go(),
            Self::Absent { errno, .. } => {
                !feature.may_come() && errno.is_none_or(|errno| !PASSING.contains(&errno))
            }
            Self::Untried { .. } => false,
        }
    }
}

/// The findings. A feature that is missing here was not tried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Findings(BTreeMap<Feature, Finding>);

impl Findings {
    /// What was found of a feature.
    pub fn get(&self, feature: Feature) -> Option<&Finding> {
        self.0.get(&feature)
    }

    /// Whether it was tried, and works.
    pub fn has(&self, feature: Feature) -> bool {
        self.get(feature) == Some(&Finding::Present)
    }

    /// Why a feature cannot be had; `None` if it can, or nobody knows.
    pub fn lacks(&self, feature: Feature) -> Option<&str> {
        match self.get(feature)? {
            Finding::Absent { reason, .. } => Some(reason),
            Finding::Present | Finding::Untried { .. } => None,
        }
    }

    /// Adds a finding, in place of an earlier one.
    pub fn put(&mut self, feature: Feature, finding: Finding) {
        self.0.insert(feature, finding);
    }

    /// All of them, in the order of [`Feature::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Feature, &Finding)> {
        self.0.iter().map(|(feature, finding)| (*feature, finding))
    }

    /// Those that stay as they are as long as the machine runs.
    fn lasting(self) -> Self {
        let lasting = |(feature, finding): &(Feature, Finding)| finding.is_lasting(*feature);
        Self(self.0.into_iter().filter(lasting).collect())
    }
}

impl FromIterator<(Feature, Finding)> for Findings {
    fn from_iter<T: IntoIterator<Item = (Feature, Finding)>>(iter: T) -> Self {
        Self(iter.into_iter().collect())
    }
}

#[cfg(test)]
mod tests;
