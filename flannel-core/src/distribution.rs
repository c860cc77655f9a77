//! What to do on this machine about something that its kernel lacks: which package has the module, or what else stands in the way.
//!
//! A container's files say nothing about the machine, so the kernel's own name is asked first: distributions leave their mark there.

#[cfg(test)]
mod tests;

/// What a node needs of the kernel, and can be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// The device type vxlan.
    Vxlan,
    /// The clsact qdisc and its filters, by which programs are attached where the kernel has no tcx.
    Clsact,
    /// The device type wireguard.
    Wireguard,
}

impl Feature {
    /// The modules that have it.
    pub const fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Vxlan => &["vxlan"],
            Self::Clsact => &["sch_ingress", "cls_bpf"],
            Self::Wireguard => &["wireguard"],
        }
    }

    /// The options of the kernel's configuration that give it.
    const fn options(self) -> &'static str {
        match self {
            Self::Vxlan => "CONFIG_VXLAN",
            Self::Clsact => "CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF",
            Self::Wireguard => "CONFIG_WIREGUARD (Linux 5.6 or newer)",
        }
    }

    /// Packages of `OpenWrt`, which has one for each module.
    const fn openwrt(self) -> &'static str {
        match self {
            Self::Vxlan => "kmod-vxlan",
            Self::Clsact => "kmod-sched-core and kmod-sched-bpf",
            Self::Wireguard => "kmod-wireguard",
        }
    }
}

/// The directory of the kernel's modules, `/lib/modules`, as far as this process can see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Modules {
    /// There is none, or it cannot be seen from here.
    #[default]
    Unseen,
    /// It has modules of other kernels only: these.
    OtherKernels(Vec<String>),
    /// It has those of the running kernel, but not the wanted one.
    Without,
    /// It has the wanted one, in this file.
    With(String),
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// The text of `/etc/os-release`, where it is the machine's and not that of a container's image.
    pub os_release: Option<String>,
    /// Whether this process is in a container.
    pub container: bool,
    /// Where the modules are.
    pub modules: Modules,
}

/// Which family of distributions a machine belongs to, as far as packages of kernels go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Ubuntu for Raspberry Pi.
    UbuntuRaspi,
    /// Ubuntu.
    Ubuntu,
    /// Raspberry Pi OS.
    RaspberryPiOs,
    /// Debian.
    Debian,
    /// Fedora, Red Hat and what is built from it.
    RedHat,
    /// Amazon Linux.
    Amazon,
    /// SUSE and openSUSE.
    Suse,
    /// Alpine.
    Alpine,
    /// Arch Linux.
    Arch,
    /// `OpenWrt`.
    OpenWrt,
    /// Systems that are replaced as a whole: Talos, Flatcar, Bottlerocket, Container-Optimized OS.
    Image,
    /// Windows' Linux.
    Wsl,
}

impl Host {
    /// Which distribution it is; `None` when that cannot be told.
    pub fn distribution(&self) -> Option<Distribution> {
        by_kernel(&self.kernel).or_else(|| by_os_release(self.os_release.as_deref()?))
    }

