//! The maps whose layout is that of an address family. What is written to them and read from them is the same in both.

use std::{collections::BTreeMap, net::IpAddr, ops::Range, os::fd::BorrowedFd, path::Path};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use flannel_common::{
    LAYOUT_VERSION, NodeId, PodRecord,
    flow::{LastSighting, Sighting},
};
use flannel_core::{
    addr::{Family, IfIndex},
    plan::{Node, Records, Settings, V4, V6},
    pods::Pod,
};

use super::{BpfError, array, error::errno, hash, join, scan};

/// Sizes of values, in bytes.
pub(super) struct Sizes {
    pub(super) config: usize,
    pub(super) node: usize,
    pub(super) sighting: usize,
    pub(super) last: usize,
}

/// The sizes in a family.
pub(super) const fn sizes(family: Family) -> Sizes {
    match family {
        Family::V4 => sizes_of::<V4>(),
        Family::V6 => sizes_of::<V6>(),
    }
}

const fn sizes_of<R: Records>() -> Sizes {
    Sizes {
        config: size_of::<R::Config>(),
        node: size_of::<R::Node>(),
        sighting: size_of::<Sighting<R::Address>>(),
        last: size_of::<LastSighting<R::Address>>(),
    }
}

/// `config`, `nodes` and `pods`.
pub(super) trait Tables: Send + Sync {
    /// The epoch of the configuration that is in place; zero before the first.
    fn epoch(&self) -> Result<u32, BpfError>;

    /// What `config` says; `None` if this layout has not written it.
    fn settings(&self, uplink: IfIndex) -> Result<Option<Settings>, BpfError>;

    /// Writes `config`.
    fn put_settings(&mut self, settings: &Settings) -> Result<(), BpfError>;

    /// Writes an entry of `nodes`.
    fn put_node(&mut self, id: NodeId, node: &Node) -> Result<(), BpfError>;

    /// Empties an entry of `nodes`.
    fn clear_node(&mut self, id: NodeId) -> Result<(), BpfError>;

    /// Reads what is in these stretches of `nodes`, with the map once more for reading many at once. True if that is what it was.
    fn look(
        &mut self,
        map: Option<BorrowedFd<'_>>,
        stretches: &[Range<u32>],
    ) -> Result<bool, BpfError>;

    /// The nodes of the last look.
    fn nodes(&self) -> BTreeMap<NodeId, Option<Node>>;

    /// Reads one entry of `nodes`; `None` where there is no such entry, or none of ours.
    fn node(&self, id: NodeId) -> Result<Option<Node>, BpfError>;

    /// Writes an entry of `pods`.
    fn put_pod(&mut self, address: IpAddr, pod: &Pod) -> Result<(), BpfError>;

    /// Removes an entry of `pods`.
    fn del_pod(&mut self, address: IpAddr) -> Result<(), BpfError>;

    /// Reads `pods`.
    fn pods(&self) -> Result<BTreeMap<IpAddr, Option<Pod>>, BpfError>;
}

/// Takes the maps of a loaded object.
pub(super) fn take(ebpf: &mut Ebpf, family: Family) -> Result<Box<dyn Tables>, BpfError> {
    Ok(match family {
        Family::V4 => Box::new(Typed::<V4>::take(ebpf)?),
        Family::V6 => Box::new(Typed::<V6>::take(ebpf)?),
    })
}

/// Opens the maps that are pinned in a directory.
pub(super) fn open(dir: &Path, family: Family) -> Result<Box<dyn Tables>, BpfError> {
    Ok(match family {
        Family::V4 => Box::new(Typed::<V4>::open(dir)?),
        Family::V6 => Box::new(Typed::<V6>::open(dir)?),
    })
}

/// Opens one pinned map.
pub(super) fn open_map<M: TryFrom<Map, Error = MapError>>(
    dir: &Path,
    name: &str,
    kind: impl FnOnce(MapData) -> Map,
) -> Result<M, BpfError> {
    let failed = |source| BpfError::read(name, 0, source);
    let data = MapData::from_pin(join(dir, name)).map_err(failed)?;
    M::try_from(kind(data)).map_err(failed)
}

/// A family whose values can be written to maps.
trait Layout:
    Records<
        Config: aya::Pod + Send + Sync,
        Node: aya::Pod + Send + Sync,
        Address: aya::Pod + Send + Sync,
    >
{
}

