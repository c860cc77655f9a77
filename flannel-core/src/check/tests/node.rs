//! Kernel, privileges, settings and the daemon.

use super::*;

#[test]
fn kernel_and_privileges() {
    use Status::{Fail, Ok, Skip, Warn};
    assert_only("kernel", Warn, &["4.19.0", "5.10"], |seen| {
        seen.node.kernel = "4.19.0-27-amd64".into();
    });
    assert_only("kernel", Ok, &["5.10.223"], |seen| {
        seen.node.kernel = "5.10.223".into();
    });
    assert_only("btf", Warn, &["CONFIG_DEBUG_INFO_BTF"], |seen| {
        seen.node.btf = false;
    });
    assert_only("btf", Skip, &[], |seen| {
        seen.node.btf = false;
        seen.node.wants = Wants::Kernel;
    });
    assert_only("capabilities", Fail, &["CAP_NET_ADMIN"], |seen| {
        seen.node.capabilities.net_admin = false;
    });
    let no_bpf = |wants| {
        move |seen: &mut Observations| {
            seen.node.capabilities.missing_for_bpf = Some("CAP_BPF is missing".into());
            seen.node.wants = wants;
        }
    };
    assert_only(
        "capabilities",
        Warn,
        &["CAP_BPF", "kernel's device"],
        no_bpf(Wants::Auto),
    );
    assert_only(
        "capabilities",
        Fail,
        &["--datapath=bpf"],
        no_bpf(Wants::Bpf),
    );
    assert_only(
        "capabilities",
        Ok,
        &["--datapath=kernel"],
        no_bpf(Wants::Kernel),
    );
    assert_only("bpf", Warn, &["ENOSYS", "CONFIG_BPF_SYSCALL"], |seen| {
        seen.node.bpf = Err("ENOSYS".into());
    });
    assert_only("bpffs", Ok, &["mounts it"], |seen| {
        seen.node.bpffs = Bpffs::Mountable;
    });
    assert_only("bpffs", Warn, &["mount -t bpf"], |seen| {
        seen.node.bpffs = Bpffs::Missing("no".into());
    });
    assert_only("hooks", Ok, &["clsact", "6.6"], |seen| {
        seen.node.hooks = "clsact";
    });
}

#[test]
fn a_missing_vxlan_module_names_the_package() {
    use Status::{Fail, Ok, Skip, Warn};
    let refused = |kernel: &'static str| {
        move |seen: &mut Observations| {
            seen.node.vxlan = Vxlan::Refused("Operation not supported".into());
            seen.node.host.kernel = kernel.into();
        }
    };
    assert_only(
        "vxlan",
        Warn,
        &["install linux-modules-extra-raspi,", "eBPF alone"],
        refused("6.8.0-1013-raspi"),
    );
    assert_only(
        "vxlan",
        Warn,
        &["linux-modules-extra-6.8.0-45-generic"],
        refused("6.8.0-45-generic"),
    );
    assert_only(
        "vxlan",
        Warn,
        &["modprobe -a vxlan", "kmod-vxlan"],
        refused("6.12.0"),
    );
    assert_only("vxlan", Fail, &["Operation not supported"], |seen| {
        refused("6.12.0")(seen);
        seen.node.wants = Wants::Kernel;
    });
    assert_only("vxlan", Ok, &["vxlan.ko"], |seen| {
        seen.node.vxlan = Vxlan::Loadable("/lib/modules/x/vxlan.ko.xz".into());
    });
    assert_only("vxlan", Skip, &["EPERM"], |seen| {
        seen.node.vxlan = Vxlan::Untried("EPERM".into());
    });
}

