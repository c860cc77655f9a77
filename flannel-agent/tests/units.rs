//! The unit files: systemd understands them, and what they name exists.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use clap::CommandFactory as _;
use flannel_agent::cli::Args;
use regex::Regex;
use tempfile::TempDir;

const BINARY: &str = "/usr/local/bin/flannel-agent";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(name: &str) -> String {
    fs::read_to_string(deploy().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Everything that looks like a variable of a flag.
fn variables(text: &str) -> BTreeSet<String> {
    let pattern = Regex::new("FLANNELD_[A-Z0-9_]*[A-Z0-9]").expect("an expression");
    pattern
        .find_iter(text)
        .map(|found| found.as_str().to_owned())
        .collect()
}

/// The values of a setting, in order.
fn values<'a>(unit: &'a str, name: &str) -> Vec<&'a str> {
    let is = |line: &&'a str| line.split('=').next() == Some(name);
    let lines = unit.lines().filter(is);
    lines
        .filter_map(|line| Some(line.split_once('=')?.1))
        .collect()
}

/// What `systemd-analyze verify` complains of in units that are changed as given and stand beside an invented docker.service.
fn complaints(change: impl Fn(&str) -> String) -> String {
    let dir = TempDir::new().expect("a directory");
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, text).expect("write a unit");
    };
    let program = dir.path().join("flannel-agent");
    symlink(env!("CARGO_BIN_EXE_flannel-agent"), &program).expect("a link");
    let unit =
        read("systemd/flannel-agent.service").replace(BINARY, &program.display().to_string());
    put("flannel-agent.service", &change(&unit));
    put(
        "docker.service",
        "[Unit]\nDescription=Docker\n[Service]\nExecStart=/bin/true\n",
    );
    let docker = read("systemd/docker.service.d/flannel.conf");
    put(
        "docker.service.d/flannel.conf",
        &docker.replace("/usr/bin/dockerd", "/bin/true"),
    );
    let mut told = String::new();
    for unit in ["flannel-agent.service", "docker.service"] {
        let mut verify = Command::new("systemd-analyze");
        verify
            .args(["verify", "--man=no"])
            .arg(dir.path().join(unit));
        verify.env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path().display()));
        let output = verify.output().expect("systemd-analyze");
        told.push_str(&String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            told.push_str("it fails");
        }
    }
    told
}

#[test]
fn systemd_understands_the_units() {
    assert_eq!(complaints(str::to_owned), "");
    let misspelt = complaints(|unit| unit.replace("WatchdogSec", "WatchdogSeconds"));
    assert!(misspelt.contains("WatchdogSeconds"), "{misspelt:?}");
}

#[test]
fn the_agents_unit_says_what_was_promised() {
    let unit = read("systemd/flannel-agent.service");
    for (name, value) in [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("WatchdogSec", "30"),
        ("Restart", "always"),
        ("Before", "docker.service"),
        ("EnvironmentFile", "-/etc/default/flannel-agent"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("ExecStart", BINARY),
    ] {
        assert_eq!(values(&unit, name), [value], "{name}");
    }
    let capabilities = values(&unit, "CapabilityBoundingSet").join(" ");
    for name in ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "CAP_PERFMON"] {
        assert!(capabilities.split(' ').any(|have| have == name), "{name}");
    }
    // They make bpffs or sysctls read-only, or forbid what the agent does.
    for name in [
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "PrivateNetwork",
        "RestrictNamespaces",
        "SystemCallFilter",
    ] {
        assert!(values(&unit, name).is_empty(), "{name}");
    }
    assert_eq!(values(&unit, "ProtectSystem"), ["full"]);
}

#[test]
fn variables_in_units_and_documents_are_flags() {
    let mut command = Args::command();
    command.build();
    let flags: BTreeSet<String> = command
        .get_arguments()
        .filter_map(|flag| Some(flag.get_env()?.to_str()?.to_owned()))
        .collect();
    let defaults = variables(&read("systemd/flannel-agent.default"));
    assert!(defaults.len() > 5, "{defaults:?}");
    let document = variables(&read("README.md"));
    for name in defaults.iter().chain(&document) {
        assert!(flags.contains(name), "{name} is no flag's variable");
    }
    let missing: Vec<_> = defaults.difference(&document).collect();
    assert!(missing.is_empty(), "deploy/README.md lacks {missing:?}");
}

#[test]
fn commands_in_units_are_the_programs() {
    let unit = read("systemd/flannel-agent.service");
    let mut seen = 0;
    for line in values(&unit, "ExecStart")
        .into_iter()
        .chain(values(&unit, "ExecStartPost"))
    {
        let words: Vec<&str> = line.trim_start_matches('-').split(' ').collect();
        assert_eq!(words.first(), Some(&BINARY), "{line}");
        if words.get(1) == Some(&"mk-docker-opts") {
            // With a directory of its own in the place of /run/flannel.
            let dir = TempDir::new().expect("a directory");
            let words: Vec<String> = words[1..]
                .iter()
                .map(|word| word.replace("/run/flannel", &dir.path().display().to_string()))
                .collect();
            let mut agent = Command::new(env!("CARGO_BIN_EXE_flannel-agent"));
            let env = [("FLANNEL_MTU", "1450")];
            assert!(
                agent
                    .args(&words)
                    .envs(env)
                    .status()
                    .expect("run")
                    .success()
            );
            let file = fs::read_to_string(dir.path().join("docker")).expect("the file");
            let key = "\nDOCKER_NETWORK_OPTIONS=\"";
            assert!(format!("\n{file}").contains(key), "{file}");
            let docker = read("systemd/docker.service.d/flannel.conf");
            assert_eq!(values(&docker, "EnvironmentFile"), ["/run/flannel/docker"]);
            let start = values(&docker, "ExecStart").join(" ");
            assert!(start.contains(" $DOCKER_NETWORK_OPTIONS"), "{start}");
        } else {
            Args::read(words.iter().map(Into::into)).expect("flags of the agent");
        }
        seen += 1;
    }
    assert_eq!(seen, 2);
}

#[test]
fn udev_leaves_our_devices_alone() {
    let name = fs::read_dir(deploy().join("systemd"))
        .expect("list")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| Path::new(name).extension().is_some_and(|end| end == "link"))
        .expect("a link file");
    // The first that matches counts, and the distribution's matches everything.
    assert!(name.as_str() < "99-default.link", "{name}");
    let link = read(&format!("systemd/{name}"));
    assert_eq!(values(&link, "MACAddressPolicy"), ["none"]);
    let patterns: Vec<&str> = values(&link, "OriginalName")[0].split(' ').collect();
    let vni = 1.try_into().expect("a VNI");
    let device = flannel_core::mark::device_name(vni);
    let fits = |pattern: &&str| device.starts_with(pattern.trim_end_matches('*'));
    assert!(patterns.iter().any(fits), "{patterns:?}");
}

#[test]
fn every_file_is_in_the_document() {
    let document = read("README.md");
    for name in [
        "systemd/flannel-agent.service",
        "systemd/flannel-agent.default",
        "systemd/docker.service.d/flannel.conf",
        "systemd/50-flannel.link",
        "bin/mk-docker-opts.sh",
    ] {
        assert!(deploy().join(name).is_file(), "{name}");
        assert!(document.contains(&format!("`{name}`")), "{name}");
    }
}
