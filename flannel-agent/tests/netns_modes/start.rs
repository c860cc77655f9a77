//! Starts that cannot succeed: the exit code, one line, and a node as it was.

use flannel_testkit::{Confinement, json::ip_json, privileged};

use crate::{
    NO_BPF,
    confined::complaints,
    rig::{NET_CONF, Rig},
};

const NO_CAPS: Confinement<'static> = Confinement {
    caps: Some(&[]),
    ..Confinement::FREE
};

struct Case {
    flags: &'static [&'static str],
    confinement: Confinement<'static>,
    net_conf: &'static str,
    code: i32,
    says: &'static [&'static str],
}

const CASES: [Case; 12] = [
    Case {
        flags: &["--datapath=bpf"],
        confinement: Confinement::UPSTREAM,
        net_conf: NET_CONF,
        code: 4,
        says: &["--datapath=bpf was asked for", "CAP_BPF is missing"],
    },
    Case {
        flags: &["--datapath=bpf"],
        confinement: NO_BPF,
        net_conf: NET_CONF,
        code: 4,
        says: &["--datapath=bpf was asked for", "built without eBPF"],
    },
    Case {
        flags: &["--bpf-device=veth"],
        confinement: Confinement::UPSTREAM,
        net_conf: NET_CONF,
        code: 4,
        says: &["--bpf-device=veth was asked for", "CAP_BPF is missing"],
    },
    Case {
        flags: &["--bpf-device=vxlan"],
        confinement: Confinement::NO_VXLAN,
        net_conf: NET_CONF,
        code: 4,
        says: &["create vxlan device flannel.1", "--bpf-device=vxlan"],
    },
    Case {
        flags: &["--datapath=kernel"],
        confinement: Confinement::NO_VXLAN,
        net_conf: NET_CONF,
        code: 4,
        says: &[
            "refuses vxlan devices",
            "--datapath=kernel",
            "modprobe vxlan",
        ],
    },
    Case {
        flags: &["--datapath=kernel", "--bpf-device=veth"],
        confinement: Confinement::FREE,
        net_conf: NET_CONF,
        code: 2,
        says: &["--bpf-device=veth", "--datapath=kernel"],
    },
    Case {
        flags: &[],
        confinement: NO_CAPS,
        net_conf: NET_CONF,
        code: 4,
        says: &["CAP_NET_ADMIN is missing"],
    },
    Case {
        flags: &["--datapath=fast"],
        confinement: Confinement::FREE,
        net_conf: NET_CONF,
        code: 2,
        says: &["'fast'", "--datapath"],
    },
    Case {
        flags: &["--bpf-attach=xdp"],
        confinement: Confinement::FREE,
        net_conf: NET_CONF,
        code: 2,
        says: &["'xdp'", "--bpf-attach"],
    },
    Case {
        flags: &[],
        confinement: Confinement::FREE,
        net_conf: r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777215}}"#,
        code: 2,
        says: &["flannel.16777215", "15 characters", "at most 9999999"],
    },
    Case {
        flags: &["--datapath=bpf"],
        confinement: Confinement::FREE,
        net_conf: r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","GBP":true}}"#,
        code: 4,
        says: &["--datapath=bpf was asked for", "GBP"],
    },
    Case {
        flags: &["--bpf-device=veth"],
        confinement: Confinement::FREE,
        net_conf: r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":1234567}}"#,
        code: 2,
        says: &["flannelp.1234567", "smaller VNI"],
    },
];

#[test]
fn a_start_that_cannot_succeed_says_why_in_one_line_and_changes_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    // Of IPv6, link-local addresses come up by themselves about now.
    let look = |rig: &Rig| {
        let ns = rig.ns(0);
        (
            ip_json(ns, &["-d", "link"]).expect("ip link"),
            ip_json(ns, &["-4", "route", "show", "table", "all"]).expect("ip route"),
            pins(rig),
        )
    };
    let before = look(&rig);
    for case in CASES {
        let what = format!("{:?} {:?}", case.flags, case.confinement);
        std::fs::write(rig.lease_dir().join("config"), case.net_conf).expect("net-conf");
        let (code, log) = rig.run_to_end(0, case.flags, &case.confinement);
        assert_eq!(code, case.code, "{what}: {log}");
        let said = complaints(&log);
        assert_eq!(said.len(), 1, "{what}: {log}");
        for needle in case.says {
            assert!(
                said[0].contains(needle),
                "{what}: no {needle:?} in {said:?}"
            );
        }
        assert_eq!(look(&rig), before, "{what}");
        assert!(!rig.state_file(0).exists(), "{what}");
    }
}

#[test]
fn another_vxlan_device_with_our_vni_is_left_alone() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.ns(0)
        .ip("link add other0 type vxlan id 1 dev eth0 dstport 8472 local 192.168.77.11 nolearning")
        .expect("somebody's device");
    let before = ip_json(rig.ns(0), &["-d", "link"]).expect("ip link");
    let (code, log) = rig.run_to_end(0, &[], &Confinement::FREE);
    assert_eq!(code, 2, "{log}");
    let said = complaints(&log);
    assert_eq!(said.len(), 1, "{log}");
    assert!(
        said[0].contains("another vxlan device has the same VNI and port"),
        "{log}"
    );
    assert_eq!(
        ip_json(rig.ns(0), &["-d", "link"]).expect("ip link"),
        before
    );
    assert_eq!(pins(&rig), Vec::<String>::new());
}

/// What this node's agents have pinned, whatever their VNI.
fn pins(rig: &Rig) -> Vec<String> {
    let cookie = rig.ns(0).cookie().expect("the namespace's cookie");
    let entries = std::fs::read_dir(flannel_core::mark::BPFFS_ROOT);
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            flannel_core::mark::parse_instance_dir(name).is_some_and(|(owner, _)| owner == cookie)
        })
        .collect()
}