#[test]
fn settings() {
    use Status::{Fail, Ok, Skip, Warn};
    assert_only(
        "ip-forward",
        Fail,
        &["sysctl -w net.ipv4.ip_forward=1"],
        |seen| seen.node.ip_forward = Some(false),
    );
    assert_only("ip-forward", Skip, &[], |seen| seen.node.ip_forward = None);
    assert_only(
        "rp-filter",
        Warn,
        &["10.0.0.2 by eth1", "conf.eth0.rp_filter=2"],
        |seen| {
            seen.node.reverse.elsewhere = vec!["10.0.0.2 by eth1".into()];
        },
    );
    assert_only("rp-filter", Ok, &["eth0 2"], |seen| {
        seen.node.reverse.elsewhere = vec!["10.0.0.2 by eth1".into()];
        seen.node.reverse.uplink = Some(ReverseFilter {
            interface: "eth0".into(),
            value: 2,
        });
    });
    let mut seen = healthy();
    conf(
        &mut seen,
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#,
    );
    seen.node.reverse.tunnel = Some(ReverseFilter {
        interface: "flannel.1".into(),
        value: 1,
    });
    let ended = statuses(&judge(&seen));
    assert_eq!((ended["rp-filter"], ended["network-config"]), (Warn, Ok));
    assert_only("rp-filter", Skip, &[], |seen| {
        seen.node.reverse = Reverse::default();
    });
    let kube_proxy = ":KUBE-SERVICES - [0:0]\n";
    for (module, word) in [(None, "not loaded"), (Some(false), "= 0")] {
        assert_only("br-netfilter", Ok, &[], |seen| seen.node.bridge_nf = module);
        assert_only(
            "br-netfilter",
            Warn,
            &[word, "modprobe br_netfilter"],
            |seen| {
                seen.node.bridge_nf = module;
                seen.rules.compat = Some(format!("*nat\n{kube_proxy}COMMIT\n"));
            },
        );
    }
    assert_only("clock", Warn, &["1000 s behind", "chrony"], |seen| {
        seen.node.clock.newest = Some((1_800_001_000, "/x".into()));
    });
    let manager = |name, leaves_alone| Manager { name, leaves_alone };
    assert_only("network-manager", Ok, &["leaves"], |seen| {
        seen.node.managers = vec![manager("NetworkManager", true)];
    });
    assert_only(
        "network-manager",
        Warn,
        &[
            "/etc/NetworkManager/conf.d/flannel.conf",
            "unmanaged-devices",
        ],
        |seen| {
            seen.node.managers = vec![manager("NetworkManager", false)];
        },
    );
    assert_only(
        "network-manager",
        Warn,
        &["10-flannel.link", "MACAddressPolicy=none"],
        |seen| {
            seen.node.managers = vec![
                manager("systemd-networkd", false),
                manager("NetworkManager", true),
            ];
        },
    );
}

#[test]
fn the_daemon() {
    use Status::{Ok, Skip, Warn};
    assert_only("agent", Warn, &["not running", "systemctl start"], |seen| {
        seen.agent.pid = None;
    });
    assert_only("agent", Skip, &["never"], |seen| {
        seen.agent = Agent::default();
    });
    assert_only("agent", Warn, &["0.0.9", "restart"], |seen| {
        seen.agent.version = Some("0.0.9".into());
    });
    assert_only("agent", Warn, &["disk full", "1 more", "status"], |seen| {
        seen.agent.problems = vec!["disk full".into(), "other".into()];
    });
    assert_only("datapath", Warn, &["no BTF"], |seen| {
        seen.agent.mode = Some("kernel");
        seen.agent.reason = Some("no BTF".into());
    });
    assert_only("datapath", Ok, &["as --datapath=kernel asks"], |seen| {
        seen.agent.mode = Some("kernel");
        seen.agent.reason = Some("--datapath=kernel".into());
    });
    assert_only("datapath", Warn, &["to_overlay"], |seen| {
        let attached = seen.overlay.attached.as_mut().expect("attached");
        attached.missing = vec!["to_overlay".into()];
    });
    assert_only("datapath", Skip, &[], |seen| seen.agent.mode = None);
}

#[test]
fn the_rung_is_named_and_what_is_out_of_reach() {
    use crate::features::{Course, Feature, Finding, Findings, Wishes, climb};
    assert_only("rung", Status::Ok, &["L2", "not L3: only with"], |_| {});
    let ladder = |findings: &[(Feature, Finding)]| {
        let findings: Findings = findings.iter().cloned().collect();
        Some(climb(&findings, &Wishes::default(), &Course::default()))
    };
    let no_bpf = (Feature::Bpf, Finding::absent("no such call"));
    let no_vxlan = (Feature::Vxlan, Finding::absent("no module"));
    assert_only(
        "rung",
        Status::Ok,
        &["L0", "not L1: bpf: no such call"],
        |seen| {
            seen.node.ladder = ladder(std::slice::from_ref(&no_bpf));
        },
    );
    assert_only(
        "rung",
        Status::Fail,
        &["no such call", "no module"],
        |seen| {
            seen.node.ladder = ladder(&[no_bpf.clone(), no_vxlan.clone()]);
        },
    );
    assert_only("rung", Status::Skip, &["flannel-agent features"], |seen| {
        seen.node.ladder = None;
    });
}
