//! Every combination of what a kernel may lack and what a process may not do: the overlay works as well as it can, says once why
//! it is no better, and a node on which it cannot work at all is left as it was.

#[path = "netns_modes/attach.rs"]
mod attach;
#[path = "rig/confined.rs"]
mod confined;
mod rig;
#[path = "netns_modes/start.rs"]
mod start;
#[path = "netns_modes/veth.rs"]
mod veth;

use std::{path::PathBuf, time::Duration};

use confined::complaints;
use flannel_testkit::{
    BpfCall, Capability, Confinement, Netns, eventually,
    json::{ip_json, link},
    privileged, put_program,
    traffic::{self, Amount, FloodPing, TcpFlow, TcpStats},
};
use rig::{
    DEVICE, PATIENCE, Rig, agent_binary,
    hooks::{Hooks, hooks},
    list,
};
use serde_json::Value;

/// A kernel built without eBPF.
const NO_BPF: Confinement<'static> = Confinement {
    caps: None,
    bpf: BpfCall::Fails(libc::ENOSYS),
    no_vxlan: false,
};
/// Whoever touches eBPF does not live to tell.
const BPF_KILLS: Confinement<'static> = Confinement {
    caps: None,
    bpf: BpfCall::Kills,
    no_vxlan: false,
};

/// Sizes around every edge: one byte, the largest unfragmented datagram of IPv6 and of IPv4, one more, many fragments.
const SIZES: [usize; 8] = [1, 1382, 1383, 1400, 1422, 1423, 9000, 60_000];

/// Ping, datagrams of all sizes and streams in both directions between the first pods of two nodes.
#[track_caller]
fn exchange(rig: &Rig, a: usize, b: usize) {
    for (from, to) in [(a, b), (b, a)] {
        let (client, server) = (rig.pod(from), rig.pod(to));
        let to_ip = server.address(rig.family());
        let stats = traffic::ping(&client.ns, to_ip, 20, Duration::from_millis(5))
            .unwrap_or_else(|error| panic!("ping from {from} to {to}: {error:#}"));
        assert_eq!(stats.lost, 0, "ping from {from} to {to}: {stats:?}");
        traffic::udp_echo(&server.ns, to_ip, &client.ns, &SIZES)
            .unwrap_or_else(|error| panic!("UDP from {from} to {to}: {error:#}"));
        stream(rig, from, to, Amount::Bytes(20 << 20));
    }
}

/// One stream between the first pods of two nodes.
#[track_caller]
fn stream(rig: &Rig, from: usize, to: usize, amount: Amount) -> TcpStats {
    let (client, server) = (rig.pod(from), rig.pod(to));
    let ip = server.address(rig.family());
    traffic::tcp_transfer(&server.ns, ip, &client.ns, amount)
        .unwrap_or_else(|error| panic!("TCP from {from} to {to}: {error:#}"))
}

/// The kind of the node's tunnel device, as `ip` has it.
#[track_caller]
fn device_kind(rig: &Rig, node: usize) -> String {
    let link = link(rig.ns(node), &rig.device()).expect("the tunnel device");
    link["linkinfo"]["info_kind"]
        .as_str()
        .expect("a kind")
        .to_owned()
}

/// Our filters in a namespace: device, hook and program of each.
#[track_caller]
fn filters(ns: &Netns) -> Vec<(String, String, u64)> {
    let mut all = Vec::new();
    for (device, hook) in [(DEVICE, "egress"), ("eth0", "ingress")] {
        let said = ns.exec(["tc", "-j", "filter", "show", "dev", device, hook]);
        let said: Value = said.map_or(Value::Null, |said| {
            serde_json::from_str(&said).unwrap_or_default()
        });
        for filter in list(&said).iter().filter(|f| f["kind"] == "bpf") {
            if let Some(id) = filter["options"]["prog"]["id"].as_u64() {
                all.push((device.to_owned(), hook.to_owned(), id));
            }
        }
    }
    all
}

