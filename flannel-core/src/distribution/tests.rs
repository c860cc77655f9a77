use super::*;

fn host(kernel: &str, os_release: Option<&str>) -> Host {
    Host {
        kernel: kernel.into(),
        os_release: os_release.map(str::to_owned),
        ..Host::default()
    }
}

#[test]
fn the_kernels_name_tells_the_distribution() {
    use Distribution as D;
    for (kernel, is) in [
        ("5.15.0-1049-raspi", Some(D::UbuntuRaspi)),
        ("6.8.0-45-generic", Some(D::Ubuntu)),
        ("5.15.0-1031-aws", Some(D::Ubuntu)),
        ("6.1.0-rpi7-rpi-v8", Some(D::RaspberryPiOs)),
        ("6.12.25+rpt-rpi-2712", Some(D::RaspberryPiOs)),
        ("5.10.103-v8+", Some(D::RaspberryPiOs)),
        ("6.1.0-50-cloud-amd64", Some(D::Debian)),
        ("6.12.107+deb13-arm64", Some(D::Debian)),
        ("5.14.0-427.el9.x86_64", Some(D::RedHat)),
        ("6.8.5-301.fc40.aarch64", Some(D::RedHat)),
        ("6.1.109-118.189.amzn2023.x86_64", Some(D::Amazon)),
        ("6.4.0-150600.23-default", Some(D::Suse)),
        ("6.6.52-0-lts", Some(D::Alpine)),
        ("6.6.52-0-virt", Some(D::Alpine)),
        ("6.11.1-arch1-1", Some(D::Arch)),
        ("6.6.54-talos", Some(D::Image)),
        ("6.6.48-flatcar", Some(D::Image)),
        ("5.15.153.1-microsoft-standard-WSL2", Some(D::Wsl)),
        ("6.6.54", None),
    ] {
        assert_eq!(host(kernel, None).distribution(), is, "{kernel}");
    }
}

#[test]
fn os_release_tells_it_where_the_kernel_does_not() {
    use Distribution as D;
    for (text, is) in [
        (
            "NAME=\"OpenWrt\"\nID=\"openwrt\"\nID_LIKE=\"lede openwrt\"\n",
            Some(D::OpenWrt),
        ),
        ("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", Some(D::Ubuntu)),
        (
            "ID='opensuse-leap'\nID_LIKE=\"suse opensuse\"\n",
            Some(D::Suse),
        ),
        ("ID=raspbian\nID_LIKE=debian\n", Some(D::RaspberryPiOs)),
        ("VERSION_ID=3\n", None),
        ("", None),
        ("ID", None),
    ] {
        assert_eq!(host("6.6.54", Some(text)).distribution(), is, "{text:?}");
    }
    // A container's image is never asked against the kernel.
    let debian = Some("ID=debian\n");
    assert_eq!(
        host("6.8.0-1013-raspi", debian).distribution(),
        Some(D::UbuntuRaspi)
    );
}

#[test]
fn each_distribution_is_told_its_package() {
    for (kernel, os_release, needle) in [
        (
            "5.15.0-1049-raspi",
            None,
            "install linux-modules-extra-raspi, then",
        ),
        (
            "6.8.0-45-generic",
            None,
            "install linux-modules-extra-6.8.0-45-generic, then",
        ),
        (
            "6.1.0-50-cloud-amd64",
            None,
            "--reinstall linux-image-6.1.0-50-cloud-amd64",
        ),
        ("6.6.54", Some("ID=openwrt"), "install kmod-vxlan"),
        ("6.1.0-rpi7-rpi-v8", None, "linux-image-rpi-"),
        (
            "5.14.0-427.el9.x86_64",
            None,
            "kernel-modules-extra-5.14.0-427.el9.x86_64",
        ),
        (
            "6.4.0-150600.23-default",
            None,
            "kernel-default in place of kernel-default-base",
        ),
        ("6.6.54-talos", None, "CONFIG_VXLAN"),
        ("5.15.153.1-microsoft-standard-WSL2", None, "CONFIG_VXLAN"),
        ("6.6.54", None, "linux-modules-extra-raspi"),
    ] {
        let said = host(kernel, os_release).advice(Feature::Vxlan);
        assert!(said.contains(needle), "{kernel}: no {needle:?} in {said:?}");
        assert!(!said.contains('\n'), "{said:?}");
    }
    let said = host("6.6.54", Some("ID=openwrt")).advice(Feature::Clsact);
    assert_eq!(said, "install kmod-sched-core and kmod-sched-bpf");
    let said = host("6.8.0-45-generic", None).advice(Feature::Clsact);
    assert!(said.contains("modprobe -a sch_ingress cls_bpf"), "{said}");
}

