//! Files and directories that do not exist, are something else, or are not ours to write.

use std::{fs, os::unix::fs::chown, process::Command};

use flannel_testkit::{
    AgentProcess, Capability, privileged,
    process::{self, Finished},
};

use crate::{
    PATIENCE,
    place::{Place, binary},
};

#[test]
fn files_that_cannot_be_used_are_refused() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let file = place.path("file");
    fs::write(&file, "").unwrap();
    let lease_dir = |dir: &str, needles: &[&str]| {
        let flag = format!("--lease-dir={dir}");
        let needles: Vec<&str> = needles
            .iter()
            .copied()
            .chain([dir, "--lease-dir"])
            .collect();
        place.refuses(&[&flag], &needles);
    };
    lease_dir(&place.path("missing"), &["No such file", "create it"]);
    lease_dir(&file, &["Not a directory"]);
    lease_dir(&format!("{file}/x"), &["Not a directory"]);
    lease_dir("/proc/sys", &["writable"]);
    fs::create_dir(place.path("odd")).unwrap();
    fs::write(place.path("odd/subnets"), "").unwrap();
    let flag = format!("--lease-dir={}", place.path("odd"));
    place.refuses(&[&flag], &["odd/subnets", "Not a directory", "--lease-dir"]);

    for path in [
        format!("{file}/subnet.env"),
        "/proc/flannel/subnet.env".to_owned(),
        "/sys/subnet.env".to_owned(),
        place.lease_dir.display().to_string(),
        "/".to_owned(),
    ] {
        let flag = format!("--subnet-file={path}");
        place.refuses(&[&flag], &[&path, "writable directory"]);
    }
    // No configuration in the directory, and something that is none under the other name.
    fs::remove_file(place.lease_dir.join("config")).unwrap();
    place.refuses(&["--net-config-path=/"], &["at /:", "JSON file"]);
    fs::write(place.path("net-conf.json"), "nonsense").unwrap();
    let flag = format!("--net-config-path={}", place.path("net-conf.json"));
    place.refuses(&[&flag], &["JSON", "10.244.0.0/16"]);
}

#[test]
fn places_without_permission_are_refused() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    // A read-only file system, in a mount namespace that goes with the program.
    for (flag, dir) in [("--subnet-file", "ro/subnet.env"), ("--lease-dir", "ro")] {
        let ro = place.path("ro");
        let _exists = fs::create_dir(&ro);
        let path = place.path(dir);
        place.assert_refused(flag, &[&path, "Read-only file system", "writable"], || {
            let script = format!("mount -t tmpfs -o ro none {ro} && exec \"$@\"");
            let mut command = place.node().ns.command("unshare");
            command.args(["--mount", "sh", "-c", &script, "sh"]);
            command.arg(binary()).args(place.flags());
            process::finish(command.arg(format!("{flag}={path}")), PATIENCE).unwrap()
        });
    }
    // A directory of somebody else's, for a root without the right to read everything.
    let secret = place.path("secret");
    fs::create_dir(&secret).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(&secret, mode).unwrap();
    chown(&secret, Some(65534), Some(65534)).unwrap();
    for flag in [
        format!("--lease-dir={secret}"),
        format!("--subnet-file={secret}/subnet.env"),
    ] {
        place.assert_refused(&flag, &[&secret, "Permission denied", "writable"], || {
            let [leases, subnet_file] = place.flags();
            let args = [leases.as_str(), &subnet_file, &flag];
            let caps = [Capability::NetAdmin, Capability::NetRaw];
            let mut agent =
                AgentProcess::spawn_with_caps(place.node(), binary(), &args, &[], &caps).unwrap();
            let code = agent.wait(PATIENCE).unwrap();
            Finished {
                status: Command::new("sh")
                    .args(["-c", &format!("exit {code}")])
                    .status()
                    .unwrap(),
                stdout: String::new(),
                stderr: agent.log(),
            }
        });
    }
}
