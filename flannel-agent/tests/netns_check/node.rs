//! Nodes that lack something: a privilege, eBPF, the vxlan module; and programs that meddle.

use std::fs;

use flannel_testkit::{
    AgentProcess, BpfCall, Capability, Confinement, privileged,
    process::{self, Finished},
    put_program,
};

use crate::{
    Findings, assert_healthy, assert_warns, check_with, ended, findings,
    rig::{PATIENCE, Rig, agent_binary},
};

/// Runs `check` on a node that seems to lack something, and gives its answer with the exit code.
fn check_confined(rig: &Rig, words: &[&str], confinement: &Confinement<'_>) -> (Findings, i32) {
    let mut args = vec!["check".to_owned(), "-ojson".to_owned()];
    args.extend(rig.common_flags(0));
    args.extend(words.iter().map(ToString::to_string));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut agent =
        AgentProcess::spawn_confined(rig.node(0), agent_binary(), &args, &[], confinement)
            .expect("run check");
    let code = agent.wait(PATIENCE).expect("check ends");
    let done = Finished {
        stdout: agent.log(),
        ..process::finish(&mut std::process::Command::new("true"), PATIENCE).expect("true")
    };
    (findings(&done), code)
}

#[test]
fn without_privileges_it_says_which_and_goes_on() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    rig.start_agent(1, &[]);
    rig.wait_ready(1);
    let (findings, code) = check_confined(
        &rig,
        &[],
        &Confinement {
            caps: Some(&[]),
            ..Confinement::default()
        },
    );
    assert_eq!(code, 1, "{findings:#?}");
    assert_eq!(ended(&findings, "FAIL"), ["capabilities"], "{findings:#?}");
    assert!(
        findings["capabilities"].1.contains("CAP_NET_ADMIN"),
        "{findings:#?}"
    );
    let (status, found, _) = &findings["underlay"];
    assert_eq!(status, "SKIP", "{findings:#?}");
    assert!(found.contains("CAP_NET_RAW"), "{found}");

    // What upstream's own manifest gives.
    let answer = check_confined(
        &rig,
        &[],
        &Confinement {
            caps: Some(&[Capability::NetAdmin, Capability::NetRaw]),
            ..Confinement::default()
        },
    );
    let (findings, code) = &answer;
    assert_eq!(*code, 0, "{findings:#?}");
    assert!(
        findings["capabilities"].1.contains("CAP_BPF"),
        "{findings:#?}"
    );
    assert_eq!(findings["underlay"].0, "OK", "{findings:#?}");
}

#[test]
fn a_kernel_without_ebpf_or_without_vxlan_is_told() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let no_bpf = Confinement {
        bpf: BpfCall::Fails(libc::EPERM),
        ..Confinement::default()
    };
    let (findings, code) = check_confined(&rig, &[], &no_bpf);
    assert_eq!(code, 0, "{findings:#?}");
    assert_eq!(findings["bpf"].0, "WARN", "{findings:#?}");
    let (findings, code) = check_confined(&rig, &["--datapath=bpf"], &no_bpf);
    assert_eq!(code, 1, "{findings:#?}");
    assert_eq!(ended(&findings, "FAIL"), ["bpf"], "{findings:#?}");
    let no_vxlan = Confinement {
        no_vxlan: true,
        ..Confinement::default()
    };
    let answer = check_confined(&rig, &[], &no_vxlan);
    assert_warns(&answer, "vxlan", "not supported", "modprobe -a vxlan", &[]);
    let (findings, code) = check_confined(&rig, &["--datapath=kernel"], &no_vxlan);
    assert_eq!(code, 1, "{findings:#?}");
    assert_eq!(ended(&findings, "FAIL"), ["vxlan"], "{findings:#?}");
}

#[test]
fn a_network_manager_that_was_told_nothing_is_named() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    // Another program under its name: only that it runs, and here, counts.
    let program = rig.node(0).run_dir.join("NetworkManager");
    put_program(&program, fs::read("/bin/sleep").expect("a program"));
    let mut command = rig.ns(0).command(&program);
    let mut child = command.arg("600").spawn().expect("start it");
    let answer = check_with(&rig, 0, &[&dir]);
    child.kill().expect("end it");
    child.wait().expect("it ends");
    assert_warns(
        &answer,
        "network-manager",
        "NetworkManager",
        "/etc/NetworkManager/conf.d/flannel.conf",
        &[],
    );
    assert_healthy(&check_with(&rig, 0, &[&dir]), &[]);
}