/// Waits until the agent's process of this start has put everything in place.
#[track_caller]
fn restart(rig: &mut Rig, node: usize, flags: &[&str], confinement: &Confinement<'_>) {
    rig.kill_agent(node);
    rig.start_confined(node, flags, confinement);
    rig.wait_ready(node);
}

/// Gives the node's devices the qdisc that filters hang on. The kernel takes a device's transmit queues out of use while it
/// adds one (`qdisc_graft`), and loses what is sent meanwhile, whoever asks for it.
#[track_caller]
fn add_clsact(rig: &Rig, node: usize) {
    for device in ["eth0", DEVICE] {
        rig.ns(node)
            .exec(["tc", "qdisc", "add", "dev", device, "clsact"])
            .expect("a clsact qdisc");
    }
}

/// A rig whose node 1 is confined and whose node 0 is not.
fn beside_a_bpf_node(flags: &[&str], confinement: &Confinement<'_>) -> Rig {
    let mut rig = Rig::new(2);
    rig.start_agent(0, &[]);
    rig.start_confined(1, flags, confinement);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig
}

/// The node works on the kernel's device alone, has nothing of eBPF, and says why in `status`.
#[track_caller]
fn assert_kernel_only(rig: &Rig, node: usize, reason: &str) {
    assert_eq!(device_kind(rig, node), "vxlan");
    assert!(!rig.instance(node).exists(), "pins on the node");
    assert_eq!(hooks(rig.ns(node)), Hooks::default());
    let status = rig.status(node);
    assert_eq!(status["ok"], true, "{status}");
    assert_eq!(status["datapath"]["mode"], "kernel", "{status}");
    let said = status["datapath"]["reason"].as_str().expect("a reason");
    assert!(said.contains(reason), "{said:?} does not say {reason:?}");
}

/// Exactly one warning, and it says why.
#[track_caller]
fn assert_one_warning(rig: &mut Rig, node: usize, needles: &[&str]) {
    let log = rig.agent(node).log();
    let said = complaints(&log);
    assert_eq!(said.len(), 1, "{log}");
    assert!(said[0].contains(" WARN "), "{log}");
    for needle in needles {
        assert!(said[0].contains(needle), "no {needle:?} in {:?}", said[0]);
    }
}

#[test]
fn flannels_own_capabilities_are_enough_for_the_kernels_device() {
    if !privileged() {
        return;
    }
    let mut rig = beside_a_bpf_node(&[], &Confinement::UPSTREAM);
    exchange(&rig, 0, 1);
    assert_kernel_only(&rig, 1, "CAP_BPF");
    assert_one_warning(&mut rig, 1, &["CAP_BPF is missing", "without eBPF"]);
    assert_eq!(rig.status(0)["datapath"]["mode"], "bpf");
}

/// What the systemd unit leaves to the agent is enough for everything.
#[test]
fn the_units_capabilities_are_enough_for_ebpf_and_rules() {
    if !privileged() {
        return;
    }
    let unit = include_str!("../../deploy/systemd/flannel-agent.service");
    let caps: Vec<Capability> = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .expect("the setting")
        .split(' ')
        .map(|name| match name {
            "CAP_NET_ADMIN" => Capability::NetAdmin,
            "CAP_NET_RAW" => Capability::NetRaw,
            "CAP_BPF" => Capability::Bpf,
            "CAP_PERFMON" => Capability::Perfmon,
            "CAP_SYS_MODULE" => Capability::SysModule,
            "CAP_DAC_READ_SEARCH" => Capability::DacReadSearch,
            other => panic!("{other}: add it here"),
        })
        .collect();
    let confinement = Confinement {
        caps: Some(&caps),
        ..Confinement::default()
    };
    let mut rig = beside_a_bpf_node(&["--ip-masq"], &confinement);
    exchange(&rig, 0, 1);
    let status = rig.status_is_ok(1);
    assert_eq!(status["datapath"]["mode"], "bpf");
    assert_eq!(status["fast_path"]["mode"], "established");
    let rules = rig.ns(1).exec(["iptables-save"]).unwrap();
    assert!(rules.contains("-A FLANNEL-POSTRTG") && rules.contains("-A FLANNEL-FWD"));
    assert_eq!(complaints(&rig.agent(1).log()), Vec::<&str>::new());
}