impl Layout for V4 {}
impl Layout for V6 {}

struct Typed<R: Layout> {
    config: Array<MapData, R::Config>,
    nodes: Array<MapData, R::Node>,
    pods: HashMap<MapData, R::Address, PodRecord>,
    /// Entries of `nodes` of the last look that are not empty.
    seen: Option<Vec<(NodeId, R::Node)>>,
}

impl<R: Layout> Typed<R> {
    fn take(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self {
            config: array(ebpf, "config")?,
            nodes: array(ebpf, "nodes")?,
            pods: hash(ebpf, "pods")?,
            seen: None,
        })
    }

    fn open(dir: &Path) -> Result<Self, BpfError> {
        Ok(Self {
            config: open_map(dir, "config", Map::Array)?,
            nodes: open_map(dir, "nodes", Map::Array)?,
            pods: open_map(dir, "pods", Map::HashMap)?,
            seen: None,
        })
    }

    fn read_config(&self) -> Result<R::Config, BpfError> {
        let config = self.config.get(&0, 0);
        config.map_err(|source| BpfError::read("config", 0, source))
    }
}

impl<R: Layout> Tables for Typed<R> {
    fn epoch(&self) -> Result<u32, BpfError> {
        let (layout, epoch) = R::stamp(&self.read_config()?);
        Ok(if layout == LAYOUT_VERSION { epoch } else { 0 })
    }

    fn settings(&self, uplink: IfIndex) -> Result<Option<Settings>, BpfError> {
        Ok(R::settings(&self.read_config()?, uplink))
    }

    fn put_settings(&mut self, settings: &Settings) -> Result<(), BpfError> {
        let config = R::config(settings).ok_or_else(|| foreign("settings", settings.local))?;
        self.config
            .set(0, config, 0)
            .map_err(|source| BpfError::write("config", 0, source))
    }

    fn put_node(&mut self, id: NodeId, node: &Node) -> Result<(), BpfError> {
        let record = R::record(node).ok_or_else(|| foreign("a node", node.remote))?;
        self.nodes
            .set(id, record, 0)
            .map_err(|source| BpfError::write("nodes", id, source))
    }

    fn clear_node(&mut self, id: NodeId) -> Result<(), BpfError> {
        self.nodes
            .set(id, R::Node::default(), 0)
            .map_err(|source| BpfError::write("nodes", id, source))
    }

    fn look(
        &mut self,
        map: Option<BorrowedFd<'_>>,
        stretches: &[Range<u32>],
    ) -> Result<bool, BpfError> {
        let now = scan::entries("nodes", map, &self.nodes, stretches)?;
        let same = self.seen.as_ref() == Some(&now);
        self.seen = Some(now);
        Ok(same)
    }

    fn nodes(&self) -> BTreeMap<NodeId, Option<Node>> {
        let seen = self.seen.iter().flatten();
        seen.map(|(id, record)| (*id, R::node(record))).collect()
    }

    fn node(&self, id: NodeId) -> Result<Option<Node>, BpfError> {
        if id >= self.nodes.len() {
            return Ok(None);
        }
        let record = self.nodes.get(&id, 0);
        let record = record.map_err(|source| BpfError::read("nodes", id, source))?;
        Ok(R::node(&record))
    }

    fn put_pod(&mut self, address: IpAddr, pod: &Pod) -> Result<(), BpfError> {
        let key = R::key(address).ok_or_else(|| foreign("a pod", address))?;
        self.pods
            .insert(key, pod.encode(), 0)
            .map_err(|source| BpfError::pod("write", address, source))
    }

    fn del_pod(&mut self, address: IpAddr) -> Result<(), BpfError> {
        let key = R::key(address).ok_or_else(|| foreign("a pod", address))?;
        match self.pods.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) if errno(&source) == Some(libc::ENOENT) => Ok(()),
            Err(source) => Err(BpfError::pod("delete", address, source)),
        }
    }

    fn pods(&self) -> Result<BTreeMap<IpAddr, Option<Pod>>, BpfError> {
        let mut pods = BTreeMap::new();
        for entry in &self.pods {
            let (key, record) = entry.map_err(|source| BpfError::read("pods", 0, source))?;
            pods.insert(R::address(key), Pod::decode(&record));
        }
        Ok(pods)
    }
}

fn foreign(what: &'static str, address: IpAddr) -> BpfError {
    BpfError::Foreign { what, address }
}
