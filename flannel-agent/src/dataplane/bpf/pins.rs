//! Where things are pinned: `/sys/fs/bpf/flannel/<netns cookie>.<vni>/`, with the maps in `maps-v<layout>` below it.
//!
//! The layout version is part of the path, so an agent never opens another version's maps. Reading (`status`, `peers`) goes
//! through here too and needs no running agent.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData, MapError, MapInfo, PerCpuArray};
use flannel_common::{
    Counter, CounterId, Direction, DropReason, LAYOUT_VERSION, NodeId, reason_index,
};
use flannel_core::{
    addr::IfIndex,
    mark::{self, Overlay},
    plan::{Hook, Node},
    pods::Pod,
    xdp::Sample,
};
use ipnet::IpNet;
use nix::sys::statfs;

use super::{BpfError, attach, join, link, tables};

const BPFFS: &str = "/sys/fs/bpf";
/// Directory of the maps, before the layout version.
const MAPS: &str = "maps-v";
/// Empty directory that says that a clsact qdisc is of our making, before the index of its interface. Nothing in the kernel
/// can be marked that lives as long as the qdisc does.
const QDISC: &str = "qdisc-";
/// `SO_NETNS_COOKIE` in `include/uapi/asm-generic/socket.h`; kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// One node's place in the bpf file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    overlay: Overlay,
    dir: PathBuf,
}

/// Packets and bytes by path, and reasons for not carrying, summed over all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Encapsulated in eBPF.
    pub encap: Counter,
    /// Decapsulated in eBPF.
    pub decap: Counter,
    /// From a pod to another node, around the stack. Not among `encap`.
    pub fast_encap: Counter,
    /// From another node to a pod, around the stack. Not among `decap`.
    pub fast_decap: Counter,
    /// Between two pods of this node, around the stack.
    pub fast_local: Counter,
    /// From a pod to another node on the same link, around the stack and without outer headers. Not among `fast_encap`.
    pub routed_out: Counter,
    /// From another node on the same link to a pod, likewise. Not among `fast_decap`.
    pub routed_in: Counter,
    /// Stripped by native XDP. They are among the others too.
    pub xdp: Counter,
    /// Packets that the gate sent through the stack with a tag.
    pub gate_tagged: u64,
    /// Packets found untouched behind the stack.
    pub gate_confirmed: u64,
    /// Packets found behind the stack that did not enter it so.
    pub gate_refuted: u64,
    /// Connections admitted by their first SYN.
    pub gate_admitted: u64,
    /// Non-zero counts of packets left to the kernel, or dropped where there is no kernel device.
    pub reasons: Vec<(Direction, DropReason, u64)>,
}

impl Instance {
    /// The place of an overlay in the network namespace of this process.
    pub fn of(overlay: Overlay) -> Result<Self, BpfError> {
        let dir = PathBuf::from(overlay.path(netns_cookie()?));
        Ok(Self { overlay, dir })
    }

    /// Whose place it is.
    pub const fn overlay(&self) -> Overlay {
        self.overlay
    }

