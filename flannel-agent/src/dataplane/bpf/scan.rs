//! Reading the maps: many entries with one system call where the kernel has `BPF_MAP_LOOKUP_BATCH` for arrays (5.6), one by one elsewhere.
//!
//! A look every second must cost next to nothing, however many peers there are and however large the network is.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::Duration,
};

use aya::maps::{Array, MapData};
use flannel_core::{
    addr::IfIndex,
    plan::{BpfState, Hook},
};

use super::{Bpf, BpfError};

/// `BPF_MAP_LOOKUP_BATCH` in `include/uapi/linux/bpf.h`.
const LOOKUP_BATCH: libc::c_int = 24;
/// Entries of one system call: of the largest, 64 KiB.
const CHUNK: u32 = 1024;
/// See [`Bpf::scan_interval`].
const SCAN_OF_ENTRY: Duration = Duration::from_micros(500);
/// Entries nobody has asked for that are read along, so that what is used with gaps is one stretch.
const GAP: u32 = 32;

/// `union bpf_attr` for `BPF_MAP_LOOKUP_BATCH`.
#[repr(C)]
struct Batch {
    behind: u64,
    reached: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

impl Bpf {
    /// Reads the maps and what is attached. `full` reads every entry; otherwise only those known to be in use are read, which
    /// finds what was lost but not what a stranger added.
    ///
    /// `hooks` are the places to look at, each with the program that our clsact filter runs there. `before` is what this returned last, and
    /// is used up unless this fails.
    pub fn observe(
        &mut self,
        uplink: IfIndex,
        hooks: &[(Hook, IfIndex, Option<u32>)],
        full: bool,
        before: &mut Option<BpfState>,
    ) -> Result<BpfState, BpfError> {
        let settings = self.tables.settings(uplink)?;
        let [whole_subnets, whole_nodes] = [0..self.subnet_count, 1..self.node_capacity];
        let of = |used: &BTreeSet<u32>, whole| if full { vec![whole] } else { stretches(used) };
        let subnets = of(&self.used_subnets, whole_subnets);
        let nodes = of(&self.used_nodes, whole_nodes);
        let map = |name: &str| {
            let pin = self.pins.iter().find(|(path, _)| path.ends_with(name));
            pin.map(|(_, map)| map.fd().as_fd())
        };
        let now = entries("subnets", map("subnets"), &self.subnets, &subnets)?;
        let same = self.tables.look(map("nodes"), &nodes)?;
        let unchanged = same && self.in_use.as_ref() == Some(&now);
        let (subnets, nodes) = match before.take() {
            Some(before) if unchanged => (before.subnets, before.nodes),
            _ => (now.iter().copied().collect(), self.tables.nodes()),
        };
        if full {
            self.used_subnets = subnets.keys().copied().collect();
            self.used_nodes = nodes.keys().copied().collect();
        }
        self.in_use = Some(now);
        self.unchanged = unchanged;
        let mut attached = BTreeMap::new();
        for (hook, ifindex, filter) in hooks {
            if let Some(attachment) = self.attachment(*hook, *ifindex, *filter) {
                attached.insert(*hook, attachment);
            }
        }
        Ok(BpfState {
            settings,
            subnets,
            nodes,
            node_capacity: self.node_capacity,
            attached,
            xdp: self.xdp_attachment(uplink),
            ..BpfState::default()
        })
    }

    /// How far apart readings of every entry are at least. Nobody but a stranger fills one that is not in use, and a network has room for
    /// a hundred thousand of which a node uses ten.
    pub(in crate::dataplane) const fn scan_interval(&self) -> Duration {
        SCAN_OF_ENTRY.saturating_mul(self.subnet_count.saturating_add(self.node_capacity))
    }

    /// Whether the last look found the entries as the one before.
    pub(in crate::dataplane) const fn is_unchanged(&self) -> bool {
        self.unchanged
    }
}

/// The entries of these stretches of a map that are not empty; `map` is the same map, for reading many at once.
pub(super) fn entries<V: aya::Pod + Default + PartialEq>(
    name: &str,
    map: Option<BorrowedFd<'_>>,
    array: &Array<MapData, V>,
    stretches: &[Range<u32>],
) -> Result<Vec<(u32, V)>, BpfError> {
    let empty = V::default();
    let mut found = Vec::new();
    let longest = stretches.iter().map(|stretch| stretch.end - stretch.start);
    let mut values = vec![empty; longest.max().unwrap_or(0).min(CHUNK) as usize];
    for stretch in stretches {
        for first in stretch.clone().step_by(CHUNK as usize) {
            let count = CHUNK.min(stretch.end - first);
            let Some(values) = values.get_mut(..count as usize) else {
                continue;
            };
            if map.is_none_or(|map| read(map, first, values).is_err()) {
                for (index, value) in (first..).zip(values.iter_mut()) {
                    *value = array
                        .get(&index, 0)
                        .map_err(|source| BpfError::read(name, index, source))?;
                }
            }
            let entries = (first..).zip(values.iter().copied());
            found.extend(entries.filter(|(_, value)| *value != empty));
        }
    }
    found.shrink_to_fit();
    Ok(found)
}

/// Reads as many entries as there is room for, from `first` on.
fn read<V: aya::Pod>(map: BorrowedFd<'_>, first: u32, values: &mut [V]) -> io::Result<()> {
    // The kernel goes on behind the entry that it is given.
    let before = first.checked_sub(1);
    let mut last = 0u32;
    let mut keys = vec![0u32; values.len()];
    let mut batch = Batch {
        behind: before
            .as_ref()
            .map_or(0, |before| std::ptr::from_ref(before) as u64),
        reached: (&raw mut last) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(values.len()).map_err(io::Error::other)?,
        map_fd: u32::try_from(map.as_raw_fd()).map_err(io::Error::other)?,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: `batch` is of the kernel's layout for the command; what it points at outlives the call, and has room for `count` keys and
    // values of the map's sizes, of which every pattern of bits is a value.
    #[expect(unsafe_code, reason = "no safe wrapper reads many entries at once")]
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            LOOKUP_BATCH,
            &raw mut batch,
            size_of::<Batch>(),
        )
    };
    let error = (answer < 0).then(io::Error::last_os_error);
    match error {
        // The end of the map.
        Some(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ if batch.count as usize != values.len() => Err(io::Error::other("fewer entries")),
        _ => Ok(()),
    }
}

/// Numbers as stretches without large gaps.
fn stretches(used: &BTreeSet<u32>) -> Vec<Range<u32>> {
    let mut stretches: Vec<Range<u32>> = Vec::new();
    for number in used {
        match stretches.last_mut() {
            Some(last) if number - last.end <= GAP => last.end = number + 1,
            _ => stretches.push(*number..number + 1),
        }
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_close_together_is_read_together() {
        let of = |numbers: &[u32]| -> Vec<(u32, u32)> {
            let stretches = stretches(&numbers.iter().copied().collect());
            let ends = stretches.into_iter().map(|range| (range.start, range.end));
            ends.collect()
        };
        assert!(of(&[]).is_empty());
        assert_eq!(of(&[7]), [(7, 8)]);
        assert_eq!(of(&[0, 1, 2, 9, 34]), [(0, 35)]);
        assert_eq!(of(&[0, 33]), [(0, 34)]);
        assert_eq!(
            of(&[0, 34, 4_000_000]),
            [(0, 1), (34, 35), (4_000_000, 4_000_001)]
        );
    }
}
