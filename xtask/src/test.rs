//! `cargo xtask test`

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::cargo::{self, Executable};
use crate::dist::arch::Arches;
use crate::kernels::{self, Done, Kernels, Request, Tier};
use crate::libtest::{Report, Tally};
use crate::namespaces;
use crate::process::{self, Reported};
use crate::setup::{self, Needs};

/// Which tests, and how.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Run only the tests of this crate
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
    /// Run only flannel-core and flannel-common, which need no root
    #[arg(long, conflicts_with = "package")]
    fast: bool,
    /// Run on this kernel of Debian's instead, in a virtual machine: 5.10, 6.1, 6.12, 7 or all; may be repeated
    #[arg(long = "kernel", value_name = "KERNEL", conflicts_with_all = ["package", "fast"])]
    kernels: Vec<Kernels>,
    /// Architecture of these machines: amd64, arm64 or all
    #[arg(
        long,
        value_name = "ARCH",
        default_value = "amd64",
        requires = "kernels"
    )]
    arch: Arches,
    /// Only the part with which a run of all tests ends
    #[arg(long, requires = "kernels")]
    quick: bool,
    /// Look for newer packages of kernels and programs, instead of using those fetched before
    #[arg(long, requires = "kernels")]
    refresh: bool,
    /// Run only the machines of this case, by the beginning of its name: plain, no-vxlan, no-bpf, lockdown, cards, cards-silent, …
    #[arg(long, value_name = "CASE", requires = "kernels")]
    case: Option<String>,
    /// Arguments for every test binary, such as --nocapture
    #[arg(last = true, value_name = "ARGS")]
    libtest: Vec<String>,
}

/// Failures and counts of the whole run.
#[derive(Default)]
struct Outcome {
    tally: Tally,
    failures: Vec<String>,
}

impl Outcome {
    fn fail(&mut self, what: String) {
        self.tally.failed += 1;
        self.failures.push(what);
    }

    fn add_guest(&mut self, done: &Done) {
        let minutes = done.took.as_secs_f64() / 60.0;
        for (name, report) in &done.suites {
            self.add(&format!("{}: {name}", done.label), report);
        }
        for trouble in &done.troubles {
            self.fail(format!("{}: {trouble}", done.label));
        }
        let facts = if done.facts.is_empty() {
            String::new()
        } else {
            format!("{}; ", done.facts)
        };
        let passed: u64 = done
            .suites
            .iter()
            .map(|(_, report)| report.tally.passed)
            .sum();
        let failed: u64 = done
            .suites
            .iter()
            .map(|(_, report)| report.tally.failed)
            .sum();
        for left_out in &done.not_run {
            println!("{}: not run: {left_out}", done.label);
        }
        println!(
            "{}: {passed} passed, {} failed, {} not run; {facts}{minutes:.1} min; {}",
            done.label,
            failed + done.troubles.len() as u64,
            done.not_run.len(),
            done.place.display()
        );
    }

    fn add(&mut self, name: &str, report: &Report) {
        self.tally += &report.tally;
        self.failures.extend(report.failures.iter().map(|test| {
            let mut failure = format!("{name}: {test}");
            for line in report.panic(test) {
                failure.push_str("\n        ");
                failure.push_str(line);
            }
            failure
        }));
    }
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let start = Instant::now();
    if !args.kernels.is_empty() {
        let mut outcome = Outcome::default();
        run_on_kernels(root, args, &mut outcome)?;
        return conclude(&outcome, start);
    }
    if !args.fast {
        process::require_root("the full test run", "test")?;
    }
    // Some of the tests alone are for here.
    let is_whole = args.filter.is_none() && args.package.is_none() && !args.fast;
    setup::ensure(
        root,
        if args.fast {
            Needs::Build
        } else if is_whole && setup::is_debian() {
            Needs::Kernels
        } else {
            Needs::Everything
        },
    )?;
    let built = build(root, args)?;
    let namespaces = namespaces::list();
    let mut outcome = Outcome::default();
    run_binaries(&built, args, &mut outcome)?;
    if !process::interrupted() {
        run_doc_tests(root, &built, args, &mut outcome)?;
    }

    let leaked = namespaces::leaked_since(&namespaces);
    if process::interrupted() {
        namespaces::remove(&leaked);
        eprintln!("test: interrupted");
        return Err(Reported.into());
    }
    if !leaked.is_empty() {
        outcome.fail(format!(
            "network namespaces left behind: {}",
            leaked.join(" ")
        ));
    }
    if is_whole && !setup::is_debian() {
        println!("\nnot run: other kernels: they come from Debian by apt");
    } else if is_whole {
        println!(
            "\nother kernels, after {:.0} s",
            start.elapsed().as_secs_f64()
        );
        let request = Request {
            kernels: kernels::EVERY_TIME.to_vec(),
            tier: Tier::Quick,
            case: None,
            filter: None,
            refresh: false,
        };
        let run = kernels::run(root, &request, &mut |done| outcome.add_guest(&done));
        if let Err(error) = run {
            // What has run here must be told all the same.
            outcome.fail(format!("other kernels: {error:#}"));
        }
    }
    conclude(&outcome, start)
}

