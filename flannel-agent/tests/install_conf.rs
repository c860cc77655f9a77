//! `install-conf`, as a command and by its own name: the whole file or nothing, with the permissions of the source.

use std::{
    fs,
    io::Read as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

const AGENT: &str = env!("CARGO_BIN_EXE_flannel-agent");
const CONF: &str = "{\"name\":\"cbr0\"}\n";

/// A directory with the program under its own name, a source and an empty directory to install to.
struct Place {
    dir: TempDir,
}

/// What one run came to.
struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: TempDir::new().expect("a directory"),
        };
        symlink(AGENT, place.path("install-conf")).expect("a link");
        fs::create_dir(place.path("net.d")).expect("a directory");
        place.source(CONF, 0o644);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn source(&self, text: &str, mode: u32) {
        let path = self.path("cni-conf.json");
        fs::write(&path, text).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("permissions");
    }

    fn destination(&self) -> PathBuf {
        self.path("net.d/10-flannel.conflist")
    }

    fn read(&self) -> String {
        fs::read_to_string(self.destination()).expect("read what was installed")
    }

    /// What is in the directory, other than what was installed.
    fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("net.d")).expect("list");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.into_string().expect("UTF-8"))
            .filter(|name| name != "10-flannel.conflist")
            .collect();
        names.sort();
        names
    }
}

fn run(command: &mut Command) -> Done {
    let output = command.output().expect("run");
    Done {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// Installs in every way there is; each must do the same.
fn ways(place: &Place) -> [Command; 3] {
    let agent = |words: &[&str]| {
        let mut command = Command::new(AGENT);
        command.args(words);
        command
    };
    [
        Command::new(place.path("install-conf")),
        agent(&["install-conf"]),
        agent(&["-v=1", "install-conf"]),
    ]
}

#[test]
fn a_file_is_installed_with_its_permissions() {
    let place = Place::new();
    for (mode, umask) in [(0o644, "077"), (0o600, "000"), (0o755, "022")] {
        for mut way in ways(&place) {
            let text = format!("{mode:o} {umask}");
            place.source(&text, mode);
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"]);
            shell.arg(way.get_program()).args(way.get_args());
            way = shell;
            let done = run(way
                .arg(place.path("cni-conf.json"))
                .arg(place.destination()));
            assert_eq!(done.code, Some(0), "{}", done.stderr);
            assert_eq!((done.stdout, done.stderr), (String::new(), String::new()));
            assert_eq!(place.read(), text);
            let meta = fs::metadata(place.destination()).expect("stat");
            assert_eq!(meta.permissions().mode() & 0o7777, mode, "umask {umask}");
            assert_eq!(place.leftovers(), [""; 0]);
        }
    }
}

#[test]
fn links_lead_to_the_source_and_are_replaced_at_the_destination() {
    // ConfigMaps are mounted as links to links.
    let place = Place::new();
    symlink("cni-conf.json", place.path("link")).expect("a link");
    fs::write(place.path("elsewhere"), "mine").expect("write");
    symlink(place.path("elsewhere"), place.destination()).expect("a link");
    let mut command = Command::new(place.path("install-conf"));
    let done = run(command.arg(place.path("link")).arg(place.destination()));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let meta = fs::symlink_metadata(place.destination()).expect("stat");
    assert!(meta.is_file());
    assert_eq!(place.read(), CONF);
    assert_eq!(
        fs::read_to_string(place.path("elsewhere")).expect("read"),
        "mine"
    );
}

#[test]
fn a_name_without_a_directory_is_here() {
    let place = Place::new();
    let mut command = Command::new(place.path("install-conf"));
    command.current_dir(place.path("net.d"));
    let done = run(command.args(["../cni-conf.json", "10-flannel.conflist"]));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(place.read(), CONF);
    assert_eq!(place.leftovers(), [""; 0]);
}

#[test]
fn other_than_two_arguments_are_told_the_usage() {
    let place = Place::new();
    let own = place.path("install-conf").display().to_string();
    for words in [&[][..], &["a"], &["a", "b", "c"], &["--help"]] {
        let done = run(Command::new(&own).args(words));
        assert_eq!(done.code, Some(1), "{words:?}");
        assert_eq!(done.stderr, format!("usage: {own} <src> <dest>\n"));
        assert_eq!(done.stdout, "");
    }
    for words in [&[][..], &["a"], &["a", "b", "c"]] {
        let done = run(Command::new(AGENT).arg("install-conf").args(words));
        assert_eq!(done.code, Some(1), "{words:?}");
        assert_eq!(
            done.stderr,
            format!("usage: {AGENT} install-conf <src> <dest>\n")
        );
    }
    let done = run(Command::new(AGENT).args(["install-conf", "--help"]));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stdout.contains("<SRC> <DEST>"), "{}", done.stdout);
}

#[test]
fn a_failure_names_the_source_and_leaves_everything_as_it_was() {
    let place = Place::new();
    fs::write(place.destination(), "old").expect("write");
    fs::create_dir(place.path("net.d/dir")).expect("a directory");
    let source = place.path("cni-conf.json");
    let cases: [(&Path, &Path, &str); 5] = [
        (&place.path("missing"), &place.destination(), "os error 2"),
        (place.dir.path(), &place.destination(), "directory"),
        (&source, &place.path("no/such/file"), "no/such"),
        (&source, &place.path("net.d/dir"), "net.d/dir"),
        (&source, Path::new("/"), "names no file"),
    ];
    for (from, to, needle) in cases {
        for mut way in ways(&place) {
            let done = run(way.arg(from).arg(to));
            assert_eq!(done.code, Some(1), "{from:?} {to:?}");
            let begin = format!("error installing \"{}\": ", from.display());
            assert!(done.stderr.starts_with(&begin), "{}", done.stderr);
            assert!(done.stderr.contains(needle), "{}", done.stderr);
            assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
            assert_eq!(place.read(), "old");
            assert_eq!(place.leftovers(), ["dir"]);
        }
    }
}

#[test]
fn who_reads_the_old_file_reads_it_to_its_end() {
    let place = Place::new();
    let old = "a".repeat(1 << 20);
    fs::write(place.destination(), &old).expect("write");
    let mut reader = fs::File::open(place.destination()).expect("open");
    let mut start = vec![0; 1 << 10];
    reader.read_exact(&mut start).expect("read");
    let mut command = Command::new(place.path("install-conf"));
    command.arg(place.path("cni-conf.json"));
    assert_eq!(run(command.arg(place.destination())).code, Some(0));
    let mut rest = String::new();
    reader.read_to_string(&mut rest).expect("read");
    assert_eq!(start.len() + rest.len(), old.len());
    assert!(rest.chars().all(|c| c == 'a'));
    assert_eq!(place.read(), CONF);
}

#[test]
fn flanneld_is_the_daemon() {
    let place = Place::new();
    symlink(AGENT, place.path("flanneld")).expect("a link");
    let flanneld = || Command::new(place.path("flanneld"));
    let done = run(flanneld().arg("--bogus"));
    assert_eq!(done.code, Some(2));
    assert!(
        done.stderr.starts_with("flanneld: ") && done.stderr.contains("--bogus"),
        "{}",
        done.stderr
    );
    let done = run(flanneld().arg("-version"));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stdout.contains(env!("CARGO_PKG_VERSION")));
}
