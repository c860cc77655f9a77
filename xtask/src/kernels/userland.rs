//! The guests' programs: Debian's packages for any architecture, unpacked and not installed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::archive::{self, Apt};
use crate::dist::arch::Arch;

/// The release of it. 5.10 runs the programs of Debian 13, and bpftool attaches to tcx from 7.5 on.
const SUITE: &str = "trixie";

/// What agents, labs and tests call. The agent's libraries are in it, too: glibc and `libgcc_s`.
const WANTED: [&str; 19] = [
    "base-files",
    "bash",
    "bpftool",
    "busybox-static",
    "conntrack",
    "dash",
    "ethtool",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "libgcc-s1",
    "mount",
    "netbase",
    "nftables",
    "tcpdump",
    "tshark",
    "util-linux",
    "wireguard-tools",
];

/// Dependencies that only scripts of packages need.
const NOT_FOLLOWED: [&str; 8] = [
    "adduser",
    "debconf",
    "debianutils",
    "gawk",
    "init-system-helpers",
    "login",
    "mawk",
    "perl-base",
];

/// What busybox is called as where Debian's packages above have no program of the name.
const APPLETS: [&str; 43] = [
    "[", "awk", "basename", "cat", "chmod", "cp", "cut", "date", "dirname", "echo", "env", "false",
    "find", "grep", "head", "hostname", "id", "kill", "ln", "ls", "mkdir", "mktemp", "mv", "nc",
    "ps", "readlink", "rm", "rmdir", "sed", "seq", "sleep", "sort", "stat", "sysctl", "tail",
    "tee", "test", "timeout", "touch", "tr", "true", "uname", "wc",
];

/// Names that the scripts of packages would have given.
const LINKS: [(&str, &str); 14] = [
    ("usr/bin/sh", "dash"),
    ("usr/sbin/iptables", "iptables-nft"),
    ("usr/sbin/iptables-restore", "iptables-nft-restore"),
    ("usr/sbin/iptables-save", "iptables-nft-save"),
    ("usr/sbin/ip6tables", "ip6tables-nft"),
    ("usr/sbin/ip6tables-restore", "ip6tables-nft-restore"),
    ("usr/sbin/ip6tables-save", "ip6tables-nft-save"),
    ("usr/sbin/modprobe", "../bin/kmod"),
    ("usr/sbin/insmod", "../bin/kmod"),
    ("usr/sbin/rmmod", "../bin/kmod"),
    ("usr/sbin/lsmod", "../bin/kmod"),
    ("usr/sbin/depmod", "../bin/kmod"),
    ("usr/sbin/modinfo", "../bin/kmod"),
    ("etc/mtab", "/proc/self/mounts"),
];

/// The names that a guest has no use for, of files and directories wherever they are.
const PRUNED: [&str; 12] = [
    "usr/games",
    "usr/include",
    "usr/lib/debug",
    "usr/lib/systemd",
    "usr/lib/tmpfiles.d",
    "usr/lib/udev",
    "usr/share",
    "usr/src",
    "var",
    "boot",
    "usr/lib/apt",
    "usr/lib/dpkg",
];

/// Names what a complete directory was made of; written last.
const COMPLETE: &str = "complete";

/// The root directory of an architecture's guests below `dir`: the one made before, or a new one.
pub(super) fn fetch(dir: &Path, arch: Arch, refresh: bool) -> Result<PathBuf> {
    let home = dir.join(format!("userland-{arch}"));
    let (root, complete) = (home.join("root"), home.join(COMPLETE));
    let made_of = format!("{SUITE}: {}\n", WANTED.join(" "));
    if !refresh && fs::read_to_string(&complete).is_ok_and(|text| text == made_of) {
        return Ok(root);
    }
    eprintln!("fetching the guests' programs for {arch} from Debian {SUITE} (about 70 MB)");
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("remove {}", home.display()))?;
    }
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    let apt = Apt::new(dir, SUITE, arch.name())?;
    apt.update()?;
    let names = apt.closure(&WANTED, &NOT_FOLLOWED)?;
    let mut packages = apt.download(&names)?;
    // It has the links of a merged /usr, into which the others are unpacked.
    packages.sort_by_key(|path| {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        !name.is_some_and(|name| name.starts_with("base-files_"))
    });
    for package in packages {
        archive::unpack(&package, &root)?;
    }
    arrange(&root)?;
    fs::write(&complete, made_of).with_context(|| format!("write {}", complete.display()))?;
    Ok(root)
}

fn arrange(root: &Path) -> Result<()> {
    for name in PRUNED {
        let path = root.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    let applets = APPLETS
        .iter()
        .map(|name| (format!("usr/bin/{name}"), "busybox"));
    let links = LINKS.iter().map(|(name, to)| ((*name).to_owned(), *to));
    for (name, to) in links.chain(applets) {
        let link = root.join(&name);
        let taken = fs::symlink_metadata(&link).is_ok()
            || root.join(name.replace("bin/", "sbin/")).exists();
        if !taken {
            symlink(to, &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    for (name, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files\nprotocols: files\nservices: files\n",
        ),
        ("etc/hosts", "127.0.0.1 localhost\n"),
    ] {
        let path = root.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