#[test]
fn a_kernel_without_ebpf_carries_the_overlay_alone() {
    if !privileged() {
        return;
    }
    let mut rig = beside_a_bpf_node(&[], &NO_BPF);
    exchange(&rig, 0, 1);
    assert_kernel_only(&rig, 1, "this kernel was built without eBPF");
    assert_one_warning(&mut rig, 1, &["built without eBPF"]);
}

#[test]
fn with_datapath_kernel_no_bpf_object_is_touched() {
    if !privileged() {
        return;
    }
    let mut rig = beside_a_bpf_node(&["--datapath=kernel"], &BPF_KILLS);
    exchange(&rig, 0, 1);
    assert_kernel_only(&rig, 1, "--datapath=kernel");
    assert_eq!(complaints(&rig.agent(1).log()), Vec::<&str>::new());
    // A change of the cluster and a restart make no difference.
    rig.put_lease(
        "10.244.9.0/24".parse().expect("a subnet"),
        "192.168.77.99".parse().expect("an address"),
        "02:00:00:00:09:09",
    );
    eventually(PATIENCE, "node 1 knows the newcomer", || rig.converged(1));
    restart(&mut rig, 1, &["--datapath=kernel"], &BPF_KILLS);
    exchange(&rig, 0, 1);
    assert!(rig.agent(1).is_running());
    assert!(!rig.instance(1).exists());
}

/// A program that starts the agent where no bpf file system is mounted, out of everybody else's sight.
fn without_bpffs(rig: &Rig) -> PathBuf {
    let script = rig.node(0).run_dir.join("flannel-agent.sh");
    let agent = agent_binary().display();
    let text = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'umount /sys/fs/bpf && exec {agent} \"$@\"' sh \"$@\"\n"
    );
    put_program(&script, text);
    script
}

#[test]
fn without_a_bpf_file_system_one_is_mounted_where_ebpf_is_wanted() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    let binary = without_bpffs(&rig);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.add_pod(0);
    let mut first = true;
    for (flags, mode, mounts) in [
        (&["--datapath=kernel"][..], "kernel", false),
        (&["--datapath=bpf"], "bpf", true),
    ] {
        rig.start_binary(1, &binary, flags, &[]);
        rig.wait_ready(1);
        if std::mem::take(&mut first) {
            rig.add_pod(1);
        }
        eventually(PATIENCE, "the pods reach each other", || rig.ping(0, 1));
        assert_eq!(rig.state(1)["datapath"]["mode"], mode);
        let log = rig.agent(1).log();
        let said = log.contains("mounted the bpf file system");
        assert_eq!(said, mounts, "{log}");
        assert_eq!(complaints(&log), Vec::<&str>::new());
        // In our own sight nothing has changed.
        assert!(!rig.instance(1).exists());
        rig.kill_agent(1);
    }
}

#[test]
fn the_trick_that_kills_works() {
    if !privileged() {
        return;
    }
    // Without this the test above proves nothing.
    let mut rig = Rig::new(1);
    let (code, _) = rig.run_to_end(0, &[], &BPF_KILLS);
    assert_eq!(code, 128 + libc::SIGSYS);
}

