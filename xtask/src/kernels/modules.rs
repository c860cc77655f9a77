//! The kernel modules of a guest: a directory as depmod leaves it, from which the kernel and modprobe load what they want. What a
//! case withholds is not in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::debian::Files;
use crate::archive::output;
use crate::process;

/// What guests start with, because nobody asks for it: there is no udev.
pub(super) const LOADED: [&str; 3] = ["virtio_pci", "virtio_console", "virtio_net"];

/// What agents, labs and tests make or attach. What these depend on comes by itself, and what a kernel has built in or never had
/// is passed over.
const WANTED: [&str; 43] = [
    "act_bpf",
    "act_gact",
    "act_mirred",
    "br_netfilter",
    "bridge",
    "cls_basic",
    "cls_bpf",
    "cls_flower",
    "cls_matchall",
    "cls_u32",
    "dummy",
    "geneve",
    "ifb",
    "inet_diag",
    "ip_set",
    "ip_tables",
    "iptable_filter",
    "iptable_mangle",
    "iptable_nat",
    "iptable_raw",
    "ipvlan",
    "macvlan",
    "netkit",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_tables",
    "nfnetlink",
    "nfnetlink_queue",
    "sch_fq",
    "sch_fq_codel",
    "sch_ingress",
    "sch_netem",
    "sch_tbf",
    "tcp_diag",
    "tun",
    "udp_diag",
    "veth",
    "virtio_console",
    "virtio_net",
    "virtio_pci",
    "vxlan",
    "wireguard",
];

/// All of these that a kernel has: matches and targets of iptables.
const FAMILIES: [&str; 2] = ["xt_", "nft_"];

/// Makes `<to>/lib/modules/<release>`.
pub(super) fn stage(files: &Files, withheld: &[&str], to: &Path) -> Result<()> {
    let from = files.dir.join("lib/modules").join(&files.release);
    let home = to.join("lib/modules").join(&files.release);
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("remove {}", to.display()))?;
    }
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let dep = from.join("modules.dep");
    let dep = fs::read_to_string(&dep).with_context(|| format!("read {}", dep.display()))?;
    for path in closure(&dep, &WANTED, withheld) {
        let target = home.join(path.trim_end_matches(".xz"));
        let above = target.parent().context("a module's directory")?;
        fs::create_dir_all(above).with_context(|| format!("create {}", above.display()))?;
        fs::write(&target, plain(&from.join(&path))?)
            .with_context(|| format!("write {}", target.display()))?;
    }
    for name in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        let (source, target) = (from.join(name), home.join(name));
        if source.exists() {
            fs::copy(&source, &target).with_context(|| format!("copy {}", source.display()))?;
        }
    }
    let mut depmod = process::command("depmod");
    output(depmod.arg("-b").arg(to).arg(&files.release)).map(drop)
}

/// The paths of the wanted modules and of what they depend on, from `modules.dep`, but for those withheld and what needs these.
fn closure(dep: &str, wanted: &[&str], withheld: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in dep.lines() {
        let Some((path, needs)) = line.split_once(':') else {
            continue;
        };
        let name = name_of(path);
        let is_wanted = wanted.iter().any(|wanted| same(wanted, name))
            || FAMILIES.iter().any(|family| name.starts_with(family));
        let all: Vec<&str> = std::iter::once(path)
            .chain(needs.split_whitespace())
            .collect();
        let is_withheld = |path: &&str| {
            withheld
                .iter()
                .any(|withheld| same(withheld, name_of(path)))
        };
        if is_wanted && !all.iter().any(is_withheld) {
            found.extend(all.iter().map(|path| (*path).to_owned()));
        }
    }
    found
}

/// `vxlan` of `kernel/drivers/net/vxlan/vxlan.ko.xz`.
fn name_of(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file)
}

/// To the kernel both signs are one.
fn same(a: &str, b: &str) -> bool {
    a.replace('-', "_") == b.replace('-', "_")
}

/// A module, decompressed: not every kernel can do that by itself, and emulated machines take long.
fn plain(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|end| end != "xz") {
        return fs::read(path).with_context(|| format!("read {}", path.display()));
    }
    let output = process::command("xz")
        .arg("--decompress")
        .arg("--stdout")
        .arg(path)
        .output()
        .context("start xz")?;
    if !output.status.success() {
        bail!("xz could not decompress {}", path.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/net/udp_tunnel.ko.xz:\n\
                       kernel/drivers/net/vxlan/vxlan.ko.xz: kernel/net/udp_tunnel.ko.xz\n\
                       kernel/net/geneve.ko.xz: kernel/net/udp_tunnel.ko.xz\n\
                       kernel/net/netfilter/xt_mark.ko.xz: kernel/net/netfilter/x_tables.ko.xz\n\
                       kernel/fs/xfs.ko.xz:\n";

    #[test]
    fn modules_come_with_what_they_need() {
        let found = closure(DEP, &["vxlan"], &[]);
        let names: Vec<&str> = found.iter().map(|path| name_of(path)).collect();
        assert_eq!(names, ["vxlan", "x_tables", "xt_mark", "udp_tunnel"]);
    }

    #[test]
    fn what_is_withheld_is_not_there_and_nothing_that_needs_it() {
        let found = closure(DEP, &["vxlan", "geneve"], &["vxlan"]);
        assert!(
            !found.iter().any(|path| name_of(path) == "vxlan"),
            "{found:?}"
        );
        assert!(
            found.iter().any(|path| name_of(path) == "geneve"),
            "{found:?}"
        );
        let found = closure(DEP, &["vxlan", "geneve"], &["udp-tunnel"]);
        assert_eq!(found.len(), 2, "{found:?}");
    }
}
