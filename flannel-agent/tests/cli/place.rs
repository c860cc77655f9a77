//! A node on which the program is run to its end, and what is compared to tell that it changed nothing.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use flannel_testkit::{
    Lab, LabOptions, Node,
    process::{self, Finished},
};

/// How long a refusal may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The program under test.
pub(crate) fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_flannel-agent"))
}

/// Runs the program where it is, for what does not depend on the node. Variables of the caller's are not passed on.
#[track_caller]
pub(crate) fn run(args: &[&str], env: &[(&str, &str)]) -> Finished {
    finish(Command::new(binary()), args, env)
}

#[track_caller]
fn finish(mut command: Command, args: &[&str], env: &[(&str, &str)]) -> Finished {
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"FLANNELD_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.args(args).envs(env.iter().copied());
    process::finish(&mut command, LIMIT).expect("the program ends by itself")
}

/// A node with an uplink, and a lease directory with a configuration that is right.
pub(crate) struct Place {
    pub(crate) lab: Lab,
    pub(crate) lease_dir: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Place {
        let options = LabOptions {
            nodes: 1,
            ..LabOptions::default()
        };
        let lab = Lab::new(options).expect("a lab");
        let lease_dir = lab.node(0).run_dir.join("leases");
        fs::create_dir(&lease_dir).expect("a lease directory");
        let place = Place { lab, lease_dir };
        place.set_conf(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
        place
    }

    pub(crate) fn node(&self) -> &Node {
        self.lab.node(0)
    }

    /// A path in the node's directory.
    pub(crate) fn path(&self, name: &str) -> String {
        self.node().run_dir.join(name).display().to_string()
    }

    pub(crate) fn set_conf(&self, text: &[u8]) {
        fs::write(self.lease_dir.join("config"), text).expect("write the configuration");
    }

    /// `--lease-dir` and `--subnet-file`.
    pub(crate) fn flags(&self) -> [String; 2] {
        [
            format!("--lease-dir={}", self.lease_dir.display()),
            format!("--subnet-file={}", self.path("run/subnet.env")),
        ]
    }

    /// Runs the program on the node with the flags for its files and these.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Finished {
        let flags = self.flags();
        let flags: Vec<&str> = flags
            .iter()
            .map(String::as_str)
            .chain(args.iter().copied())
            .collect();
        self.run_bare(&flags, env)
    }

    /// Runs the program on the node with these flags alone.
    #[track_caller]
    pub(crate) fn run_bare(&self, args: &[&str], env: &[(&str, &str)]) -> Finished {
        finish(self.node().ns.command(binary()), args, env)
    }

    /// The daemon with the flags for its files and these must refuse to start, see [`Place::assert_refused`].
    #[track_caller]
    pub(crate) fn refuses(&self, args: &[&str], needles: &[&str]) {
        self.assert_refused(&format!("{args:?}"), needles, || self.run(args, &[]));
    }

    /// `run` must end with exit code 2 and one line, which contains all `needles`, besides lines of level INFO; nothing on the
    /// node may be another than before.
    #[track_caller]
    pub(crate) fn assert_refused(
        &self,
        what: &str,
        needles: &[&str],
        run: impl FnOnce() -> Finished,
    ) {
        let before = self.state();
        let done = run();
        assert_one_line(what, &done, needles);
        assert_eq!(self.state(), before, "{what} changed the node");
    }

    /// All that an agent could have changed.
    #[track_caller]
    fn state(&self) -> BTreeMap<String, String> {
        let node = self.node();
        let mut state = BTreeMap::new();
        for line in [
            "-d link",
            "-4 addr",
            "-4 route show table all",
            "-4 rule",
            "neigh show nud permanent",
        ] {
            let text = node.ns.ip(line).expect("look at the node");
            state.insert(line.to_owned(), text);
        }
        let fdb = node.ns.exec(["bridge", "fdb", "show"]).expect("bridge");
        state.insert("fdb".to_owned(), fdb);
        let tc = node.ns.exec(["tc", "qdisc", "show"]).expect("tc");
        state.insert("qdisc".to_owned(), tc);
        let cookie = format!("{:x}", node.ns.cookie().expect("cookie"));
        let decimal = node.ns.cookie().expect("cookie").to_string();
        let pins = fs::read_dir(flannel_core::mark::BPFFS_ROOT)
            .into_iter()
            .flatten();
        for pin in pins.flatten() {
            let name = pin.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("{cookie}.")) || name.starts_with(&format!("{decimal}.")) {
                state.insert(format!("pins {name}"), String::new());
            }
        }
        files(&node.run_dir, &mut state);
        state
    }
}

/// Names and contents below a directory.
fn files(dir: &Path, into: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            into.insert(path.display().to_string(), "directory".to_owned());
            files(&path, into);
        } else if !path.ends_with("agent.log") {
            let bytes = fs::read(&path).unwrap_or_default();
            into.insert(path.display().to_string(), format!("{bytes:?}"));
        }
    }
}

/// Exit code 2, nothing on stdout, one line with all `needles` on stderr besides lines of level INFO.
#[track_caller]
pub(crate) fn assert_one_line(what: &str, done: &Finished, needles: &[&str]) {
    let stderr = &done.stderr;
    assert_eq!(done.status.code(), Some(2), "{what}: {stderr}");
    assert_eq!(done.stdout, "", "{what}");
    let lines: Vec<&str> = stderr
        .lines()
        .filter(|line| !line.contains(" INFO "))
        .collect();
    let [line] = lines[..] else {
        panic!("{what}: not one line: {stderr}");
    };
    assert!(
        line.starts_with("flannel-agent: ") || line.contains(" ERROR "),
        "{what}: {line}"
    );
    for needle in needles {
        assert!(line.contains(needle), "{what}: no {needle:?} in: {line}");
    }
}
