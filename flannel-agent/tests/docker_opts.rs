//! `mk-docker-opts`: the script under two shells and the command, on the same inputs, against flannel's own cases.

use std::{fs, path::Path, process::Command};

use flannel_testkit::{Lab, LabOptions, privileged};
use tempfile::TempDir;

const SCRIPT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../deploy/bin/mk-docker-opts.sh"
);
const AGENT: &str = env!("CARGO_BIN_EXE_flannel-agent");
/// The file of flannel's cases.
const SAMPLE: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
/// The three implementations, as the beginning of a command line.
const ALL: [&[&str]; 3] = [
    &["dash", SCRIPT],
    &["bash", "--posix", SCRIPT],
    &[AGENT, "mk-docker-opts"],
];

/// What one run came to.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    code: Option<i32>,
    /// The file, if one was written.
    file: Option<String>,
    stderr: String,
}

/// Runs one implementation in a directory of its own with `subnet.env` in it, writing to `here.txt`.
fn run(
    program: &[&str],
    sample: Option<&str>,
    options: &[&str],
    env: &[(&str, &str)],
    wrap: &dyn Fn(&str) -> Command,
) -> Outcome {
    let dir = TempDir::new().expect("a directory");
    if let Some(text) = sample {
        fs::write(dir.path().join("subnet.env"), text).expect("write");
    }
    let mut command = wrap(program[0]);
    command.args(&program[1..]).args(options);
    command.current_dir(dir.path()).env_clear();
    command.env("PATH", std::env::var_os("PATH").expect("PATH"));
    command.envs(env.iter().copied());
    let output = command.output().expect("run");
    let left: Vec<_> = fs::read_dir(dir.path())
        .expect("list")
        .map(|entry| entry.expect("entry").file_name())
        .filter(|name| name != "subnet.env" && name != "here.txt")
        .collect();
    assert!(left.is_empty(), "{program:?} {options:?} left {left:?}");
    Outcome {
        code: output.status.code(),
        file: fs::read_to_string(dir.path().join("here.txt")).ok(),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

#[track_caller]
fn assert_all(
    sample: Option<&str>,
    options: &[&str],
    env: &[(&str, &str)],
    (code, file, stderr): (i32, Option<&str>, &str),
) {
    for program in ALL {
        let outcome = run(program, sample, options, env, &|name| Command::new(name));
        let expected = Outcome {
            code: Some(code),
            file: file.map(str::to_owned),
            stderr: stderr.to_owned(),
        };
        assert_eq!(outcome, expected, "{program:?} {options:?} {env:?}");
    }
}

const BOTH: [&str; 4] = ["-f", "./subnet.env", "-d", "here.txt"];

fn with(more: &[&'static str]) -> Vec<&'static str> {
    BOTH.iter().chain(more).copied().collect()
}

#[test]
fn flannels_own_cases_come_out_byte_for_byte() {
    let single = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n";
    let words = " --bip=10.1.74.1/24 --ip-masq=true --mtu=1472";
    let combined = format!("DOCKER_OPTS=\"{words}\"\n");
    let custom = format!("{single}CUSTOM_KEY=\"{words}\"\n");
    let unmasked = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n\
                    DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n";
    let both = format!("{single}{combined}");
    for (more, file) in [
        (&[][..], both.as_str()),
        (&["-i"], single),
        (&["-c"], &combined),
        (&["-k", "CUSTOM_KEY"], &custom),
        (&["-m"], unmasked),
        (&["-ic"], &both),
        (&["-cmk", "X"], "X=\" --bip=10.1.74.1/24 --mtu=1472\"\n"),
    ] {
        assert_all(Some(SAMPLE), &with(more), &[], (0, Some(file), ""));
    }
}

#[test]
fn odd_files_and_environments_are_treated_alike() {
    let c = with(&["-c"]);
    // flannel masquerades, so Docker need not.
    let masquerading = SAMPLE.replace("=false", "=true");
    let file = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --ip-masq=false --mtu=1472\"\n";
    assert_all(Some(&masquerading), &c, &[], (0, Some(file), ""));
    // Quotes, export and comments, as a shell takes them.
    let quoted = "# mine\nexport FLANNEL_SUBNET=\"10.1.74.1/24\"\nFLANNEL_MTU='1472'\n";
    let file = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n";
    assert_all(Some(quoted), &c, &[], (0, Some(file), ""));
    // No IPv4 at all.
    let six = "FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:13::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    let file = "DOCKER_OPTS=\" --ip-masq=false --mtu=1450\"\n";
    assert_all(Some(six), &c, &[], (0, Some(file), ""));
    assert_all(None, &BOTH, &[], (0, Some("DOCKER_OPTS=\"\"\n"), ""));
    let said = "Invalid value of FLANNEL_IPMASQ: maybe\n";
    let bad = SAMPLE.replace("=false", "=maybe");
    assert_all(Some(&bad), &c, &[], (1, None, said));
    // What is left out need not be right.
    let file = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n";
    assert_all(Some(&bad), &with(&["-cm"]), &[], (0, Some(file), ""));
    // The key's own variable comes first, and all variables of the prefix count.
    let env = [("DOCKER_OPTS", "-D "), ("DOCKER_OPT_AAA", "--debug")];
    let file = "DOCKER_OPT_AAA=\"--debug\"\nDOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\n\
                DOCKER_OPT_MTU=\"--mtu=1472\"\nDOCKER_OPTS=\"-D  --debug --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";
    assert_all(Some(SAMPLE), &BOTH, &env, (0, Some(file), ""));
    let env = [("TRAP", "a\nDOCKER_OPT_TRAP=b"), ("FLANNEL_MTU", "9000")];
    let file = "DOCKER_OPTS=\" --mtu=9000\"\n";
    assert_all(None, &c, &env, (0, Some(file), ""));
    // A file name without a slash is the file here, not one in PATH.
    let bare = ["-f", "subnet.env", "-d", "here.txt", "-c", "-m"];
    let file = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n";
    assert_all(Some(SAMPLE), &bare, &[], (0, Some(file), ""));
    assert_all(
        Some(SAMPLE),
        &with(&["-k", "X;reboot"]),
        &[],
        (1, None, "Invalid key: X;reboot\n"),
    );
}

#[test]
fn wrong_options_end_with_one() {
    for options in [&["-x"][..], &["-h"], &["-k"], &["-if"]] {
        for program in ALL {
            let outcome = run(program, Some(SAMPLE), options, &[], &|name| {
                Command::new(name)
            });
            assert_eq!(outcome.code, Some(1), "{program:?} {options:?}");
            assert!(outcome.stderr.contains("-k KEY"), "{outcome:?}");
        }
    }
}

#[test]
fn the_file_is_replaced_and_a_device_is_written_to() {
    for program in ALL {
        let dir = TempDir::new().expect("a directory");
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("env"), SAMPLE).expect("write");
        fs::write(
            path("out"),
            "old, and longer than what comes, but of no use any more",
        )
        .expect("write");
        let go = |to: &str| {
            let mut command = Command::new(program[0]);
            command
                .args(&program[1..])
                .args(["-f", &path("env"), "-m", "-c", "-d", to]);
            command.output().expect("run")
        };
        let text = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n";
        assert!(go(&path("out")).status.success());
        assert_eq!(fs::read_to_string(path("out")).expect("read"), text);
        assert!(go(&path("new/dir/out")).status.success());
        assert_eq!(fs::read_to_string(path("new/dir/out")).expect("read"), text);
        let done = go("/dev/stdout");
        assert_eq!(String::from_utf8_lossy(&done.stdout), text, "{program:?}");
        assert!(Path::new("/dev/stdout").is_symlink());
        assert_eq!(
            go(dir.path().to_str().expect("UTF-8")).status.code(),
            Some(1)
        );
    }
}

#[test]
fn a_subnet_behind_a_gateway_is_an_error() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 1,
        ..LabOptions::default()
    });
    let lab = lab.expect("a lab");
    let node = lab.node(0);
    let (near, far) = (SAMPLE, SAMPLE.replace("10.1.74.1/24", "10.1.75.129/25"));
    node.ns
        .ip("route add 10.1.74.0/24 via 192.168.77.1")
        .expect("a route");
    node.ns
        .ip("route add 10.1.75.0/25 via 192.168.77.1")
        .expect("a route");
    node.ns
        .ip("route add 10.1.75.128/25 dev eth0")
        .expect("a route");
    for program in ALL {
        let go = |sample: &str| {
            run(program, Some(sample), &with(&["-c"]), &[], &|name| {
                node.ns.command(name)
            })
        };
        let outcome = go(near);
        assert_eq!(outcome.code, Some(1), "{program:?} {outcome:?}");
        assert_eq!(
            outcome.stderr,
            "Your routing table already contains the subnet: 10.1.74.1/24\n"
        );
        assert!(outcome.file.is_some(), "it is written all the same");
        let outcome = go(&far);
        assert_eq!(
            (outcome.code, outcome.stderr.as_str()),
            (Some(0), ""),
            "{program:?}"
        );
    }
}