/// Every kernel that was asked for, on every architecture.
fn run_on_kernels(root: &Path, args: &Args, outcome: &mut Outcome) -> Result<()> {
    let mut kernels: Vec<_> = args.kernels.iter().flat_map(|kernels| &kernels.0).collect();
    kernels.sort_unstable();
    kernels.dedup();
    let places = kernels
        .iter()
        .flat_map(|kernel| args.arch.0.iter().map(|arch| (**kernel, *arch)));
    let request = Request {
        kernels: places.collect(),
        tier: if args.quick {
            Tier::Quick
        } else {
            Tier::Complete
        },
        case: args.case.as_deref(),
        filter: args.filter.as_deref(),
        refresh: args.refresh,
    };
    kernels::run(root, &request, &mut |done| outcome.add_guest(&done))
}

fn conclude(outcome: &Outcome, start: Instant) -> Result<()> {
    let Outcome { tally, failures } = outcome;
    println!();
    if !failures.is_empty() {
        println!("failed:");
        for failure in failures {
            println!("    {failure}");
        }
    }
    let nothing = tally.passed + tally.failed == 0;
    if nothing {
        println!("no test ran");
    }
    println!("wall time {:.1} s", start.elapsed().as_secs_f64());
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    if nothing || tally.failed > 0 {
        Err(Reported.into())
    } else {
        Ok(())
    }
}

fn selection(args: &Args) -> Vec<&str> {
    match &args.package {
        Some(package) => vec!["-p", package],
        None if args.fast => vec!["-p", "flannel-common", "-p", "flannel-core"],
        None => vec!["--workspace", "--exclude", "flannel-ebpf"],
    }
}

/// Builds the test binaries, and with them the eBPF object and the agent that the tests start.
fn build(root: &Path, args: &Args) -> Result<Vec<Executable>> {
    eprintln!("test: building (some minutes the first time)");
    let mut command = vec!["test", "--no-run"];
    command.extend(selection(args));
    let mut built = cargo::build(root, &command)?;
    built.sort_by(|a, b| sort_key(a).cmp(&sort_key(b)));
    Ok(built)
}

fn sort_key(binary: &Executable) -> (bool, &str, &str, &str) {
    (
        is_lab(binary),
        &binary.package,
        &binary.kind,
        &binary.target,
    )
}

/// Tests of agents in labs. They wait more than they work, but more than two at a time would be late for the seconds after which
/// connections give up.
fn is_lab(binary: &Executable) -> bool {
    binary.package == "flannel-agent"
        && binary.kind == "test"
        && binary.target.starts_with("netns_")
}

/// Tests that take what belongs to the machine, which only [`kernels`]' machines can spare.
fn is_for_guests(binary: &Executable) -> bool {
    binary.kind == "test" && binary.target.starts_with("guest_")
}

fn run_binaries(built: &[Executable], args: &Args, outcome: &mut Outcome) -> Result<()> {
    let tests: Vec<_> = built
        .iter()
        .filter(|executable| executable.is_test && !is_for_guests(executable))
        .collect();
    for (number, test) in (1..).zip(&tests) {
        if process::interrupted() {
            break;
        }
        let name = if test.kind == "test" {
            format!("{}/tests/{}", test.package, test.target)
        } else {
            format!("{} {} {}", test.package, test.kind, test.target)
        };
        println!("\n[{number}/{}] {name}", tests.len());
        let mut command = test_command(test, built);
        command.args(&args.filter).args(&args.libtest);
        if is_lab(test) {
            command.arg("--test-threads=2");
        }
        let mut child = process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let (report, status) = follow(&mut child, &mut io::stdout().lock())?;
        outcome.add(&name, &report);
        if report.summaries == 0 || (!status.success() && report.tally.failed == 0) {
            outcome.fail(format!("{name}: the test binary ended with {status}"));
        }
    }
    Ok(())
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

/// Doc tests are compiled by rustdoc as they run; only libraries have them.
fn run_doc_tests(
    root: &Path,
    built: &[Executable],
    args: &Args,
    outcome: &mut Outcome,
) -> Result<()> {
    if !built
        .iter()
        .any(|executable| executable.is_test && executable.kind == "lib")
    {
        return Ok(());
    }
    println!("\ndoc tests");
    let mut command = cargo::command(root);
    command
        .args(["test", "--doc", "--quiet"])
        .args(selection(args))
        .arg("--")
        .args(&args.filter);
    let mut child = process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let (report, status) = follow(&mut child, &mut io::stdout().lock())?;
    outcome.add("doc tests", &report);
    if !status.success() && report.tally.failed == 0 {
        outcome.fail(format!("doc tests: cargo test --doc ended with {status}"));
    }
    Ok(())
}

/// Passes a child's standard output on as it comes, reads the results in it, and waits for the child.
///
/// The end of the child is the end, not that of its output: a process that a test left running would hold that
/// open for ever.
fn follow(child: &mut Child, terminal: &mut impl Write) -> Result<(Report, ExitStatus)> {
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
    use std::path::PathBuf;

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

    #[test]
    fn a_leak_is_a_failure() {
        let mut outcome = Outcome::default();
        outcome.fail("network namespaces left behind: fe-1-0-a".to_owned());
        assert_eq!(
            outcome.tally,
            Tally {
                passed: 0,
                failed: 1,
                skipped: 0
            }
        );
    }
}