    /// What to do about a feature that this kernel lacks, as the second half of a sentence. One line.
    pub fn advice(&self, feature: Feature) -> String {
        let kernel = &self.kernel;
        let modules = feature.modules().join(" ");
        match &self.modules {
            Modules::OtherKernels(others) => {
                let newest = others.last().map_or("another kernel", String::as_str);
                return format!(
                    "the modules of the running kernel {kernel} are gone from /lib/modules, which has those of {newest}: the kernel was \
                     updated, restart the node"
                );
            }
            Modules::With(file) => {
                return format!(
                    "the module is installed as {file} and does not load: \"modprobe -a {modules}\" on the node says why (a block list in \
                     /etc/modprobe.d, kernel.modules_disabled, a signature that is not accepted)"
                );
            }
            Modules::Unseen | Modules::Without => {}
        }
        let raspi = match feature {
            Feature::Vxlan | Feature::Clsact => ", on a Raspberry Pi linux-modules-extra-raspi",
            Feature::Wireguard => "",
        };
        let load = format!("then \"modprobe -a {modules}\" or restart the node");
        // Ubuntu has the modules of some features in a package of their own, and this one in that of the others.
        let extra = match feature {
            Feature::Vxlan | Feature::Clsact => format!("linux-modules-extra-{kernel}"),
            Feature::Wireguard => format!("linux-modules-{kernel}"),
        };
        match self.distribution() {
            Some(Distribution::UbuntuRaspi) if feature == Feature::Wireguard => {
                format!("install {extra}, {load}")
            }
            Some(Distribution::RedHat) if feature == Feature::Wireguard && is_before_5_6(kernel) => {
                "this distribution's kernel is older than WireGuard: run a release with Linux 5.6 or newer, or take \"vxlan\" for Backend.Type"
                    .into()
            }
            Some(Distribution::UbuntuRaspi) => {
                format!("install linux-modules-extra-raspi, {load}")
            }
            Some(Distribution::Ubuntu) => format!("install {extra}, {load}"),
            Some(Distribution::Debian) => format!(
                "Debian's kernels have it: apt install --reinstall linux-image-{kernel}, {load}"
            ),
            Some(Distribution::RaspberryPiOs) => "Raspberry Pi OS' kernels have it: update the kernel's package (linux-image-rpi-…, before \
                 2023 raspberrypi-kernel) and restart the node"
                .into(),
            Some(Distribution::RedHat) => format!(
                "dnf install kernel-modules-{kernel} kernel-modules-extra-{kernel}, {load}"
            ),
            Some(Distribution::Amazon) => {
                format!("install the package kernel-modules-extra of kernel {kernel}, {load}")
            }
            Some(Distribution::Suse) => {
                "install kernel-default in place of kernel-default-base, and restart the node".into()
            }
            Some(Distribution::Alpine) => {
                "update linux-lts, or take it in place of linux-virt, and restart the node".into()
            }
            Some(Distribution::Arch) => "pacman -Syu linux, and restart the node".into(),
            Some(Distribution::OpenWrt) => format!("install {}", feature.openwrt()),
            Some(Distribution::Image) => format!(
                "this system's kernel comes with its image and cannot be added to: take an image whose kernel has {}",
                feature.options()
            ),
            Some(Distribution::Wsl) => {
                format!("run a kernel that was built with {}", feature.options())
            }
            None => format!(
                "install the package with the kernel's module {modules} (Ubuntu: {extra}{raspi}; \
                 Debian: linux-image-{kernel}; OpenWrt: {}), {load}",
                feature.openwrt()
            ),
        }
    }

    /// What to say of a `modprobe` that did not help.
    pub fn modprobe_note(&self, failure: &str) -> String {
        match self.modules {
            Modules::Unseen if self.container => {
                format!("{failure}; the host's /lib/modules is not mounted into this container")
            }
            _ => failure.to_owned(),
        }
    }
}

fn by_kernel(kernel: &str) -> Option<Distribution> {
    let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| kernel.ends_with(suffix));
    let has = |parts: &[&str]| parts.iter().any(|part| kernel.contains(part));
    if ends(&["-raspi"]) {
        Some(Distribution::UbuntuRaspi)
    } else if has(&["-rpi-", "+rpt", "-v8+", "-v8-16k+", "-v7l+"]) {
        Some(Distribution::RaspberryPiOs)
    } else if has(&["microsoft"]) {
        Some(Distribution::Wsl)
    } else if has(&["-talos", "-flatcar", "-bottlerocket"]) {
        Some(Distribution::Image)
    } else if has(&[".amzn"]) {
        Some(Distribution::Amazon)
    } else if has(&[".el7", ".el8", ".el9", ".el10", ".fc"]) {
        Some(Distribution::RedHat)
    } else if ends(&[
        "-generic",
        "-aws",
        "-azure",
        "-gcp",
        "-kvm",
        "-oracle",
        "-lowlatency",
    ]) {
        Some(Distribution::Ubuntu)
    } else if has(&["-arch"]) {
        Some(Distribution::Arch)
    } else if is_debian(kernel) {
        Some(Distribution::Debian)
    } else if ends(&["-lts", "-virt"]) {
        Some(Distribution::Alpine)
    } else if ends(&["-default", "-default-base"]) {
        Some(Distribution::Suse)
    } else {
        None
    }
}

/// `6.1.0-50-amd64`, `6.12.107+deb13-cloud-arm64`: the last word is Debian's name of the architecture.
fn is_debian(kernel: &str) -> bool {
    let architectures = [
        "-amd64", "-arm64", "-armmp", "-686-pae", "-riscv64", "-ppc64el",
    ];
    architectures.iter().any(|name| kernel.ends_with(name))
}

fn by_os_release(text: &str) -> Option<Distribution> {
    let field = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches(['"', '\'']).to_owned())
    };
    let own = field("ID").unwrap_or_default();
    let like = field("ID_LIKE").unwrap_or_default();
    // Its own name first: what it is like has other packages of kernels now and then.
    std::iter::once(own.as_str())
        .chain(like.split_whitespace())
        .find_map(by_id)
}