    /// The places of all overlays in the network namespace of this process, those of IPv4 first, in VNI order.
    pub fn all() -> Result<Vec<Self>, BpfError> {
        let cookie = netns_cookie()?;
        let root = Path::new(mark::BPFFS_ROOT);
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(pin_error("list", root, source)),
        };
        let mut found: Vec<_> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| {
                let (owner, overlay) = Overlay::parse_dir(entry.file_name().to_str()?)?;
                let dir = entry.path();
                (owner == cookie).then_some(Self { overlay, dir })
            })
            .collect();
        found.sort_by_key(Self::overlay);
        Ok(found)
    }

    /// The place of the other family's overlay, beside this one.
    pub(super) fn sibling(&self) -> Option<Self> {
        let (cookie, overlay) = Overlay::parse_dir(self.dir.file_name()?.to_str()?)?;
        let overlay = overlay.sibling();
        let dir = self.dir.with_file_name(overlay.dir(cookie));
        Some(Self { overlay, dir })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the link of a hook is pinned. For a filter on a pod veth an empty directory of that name says that it may be there.
    pub(super) fn link(&self, hook: Hook, index: IfIndex) -> PathBuf {
        if hook.is_per_pod() {
            join(&self.dir, &mark::pod_pin(hook.as_str(), index))
        } else {
            join(&self.dir, hook.as_str())
        }
    }

    /// Where the link of native XDP is pinned.
    pub(super) fn xdp_link(&self) -> PathBuf {
        join(&self.dir, mark::PIN_XDP_DECAP)
    }

    /// The hooks of pod veths at which something of ours may be.
    pub fn pod_hooks(&self) -> Vec<(Hook, IfIndex)> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten();
        let mut found: Vec<_> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| {
                let name = entry.file_name();
                let (name, index) = mark::parse_pod_pin(name.to_str()?)?;
                let mut hooks = Hook::POD.into_iter();
                Some((hooks.find(|hook| hook.as_str() == name)?, index))
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// Remembers that a filter of ours is on a pod veth.
    pub(super) fn note_filter(&self, hook: Hook, index: IfIndex) -> Result<(), BpfError> {
        let path = self.link(hook, index);
        fs::create_dir_all(&path).map_err(|source| pin_error("create", &path, source))
    }

    fn maps(&self) -> PathBuf {
        self.dir.join(format!("{MAPS}{LAYOUT_VERSION}"))
    }

    /// Makes the directories and removes pinned maps whose shape is not the wanted one: name, value size in bytes, entries.
    pub(super) fn prepare(
        &self,
        wanted: &[(&'static str, usize, u32)],
    ) -> Result<Vec<(&'static str, PathBuf)>, BpfError> {
        let dir = self.maps();
        fs::create_dir_all(&dir).map_err(|source| pin_error("create", &dir, source))?;
        let mut paths = Vec::new();
        for (name, value_size, entries) in wanted {
            let path = join(&dir, name);
            if let Ok(info) = MapInfo::from_pin(&path)
                && (info.value_size() as usize != *value_size || info.max_entries() != *entries)
            {
                tracing::info!(map = name, "replace a pinned map of another shape");
                fs::remove_file(&path).map_err(|source| pin_error("remove", &path, source))?;
            }
            paths.push((*name, path));
        }
        Ok(paths)
    }

    /// Removes the maps of other layout versions. To be called once nothing uses them any more.
    pub(super) fn remove_old_maps(&self) {
        let current = self.maps();
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.filter_map(Result::ok) {
            let (path, name) = (entry.path(), entry.file_name());
            if name.to_string_lossy().starts_with(MAPS)
                && path != current
                && let Err(error) = fs::remove_dir_all(&path)
            {
                tracing::warn!(path = %path.display(), %error, "remove maps of another layout");
            }
        }
    }

    /// Remembers that the clsact qdisc of this interface is of our making.
    pub(super) fn note_qdisc(&self, index: IfIndex) -> Result<(), BpfError> {
        let path = self.qdisc(index);
        fs::create_dir_all(&path).map_err(|source| pin_error("create", &path, source))
    }

    /// Forgets the qdisc of an interface that is gone.
    pub(super) fn forget_qdisc(&self, index: IfIndex) -> Result<(), BpfError> {
        let path = self.qdisc(index);
        match fs::remove_dir(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(pin_error("remove", &path, source))
            }
            _ => Ok(()),
        }
    }

    fn qdisc(&self, index: IfIndex) -> PathBuf {
        self.dir.join(format!("{QDISC}{}", index.get()))
    }

    /// The interfaces with a clsact qdisc of our making.
    pub fn noted_qdiscs(&self) -> Vec<IfIndex> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten();
        entries
            .filter_map(Result::ok)
            .filter_map(|entry| {
                let name = entry.file_name();
                let index: u32 = name.to_str()?.strip_prefix(QDISC)?.parse().ok()?;
                IfIndex::try_from(index).ok()
            })
            .collect()
    }

    /// Detaches our programs and unpins their links, then removes the maps. Running it again is success.
    pub fn remove(&self) -> Result<(), BpfError> {
        let contents = self.contents();
        let is_link = |path: &&PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            path.parent() == Some(&self.dir) && name.is_some_and(mark::is_our_link_pin)
        };
        let links: Vec<&PathBuf> = contents.iter().filter(is_link).collect();
        // What XDP strips needs `from_wire`.
        if !self.leave_xdp() {
            link::detach(&self.xdp_link());
        }
        if let Some(before) = self.before_xdp() {
            before.clear_behind();
        }
        // A link that is only unpinned leaves its interface some time later; who asked for it to go looks at once.
        for path in &links {
            link::detach(path);
        }
        // Links first: a program must not run on maps that are going away.
        for path in links.into_iter().chain(&contents) {
            let removed = if path.is_dir() {
                fs::remove_dir(path)
            } else {
                fs::remove_file(path)
            };
            match removed {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(pin_error("remove", path, source));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The pinned files and directories, children before parents.
    pub fn contents(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.dir, &mut found);
        found
    }

    /// The nodes that subnets point at, by index of the subnet.
    fn nodes(&self) -> Result<Vec<(u32, Option<Node>)>, BpfError> {
        let subnets: Array<_, NodeId> = self.open("subnets")?;
        let tables = self.tables()?;
        let mut found = Vec::new();
        for index in 0..subnets.len() {
            let id = subnets
                .get(&index, 0)
                .map_err(|source| BpfError::read("subnets", index, source))?;
            if id != 0 {
                // One that is not there: somebody has written to the map; the daemon mends it.
                found.push((index, tables.node(id)?));
            }
        }
        Ok(found)
    }

    /// Whether the programs still believe the maps, see [`super::Bpf::keep`]. Those of an agent that knew no such thing do for ever.
    pub fn is_kept(&self) -> bool {
        let until = self
            .open::<Array<_, u64>>("alive")
            .ok()
            .and_then(|alive| alive.get(&0, 0).ok());
        until.is_none_or(|until| until == 0 || super::since_boot() * 1_000_000_000 <= until)
    }

    /// The peers as the maps have them, by subnet.
    pub fn peers(&self) -> Result<Vec<(IpNet, Option<Node>)>, BpfError> {
        // Not part of the map, and not asked for.
        let Some(settings) = self.tables()?.settings(IfIndex::FIRST)? else {
            return Ok(Vec::new());
        };
        let nodes = self.nodes()?.into_iter();
        Ok(nodes
            .filter_map(|(index, node)| Some((settings.subnet(index)?, node)))
            .collect())
    }

    /// The pods to which packets are handed directly, as the map has them.
    pub fn pods(&self) -> Result<BTreeMap<IpAddr, Option<Pod>>, BpfError> {
        self.tables()?.pods()
    }

    fn tables(&self) -> Result<Box<dyn tables::Tables>, BpfError> {
        tables::open(&self.maps(), self.overlay.family)
    }

    /// Whether our pinned link holds its program at this interface.
    pub fn is_attached(&self, hook: Hook, index: IfIndex) -> bool {
        attach::is_attached(&self.link(hook, index), index)
    }

    /// Whether our program of native XDP runs at this interface: by our pinned link, or behind the one for IPv4.
    pub fn is_xdp_attached(&self, index: IfIndex) -> bool {
        let is_behind = |before: Self| before.has_xdp_hook(index) && before.behind().is_some();
        self.has_xdp_hook(index) || self.before_xdp().is_some_and(is_behind)
    }

    /// What shows whether native XDP runs.
    pub(super) fn xdp_sample(&self) -> Result<Sample, BpfError> {
        let counters: PerCpuArray<_, Counter> = self.open("counters")?;
        Ok(Sample {
            stripped: sum(&counters, CounterId::XdpDecap)?.packets,
            missed: sum(&counters, CounterId::XdpMissed)?.packets,
        })
    }

    /// The counters.
    pub fn totals(&self) -> Result<Totals, BpfError> {
        let counters: PerCpuArray<_, Counter> = self.open("counters")?;
        let reasons: PerCpuArray<_, u64> = self.open("reasons")?;
        let sum = |id| sum(&counters, id);
        let mut totals = Totals {
            encap: sum(CounterId::BpfEncap)?,
            decap: sum(CounterId::BpfDecap)?,
            fast_encap: sum(CounterId::FastEncap)?,
            fast_decap: sum(CounterId::FastDecap)?,
            fast_local: sum(CounterId::FastLocal)?,
            routed_out: sum(CounterId::FastRoutedOut)?,
            routed_in: sum(CounterId::FastRoutedIn)?,
            xdp: sum(CounterId::XdpDecap)?,
            gate_tagged: sum(CounterId::GateTagged)?.packets,
            gate_confirmed: sum(CounterId::GateConfirmed)?.packets,
            gate_refuted: sum(CounterId::GateRefuted)?.packets,
            gate_admitted: sum(CounterId::GateAdmitted)?.packets,
            reasons: Vec::new(),
        };
        for direction in Direction::ALL {
            for reason in DropReason::ALL {
                let index = reason_index(direction, *reason);
                let values = reasons
                    .get(&index, 0)
                    .map_err(|source| BpfError::read("reasons", index, source))?;
                let count: u64 = values.iter().sum();
                if count > 0 {
                    totals.reasons.push((direction, *reason, count));
                }
            }
        }
        Ok(totals)
    }

    fn open<M: TryFrom<Map, Error = MapError>>(&self, name: &str) -> Result<M, BpfError> {
        tables::open_map(&self.maps(), name, |data| match name {
            "counters" | "reasons" => Map::PerCpuArray(data),
            _ => Map::Array(data),
        })
    }
}

/// A counter over all CPUs.
fn sum(counters: &PerCpuArray<MapData, Counter>, id: CounterId) -> Result<Counter, BpfError> {
    let values = counters
        .get(&(id as u32), 0)
        .map_err(|source| BpfError::read("counters", id as u32, source))?;
    Ok(values.iter().fold(Counter::default(), |sum, one| Counter {
        packets: sum.packets.wrapping_add(one.packets),
        bytes: sum.bytes.wrapping_add(one.bytes),
    }))
}

/// Whether a bpf file system is mounted where it belongs.
pub fn mounted() -> bool {
    statfs::statfs(BPFFS).is_ok_and(|stat| stat.filesystem_type() == statfs::BPF_FS_MAGIC)
}

/// Mounts the bpf file system where it belongs, unless it is there.
pub fn ensure_bpffs() -> Result<(), BpfError> {
    if mounted() {
        return Ok(());
    }
    let path = Path::new(BPFFS);
    nix::mount::mount(
        Some("bpf"),
        path,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|errno| pin_error("mount the bpf file system on", path, errno.into()))?;
    tracing::info!(path = BPFFS, "mounted the bpf file system");
    Ok(())
}

/// Identifies this process's network namespace for as long as the machine runs. Before 5.14 there is no cookie; the inode number
/// serves, with its upper half set so that it is never taken for a cookie.
fn netns_cookie() -> Result<u64, BpfError> {
    let path = Path::new("/proc/self/ns/net");
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")
        .map_err(|source| pin_error("open a socket for", path, source))?;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer is a u64 and `len` its size; the descriptor is open for the duration of the call.
    #[expect(unsafe_code, reason = "no safe wrapper knows this socket option")]
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if answer == 0 {
        return Ok(cookie);
    }
    let inode = std::os::unix::fs::MetadataExt::ino(
        &fs::metadata(path).map_err(|source| pin_error("read", path, source))?,
    );
    Ok(inode | 0xffff_ffff_0000_0000)
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut entries: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, found);
        } else {
            found.push(path);
        }
    }
    found.push(dir.to_owned());
}

pub(super) fn pin_error(verb: &'static str, path: &Path, source: io::Error) -> BpfError {
    BpfError::Pin {
        verb,
        path: path.to_owned(),
        source,
    }
}
