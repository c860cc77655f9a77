//! The endpoints of a running agent, asked with raw HTTP.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use flannel_testkit::{Netns, Subnet, eventually, privileged, process};

use super::{configure, unconfigured};
use crate::rig::{DEVICE, NET_CONF, PATIENCE, Rig};

const PORT: u16 = 8081;
const FLAG: &str = "--healthz-port=8081";

/// The status code and the body.
type Answer = (u16, String);

fn ask(ns: &Netns, method: &str, path: &str) -> Result<Answer, String> {
    let address = SocketAddr::from(([127, 0, 0, 1], PORT));
    let mut stream = ns
        .try_run(|| TcpStream::connect_timeout(&address, PATIENCE))
        .expect("enter the namespace")
        .map_err(|error| format!("connect: {error}"))?;
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let request = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .map_err(|error| error.to_string())?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(text.clone())?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.ok_or(head.to_owned())?, body.to_owned()))
}

#[track_caller]
fn get(rig: &Rig, path: &str) -> Answer {
    ask(rig.ns(0), "GET", path).expect("an answer")
}

/// Waits until `/readyz` answers with this status and a body that contains this.
#[track_caller]
fn wait_readyz(rig: &Rig, status: u16, text: &str) -> String {
    eventually(PATIENCE, &format!("readyz: {status} {text:?}"), || {
        let answer = ask(rig.ns(0), "GET", "/readyz")?;
        if answer.0 == status && answer.1.contains(text) {
            Ok(answer.1)
        } else {
            Err(format!("{answer:?}"))
        }
    })
}

/// All TCP ports that somebody listens at.
fn listening(rig: &Rig) -> String {
    rig.ns(0).exec(["ss", "-Hltn"]).expect("ss")
}

fn ready() -> Answer {
    (200, "flanneld is ready".to_owned())
}

#[test]
fn probes_are_answered_before_there_is_a_configuration() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    rig.start_agent(0, &[FLAG]);
    let body = wait_readyz(&rig, 503, "net-conf.json");
    assert!(
        body.starts_with("flanneld is not ready yet\nnetwork-config: "),
        "{body}"
    );
    assert!(body.ends_with("\nsubnet-file: not yet\n"), "{body}");
    assert!(!body.contains("uplink"), "{body}");
    let running = (200, "flanneld is running".to_owned());
    assert_eq!(get(&rig, "/healthz"), running);
    assert_eq!(get(&rig, "/livez"), running);
    let (status, verbose) = get(&rig, "/readyz?verbose");
    assert_eq!(status, 503);
    assert!(
        verbose.starts_with("[+]uplink ok\n[-]network-config failed: "),
        "{verbose}"
    );
    assert!(verbose.ends_with("\nreadyz check failed\n"), "{verbose}");

    configure(&rig, NET_CONF);
    wait_readyz(&rig, 200, "");
    assert!(rig.subnet_file(0).exists());
    assert_eq!(get(&rig, "/readyz"), ready());
    assert_eq!(
        get(&rig, "/readyz?verbose=1"),
        (
            200,
            "[+]uplink ok\n[+]network-config ok\n[+]lease ok\n[+]datapath ok\n[+]firewall ok\n\
             [+]subnet-file ok\nreadyz check passed\n"
                .to_owned()
        )
    );
    let passed = (200, "[+]ping ok\nhealthz check passed\n".to_owned());
    assert_eq!(get(&rig, "/healthz?verbose"), passed);
}

#[test]
fn any_method_is_answered_and_other_paths_are_not() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &[FLAG, "--healthz-ip=127.0.0.1"]);
    rig.wait_ready(0);
    for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        let answer = ask(rig.ns(0), method, "/readyz").expect("an answer");
        assert_eq!(answer, ready(), "{method}");
    }
    assert_eq!(
        ask(rig.ns(0), "HEAD", "/readyz").expect("an answer"),
        (200, String::new())
    );
    for path in [
        "/",
        "/metrics",
        "/readyz/",
        "/healthz/x",
        "/Readyz",
        "/debug/pprof",
    ] {
        assert_eq!(get(&rig, path).0, 404, "{path}");
    }
    let listening = listening(&rig);
    assert!(listening.contains("127.0.0.1:8081"), "{listening}");
}