fn by_id(id: &str) -> Option<Distribution> {
    Some(match id {
        "ubuntu" => Distribution::Ubuntu,
        "raspbian" => Distribution::RaspberryPiOs,
        "debian" => Distribution::Debian,
        "fedora" | "rhel" | "centos" | "rocky" | "almalinux" | "ol" => Distribution::RedHat,
        "amzn" => Distribution::Amazon,
        "sles" | "sle-micro" | "suse" | "opensuse" => Distribution::Suse,
        _ if id.starts_with("opensuse-") => Distribution::Suse,
        "alpine" => Distribution::Alpine,
        "arch" => Distribution::Arch,
        "openwrt" => Distribution::OpenWrt,
        "talos" | "flatcar" | "bottlerocket" | "cos" => Distribution::Image,
        _ => return None,
    })
}

/// What a process is confined by, as far as it bears on `bpf(2)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confines {
    /// Whether a seccomp filter is on (`Seccomp: 2` in `/proc/self/status`).
    pub seccomp: bool,
    /// The kernel's lockdown: the word in brackets in `/sys/kernel/security/lockdown`; `None` where there is none.
    pub lockdown: Option<String>,
    /// The limit of locked memory in bytes; `None` without one. Kernels before 5.11 count maps against it.
    pub memlock: Option<u64>,
    /// Whether this process is in a container.
    pub container: bool,
}

/// The errno of a refused `bpf(2)`, by its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// ENOSYS.
    Unknown,
    /// EPERM or EACCES.
    Forbidden,
    /// ENOMEM or E2BIG.
    NoRoom,
    /// Anything else.
    Other,
}

/// What to do about a kernel that refuses eBPF to a process that has the capabilities for it. `None` when nothing is known.
pub fn bpf_advice(refusal: Refusal, kernel: &str, confines: &Confines) -> Option<String> {
    let setting = |container: &str, service: &str| {
        let place = if confines.container {
            container
        } else {
            service
        };
        place.to_owned()
    };
    match refusal {
        Refusal::Unknown if confines.seccomp => Some(setting(
            "a seccomp profile may refuse bpf(2): set securityContext.privileged: true, or seccompProfile.type: Unconfined; else the kernel was \
             built without CONFIG_BPF_SYSCALL",
            "a seccomp filter may refuse bpf(2): take @bpf out of the unit's SystemCallFilter=; else the kernel was built without \
             CONFIG_BPF_SYSCALL",
        )),
        Refusal::Unknown => {
            Some("this kernel was built without eBPF (CONFIG_BPF_SYSCALL): take another".into())
        }
        Refusal::Forbidden => {
            let lockdown = confines.lockdown.as_deref();
            if lockdown.is_some_and(|mode| mode == "confidentiality") {
                return Some(
                    "the kernel is locked down for confidentiality: start it with lockdown=integrity"
                        .into(),
                );
            }
            if confines.memlock.is_some() && is_before_5_11(kernel) {
                return Some(setting(
                    "maps count against the limit of locked memory before Linux 5.11: add the capability SYS_RESOURCE, or set \
                     securityContext.privileged: true",
                    "maps count against the limit of locked memory before Linux 5.11: set LimitMEMLOCK=infinity in the unit",
                ));
            }
            confines.seccomp.then(|| {
                setting(
                    "a seccomp profile refuses bpf(2): set securityContext.privileged: true, or seccompProfile.type: Unconfined",
                    "a seccomp filter refuses bpf(2): take @bpf out of the unit's SystemCallFilter=",
                )
            })
        }
        Refusal::NoRoom => {
            Some("there is no memory for its maps: a smaller --bpf-flow-entries needs less".into())
        }
        Refusal::Other => None,
    }
}

fn is_before_5_11(kernel: &str) -> bool {
    version(kernel).is_some_and(|version| version < (5, 11))
}

fn is_before_5_6(kernel: &str) -> bool {
    version(kernel).is_some_and(|version| version < (5, 6))
}

/// The first two numbers of `uname -r`.
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The module directory, from the names in `/lib/modules` and the text of the running kernel's `modules.dep`.
pub fn modules(kernel: &str, names: &[String], dep: Option<&str>, feature: Feature) -> Modules {
    if !names.iter().any(|name| name == kernel) {
        let mut others = names.to_vec();
        others.sort_by_key(|name| numbers(name));
        return if others.is_empty() {
            Modules::Unseen
        } else {
            Modules::OtherKernels(others)
        };
    }
    let Some(dep) = dep else {
        return Modules::Without;
    };
    let files = dep.lines().filter_map(|line| line.split(':').next());
    let is_it = |path: &&str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        let (name, rest) = name.split_once(".ko").unwrap_or_default();
        feature
            .modules()
            .iter()
            .any(|module| name.replace('-', "_") == *module && !rest.starts_with('_'))
    };
    let found: Vec<&str> = files.filter(is_it).collect();
    match found.first() {
        // All of them, or the package is incomplete.
        Some(file) if found.len() >= feature.modules().len() => {
            Modules::With(format!("/lib/modules/{kernel}/{file}"))
        }
        _ => Modules::Without,
    }
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect()
}