#[test]
fn what_is_in_the_module_directory_comes_first() {
    let names = |names: &[&str]| {
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    let kernel = "6.1.0-9-arm64";
    let dep = "kernel/drivers/net/vxlan/vxlan.ko.xz: kernel/net/ipv4/udp_tunnel.ko.xz\nkernel/net/sched/cls_bpf.ko:\n";
    let at = |names: &[String], dep, feature| modules(kernel, names, dep, feature);
    assert_eq!(at(&[], None, Feature::Vxlan), Modules::Unseen);
    assert_eq!(
        at(
            &names(&["6.1.0-10-arm64", "6.1.0-2-arm64"]),
            None,
            Feature::Vxlan
        ),
        Modules::OtherKernels(names(&["6.1.0-2-arm64", "6.1.0-10-arm64"]))
    );
    let here = names(&[kernel, "6.1.0-10-arm64"]);
    let file = format!("/lib/modules/{kernel}/kernel/drivers/net/vxlan/vxlan.ko.xz");
    assert_eq!(
        at(&here, Some(dep), Feature::Vxlan),
        Modules::With(file.clone())
    );
    assert_eq!(at(&here, Some(""), Feature::Vxlan), Modules::Without);
    assert_eq!(at(&here, None, Feature::Vxlan), Modules::Without);
    // One of two is not enough.
    assert_eq!(at(&here, Some(dep), Feature::Clsact), Modules::Without);

    let mut host = host(kernel, None);
    host.modules = Modules::OtherKernels(names(&["6.1.0-10-arm64"]));
    let said = host.advice(Feature::Vxlan);
    assert!(
        said.contains("restart the node") && said.contains("6.1.0-10-arm64"),
        "{said}"
    );
    host.modules = Modules::With(file.clone());
    assert!(host.advice(Feature::Vxlan).contains(&file));
    host.modules = Modules::Without;
    assert!(host.advice(Feature::Vxlan).contains("--reinstall"));
}

#[test]
fn a_container_without_the_module_directory_is_told() {
    let mut host = host("6.6.54", None);
    assert_eq!(host.modprobe_note("install modprobe"), "install modprobe");
    host.container = true;
    assert!(
        host.modprobe_note("install modprobe")
            .contains("not mounted into this container")
    );
    host.modules = Modules::Without;
    assert_eq!(host.modprobe_note("x"), "x");
}

#[test]
fn a_refused_bpf_call_has_its_own_advice() {
    let plain = Confines::default();
    let pod = Confines {
        seccomp: true,
        container: true,
        ..plain.clone()
    };
    let locked = |mode: &str| Confines {
        lockdown: Some(mode.into()),
        ..plain.clone()
    };
    let limited = Confines {
        memlock: Some(65_536),
        ..plain.clone()
    };
    for (refusal, kernel, confines, needle) in [
        (Refusal::Unknown, "6.1.0", &plain, "CONFIG_BPF_SYSCALL"),
        (Refusal::Unknown, "6.1.0", &pod, "seccompProfile"),
        (Refusal::Forbidden, "6.1.0", &pod, "seccompProfile"),
        (
            Refusal::Forbidden,
            "6.1.0",
            &locked("confidentiality"),
            "lockdown=integrity",
        ),
        (
            Refusal::Forbidden,
            "5.10.0-32-amd64",
            &limited,
            "LimitMEMLOCK",
        ),
        (Refusal::NoRoom, "6.1.0", &plain, "--bpf-flow-entries"),
    ] {
        let said = bpf_advice(refusal, kernel, confines).expect("an advice");
        assert!(said.contains(needle), "{refusal:?} {confines:?}: {said}");
    }
    for confines in [&plain, &locked("integrity"), &locked("none"), &limited] {
        assert_eq!(
            bpf_advice(Refusal::Forbidden, "5.11.0", confines),
            None,
            "{confines:?}"
        );
    }
    assert_eq!(bpf_advice(Refusal::Other, "6.1.0", &pod), None);
}

#[test]
fn wireguard_is_where_each_distribution_has_it() {
    let advice = |kernel: &str| {
        let host = Host {
            kernel: kernel.to_owned(),
            ..Host::default()
        };
        host.advice(Feature::Wireguard)
    };
    for (kernel, wanted) in [
        (
            "6.8.0-45-generic",
            "install linux-modules-6.8.0-45-generic, ",
        ),
        (
            "6.8.0-1013-raspi",
            "install linux-modules-6.8.0-1013-raspi, ",
        ),
        ("4.18.0-553.el8.x86_64", "older than WireGuard"),
        (
            "5.14.0-427.el9.x86_64",
            "kernel-modules-5.14.0-427.el9.x86_64",
        ),
        ("6.1.0-28-amd64", "Debian's kernels have it"),
        ("6.6.63", "OpenWrt: kmod-wireguard"),
        ("6.1.100-talos", "CONFIG_WIREGUARD"),
    ] {
        let advice = advice(kernel);
        assert!(advice.contains(wanted), "{kernel}: {advice}");
        assert!(!advice.contains("-extra-raspi"), "{kernel}: {advice}");
    }
}