#[test]
fn neither_vxlan_nor_ebpf_ends_with_both_causes_and_nothing_changed() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    let look = |rig: &Rig| {
        let ns = rig.ns(0);
        [
            &["-d", "link"][..],
            // Of IPv6, link-local addresses come up by themselves about now.
            &["-4", "addr"],
            &["-4", "route", "show", "table", "all"],
            &["neigh", "show", "nud", "permanent"],
        ]
        .map(|what| ip_json(ns, what).expect("ip"))
    };
    let before = look(&rig);
    for (confinement, bpf) in [
        (
            Confinement {
                no_vxlan: true,
                ..NO_BPF
            },
            "built without eBPF",
        ),
        (
            Confinement {
                no_vxlan: true,
                ..Confinement::UPSTREAM
            },
            "CAP_BPF is missing",
        ),
    ] {
        let (code, log) = rig.run_to_end(0, &[], &confinement);
        assert_eq!(code, 4, "{log}");
        let said = complaints(&log);
        assert_eq!(said.len(), 1, "{log}");
        for needle in [
            "refuses vxlan devices",
            bpf,
            // What it said, and what to do, which is another thing on every distribution.
            "modprobe vxlan: ",
        ] {
            assert!(said[0].contains(needle), "no {needle:?} in {:?}", said[0]);
        }
        assert_eq!(look(&rig), before);
        assert!(!rig.instance(0).exists());
        assert!(!rig.state_file(0).exists());
    }
}

#[test]
fn a_node_on_ebpf_alone_goes_on_when_its_next_agent_may_not_use_ebpf() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    rig.start_confined(0, &[], &Confinement::NO_VXLAN);
    rig.start_agent(1, &[]);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig.kill_agent(0);
    let flood =
        FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, Duration::from_millis(1)).expect("a flood");
    let (code, log) = rig.run_to_end(
        0,
        &[],
        &Confinement {
            no_vxlan: true,
            ..Confinement::UPSTREAM
        },
    );
    assert_eq!(code, 4, "{log}");
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "{stats:?}");
    assert_eq!(device_kind(&rig, 0), "veth");
}

#[test]
fn changing_the_rung_at_restart_loses_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    add_clsact(&rig, 0);
    let steps: [&[&str]; 5] = [
        &["--datapath=kernel"],
        &[],
        &["--bpf-attach=clsact"],
        &["--datapath=kernel"],
        &["--datapath=bpf"],
    ];
    let flood =
        FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, Duration::from_millis(1)).expect("a flood");
    let (client, server) = (rig.pod(0).clone(), rig.pod(1).clone());
    let stream =
        TcpFlow::start_paced(&server.ns, server.ip, &client.ns, 100 << 20).expect("a stream");
    for flags in steps {
        rig.kill_agent(0);
        rig.start_agent(0, flags);
        rig.wait_ready(0);
        let kernel = flags.contains(&"--datapath=kernel");
        assert_eq!(rig.instance(0).exists(), !kernel, "{flags:?}");
        let hooks = hooks(rig.ns(0));
        match flags {
            _ if kernel => assert_eq!(hooks, Hooks::default()),
            ["--bpf-attach=clsact"] => assert!(hooks.are("clsact").is_ok(), "{hooks:?}"),
            _ => assert!(hooks.are("tcx").is_ok(), "{hooks:?}"),
        }
        let before = rig.device_counters(0);
        let mode = if kernel { "kernel" } else { "bpf" };
        assert_eq!(rig.status(0)["datapath"]["mode"], mode);
        if kernel {
            eventually(PATIENCE, "the kernel's device carries packets", || {
                let now = rig.device_counters(0);
                (now.encap > before.encap)
                    .then_some(())
                    .ok_or("it does not")
            });
        } else {
            let before = rig.counters(0);
            eventually(PATIENCE, "eBPF carries packets", || {
                let now = rig.counters(0);
                let both = now.encap > before.encap && now.decap > before.decap;
                both.then_some(()).ok_or("it does not")
            });
        }
    }
    let streamed = stream.stop().expect("the stream");
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "{stats:?}");
    assert_eq!(stats.duplicates, 0, "{stats:?}");
    assert_eq!(streamed.lost, 0, "{streamed:?}");
}