#[test]
fn a_lease_that_is_refused_is_named() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    configure(
        &rig,
        r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.9.0","Backend":{"Type":"vxlan"}}"#,
    );
    let taken: Subnet = "10.244.9.0/24".parse().expect("a subnet");
    rig.put_lease(
        taken,
        "192.0.2.9".parse().expect("an address"),
        "02:00:00:00:00:09",
    );
    rig.start_agent(0, &[FLAG]);
    let body = wait_readyz(&rig, 503, "\nlease: acquire a lease: out of subnets: ");
    assert!(!body.contains("network-config"), "{body}");
    rig.remove_lease(taken);
    wait_readyz(&rig, 200, "");
}

#[test]
fn readiness_goes_and_comes_with_the_device() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &[FLAG]);
    rig.wait_ready(0);
    wait_readyz(&rig, 200, "");
    // Only one device of a namespace may have a VNI and a port, so that ours cannot be made again.
    let uplink = "eth0";
    let script = format!(
        "link del {DEVICE}\nlink add usurper type vxlan id 1 dstport 8472 dev {uplink} nolearning\n"
    );
    let batch = rig.node(0).run_dir.join("batch");
    fs::write(&batch, script).expect("write the commands");
    let mut ip = rig.ns(0).command("ip");
    ip.arg("-batch").arg(&batch);
    process::finish(&mut ip, PATIENCE).expect("ip");
    let body = wait_readyz(&rig, 503, "\ndatapath: ");
    assert!(body.contains(DEVICE), "{body}");
    assert_eq!(body.lines().count(), 2, "{body}");
    assert_eq!(get(&rig, "/healthz").0, 200);
    let mut ip = rig.ns(0).command("ip");
    ip.args(["link", "del", "usurper"]);
    process::finish(&mut ip, PATIENCE).expect("ip");
    wait_readyz(&rig, 200, "");
}

#[test]
fn a_store_that_is_away_makes_nobody_unready() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &[FLAG]);
    rig.wait_ready(0);
    wait_readyz(&rig, 200, "");
    let away = rig.lease_dir().with_extension("away");
    fs::rename(rig.lease_dir(), &away).expect("take the leases away");
    eventually(
        PATIENCE,
        "the agent notices",
        || match rig.state(0)["store_connected"].as_bool() {
            Some(false) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    assert_eq!(get(&rig, "/readyz"), ready());
    fs::rename(&away, rig.lease_dir()).expect("bring the leases back");
}

#[test]
fn a_port_that_is_taken_is_waited_for() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    let squatter = rig
        .ns(0)
        .try_run(|| TcpListener::bind(("127.0.0.1", PORT)))
        .expect("enter the namespace")
        .expect("bind");
    rig.start_agent(0, &[FLAG]);
    rig.wait_ready(0);
    let said = "Start healthz server error. listen on 0.0.0.0:8081: Address already in use";
    rig.agent(0).wait_log(said, PATIENCE).expect("it is said");
    drop(squatter);
    wait_readyz(&rig, 200, "");
    let log = rig.agent(0).log();
    assert_eq!(
        log.matches("Start healthz server error").count(),
        1,
        "{log}"
    );
}

#[test]
fn a_probe_ends_with_the_agent_and_no_port_is_opened_unasked() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    let listening = listening(&rig);
    assert_eq!(listening, "");
    assert_eq!(rig.stop_agent(0), 0);
    rig.start_agent(0, &[FLAG]);
    rig.wait_ready(0);
    // A client that holds its connection does not hold up the end.
    let address = SocketAddr::from(([127, 0, 0, 1], PORT));
    let client = rig
        .ns(0)
        .try_run(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))
        .expect("enter the namespace")
        .expect("connect");
    assert_eq!(rig.stop_agent(0), 0);
    drop(client);
    assert!(ask(rig.ns(0), "GET", "/healthz").is_err());
}
