//! A test binary: what it is called, and a run of it.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cargo::Executable;
use crate::libtest::Report;
use crate::process;

/// A test binary and what it is called: `[3/90] flannel-agent/tests/netns_idle`.
pub(super) struct Suite<'a> {
    test: &'a Executable,
    pub(super) name: String,
    pub(super) heading: String,
}

/// All of them but those for guests.
pub(super) fn all(built: &[Executable]) -> Vec<Suite<'_>> {
    let tests: Vec<_> = built
        .iter()
        .filter(|executable| executable.is_test && !is_for_guests(executable))
        .collect();
    let all = tests.len();
    let numbered = (1..).zip(tests);
    numbered
        .map(|(number, test)| {
            let name = if test.kind == "test" {
                format!("{}/tests/{}", test.package, test.target)
            } else {
                format!("{} {} {}", test.package, test.kind, test.target)
            };
            let heading = format!("[{number}/{all}] {name}");
            Suite {
                test,
                name,
                heading,
            }
        })
        .collect()
}

/// What a test binary reported, and how it ended.
pub(super) type Ran = (Report, ExitStatus);

impl Suite<'_> {
    pub(super) fn is_lab(&self) -> bool {
        is_lab(self.test)
    }

    /// Runs it with these arguments, and passes on what it prints.
    pub(super) fn run(
        &self,
        built: &[Executable],
        words: &[String],
        terminal: &mut impl Write,
    ) -> Result<Ran> {
        let mut command = test_command(self.test, built);
        command.args(words);
        let mut child = process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        follow(&mut child, terminal)
    }
}

/// Labs come last.
pub(super) fn sort_key(binary: &Executable) -> (bool, &str, &str, &str) {
    (
        is_lab(binary),
        &binary.package,
        &binary.kind,
        &binary.target,
    )
}

/// Whether these are tests of agents in labs.
fn is_lab(binary: &Executable) -> bool {
    binary.package == "flannel-agent"
        && binary.kind == "test"
        && binary.target.starts_with("netns_")
}

/// Tests that take what belongs to the machine, which only [`crate::kernels`]' machines can spare.
fn is_for_guests(binary: &Executable) -> bool {
    binary.kind == "test" && binary.target.starts_with("guest_")
}

/// A test binary in the environment that `cargo test` gives it.
fn test_command(test: &Executable, built: &[Executable]) -> Command {
    let mut command = process::command(&test.path.to_string_lossy());
    command
        .current_dir(&test.manifest_dir)
        .env("CARGO_MANIFEST_DIR", &test.manifest_dir)
        .env("CARGO_PKG_NAME", &test.package)
        .env("CARGO_PKG_VERSION", &test.version)
        .env("FLANNEL_TEST_REQUIRE_ROOT", "1");
    for bin in built
        .iter()
        .filter(|executable| executable.kind == "bin" && !executable.is_test)
    {
        if bin.package == test.package {
            command.env(format!("CARGO_BIN_EXE_{}", bin.target), &bin.path);
        }
        if bin.target == "flannel-agent" {
            command.env("FLANNEL_AGENT", &bin.path);
        }
        if bin.package == "flannel-cni" {
            command.env("FLANNEL_CNI", &bin.path);
        }
    }
    command
}

/// Passes a child's standard output on as it comes, reads the results in it, and waits for the child.
///
/// The end of the child is the end, not that of its output: a process that a test left running would hold that
/// open for ever.
pub(super) fn follow(child: &mut Child, terminal: &mut impl Write) -> Result<(Report, ExitStatus)> {
    /// How long output may lag behind the child's exit.
    const GRACE: Duration = Duration::from_millis(500);
    let output = child.stdout.take().context("a test's standard output")?;
    let (sender, chunks) = mpsc::channel();
    // Ends with the output, or with us.
    thread::spawn(move || forward(output, &sender));
    let mut report = Report::default();
    let mut line = Vec::new();
    loop {
        match chunks.recv_timeout(GRACE) {
            Ok(bytes) => {
                terminal
                    .write_all(&bytes)
                    .and_then(|()| terminal.flush())
                    .context("write to standard output")?;
                read_lines(&mut report, &mut line, &bytes);
            }
            Err(RecvTimeoutError::Timeout) => {
                if child.try_wait().context("wait for a test")?.is_some() {
                    break;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    report.line(&String::from_utf8_lossy(&line));
    Ok((report, process::wait(child)?))
}

fn forward(mut output: impl Read, chunks: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        let bytes = buffer.get(..length).unwrap_or_default().to_vec();
        if chunks.send(bytes).is_err() {
            break;
        }
    }
}

/// Feeds whole lines to the report; `line` keeps the beginning of the next.
fn read_lines(report: &mut Report, line: &mut Vec<u8>, bytes: &[u8]) {
    for &byte in bytes {
        if byte == b'\n' {
            report.line(&String::from_utf8_lossy(line));
            line.clear();
        } else {
            line.push(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtest::Tally;
    use std::io;
    use std::path::PathBuf;
    use std::time::Instant;

    fn binary(package: &str, kind: &str, target: &str) -> Executable {
        Executable {
            package: package.to_owned(),
            version: "0.1.0".to_owned(),
            manifest_dir: PathBuf::from("/w"),
            target: target.to_owned(),
            kind: kind.to_owned(),
            is_test: true,
            path: PathBuf::from("/t"),
        }
    }

    #[test]
    fn namespace_tests_of_the_agent_come_last() {
        let mut all = [
            binary("flannel-agent", "test", "netns_overlay"),
            binary("flannel-testkit", "test", "netns_lab"),
            binary("flannel-agent", "test", "cli"),
            binary("flannel-core", "lib", "flannel_core"),
        ];
        all.sort_by(|a, b| sort_key(a).cmp(&sort_key(b)));
        let targets: Vec<_> = all.iter().map(|binary| binary.target.as_str()).collect();
        assert_eq!(
            targets,
            ["cli", "flannel_core", "netns_lab", "netns_overlay"]
        );
    }

    #[test]
    fn output_is_read_to_its_end_without_a_newline() {
        let mut child = Command::new("printf")
            .arg("test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured")
            .stdout(Stdio::piped())
            .spawn()
            .expect("printf");
        let (report, status) = follow(&mut child, &mut io::sink()).expect("its output");
        assert!(status.success());
        assert_eq!(
            report.tally,
            Tally {
                passed: 2,
                failed: 0,
                skipped: 1
            }
        );
    }

    #[test]
    fn a_process_left_behind_does_not_hold_us_up() {
        let start = Instant::now();
        let mut child = Command::new("sh")
            .args([
                "-c",
                "sleep 6 & echo 'test result: ok. 1 passed; 0 failed; 0 ignored'; echo $!",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let (report, _) = follow(&mut child, &mut io::sink()).expect("its output");
        assert_eq!(report.tally.passed, 1);
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "waited for the sleeping process"
        );
    }
}
