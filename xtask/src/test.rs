//! `cargo xtask test`

use std::io::{self, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::cargo::{self, Executable};
use crate::dist::arch::Arches;
use crate::kernels::{self, Done, Kernels, Request, Tier};
use crate::libtest::{Report, Tally};
use crate::namespaces;
use crate::process::{self, Reported};
use crate::setup::{self, Needs};

mod suite;

use suite::{Ran, Suite, follow};

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

    fn add_suite(&mut self, name: &str, (report, status): &Ran) {
        self.add(name, report);
        if report.summaries == 0 || (!status.success() && report.tally.failed == 0) {
            self.fail(format!("{name}: the test binary ended with {status}"));
        }
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
    built.sort_by(|a, b| suite::sort_key(a).cmp(&suite::sort_key(b)));
    Ok(built)
}

/// Tests of agents in labs. They wait more than they work, but more at a time would be late for the seconds after which
/// connections give up.
const LABS_AT_ONCE: usize = 2;

fn run_binaries(built: &[Executable], args: &Args, outcome: &mut Outcome) -> Result<()> {
    let mut words: Vec<String> = args.filter.iter().chain(&args.libtest).cloned().collect();
    let (labs, others): (Vec<_>, Vec<_>) = suite::all(built).into_iter().partition(Suite::is_lab);
    for suite in others {
        if process::interrupted() {
            return Ok(());
        }
        println!("\n{}", suite.heading);
        let ran = suite.run(built, &words, &mut io::stdout().lock())?;
        outcome.add_suite(&suite.name, &ran);
    }
    match labs.as_slice() {
        // Somebody may be looking at just this one.
        [one] => {
            println!("\n{}", one.heading);
            words.push(format!("--test-threads={LABS_AT_ONCE}"));
            let ran = one.run(built, &words, &mut io::stdout().lock())?;
            outcome.add_suite(&one.name, &ran);
            Ok(())
        }
        several => {
            words.push("--test-threads=1".to_owned());
            run_labs(several, built, &words, &mut io::stdout(), outcome)
        }
    }
}

/// Suites of labs beside each other, each of them with one test at a time: none waits for another's slowest test, and the
/// processes that one's tests start do not inherit what another's have open. What they print comes when they end.
fn run_labs(
    suites: &[Suite<'_>],
    built: &[Executable],
    words: &[String],
    terminal: &mut impl Write,
    outcome: &mut Outcome,
) -> Result<()> {
    let waiting = Mutex::new(suites.iter());
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..LABS_AT_ONCE {
            let (sender, waiting) = (sender.clone(), &waiting);
            scope.spawn(move || {
                loop {
                    let next = waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .next();
                    let Some(suite) = next.filter(|_| !process::interrupted()) else {
                        return;
                    };
                    eprintln!("test: {} begins", suite.heading);
                    let mut output = Vec::new();
                    let start = Instant::now();
                    let ran = suite.run(built, words, &mut output);
                    // The other end lives as long as this scope.
                    let _sent = sender.send((suite, output, ran, start.elapsed()));
                }
            });
        }
        drop(sender);
        for (suite, output, ran, took) in results {
            writeln!(terminal, "\n{}, {:.0} s", suite.heading, took.as_secs_f64())
                .and_then(|()| terminal.write_all(&output))
                .and_then(|()| terminal.flush())
                .context("write to standard output")?;
            outcome.add_suite(&suite.name, &ran?);
        }
        Ok(())
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A test binary of the agent's that is a script.
    fn script(dir: &Path, name: &str, text: &str) -> Executable {
        let path = dir.join(name);
        // By another process: one that another test forks from this one holds what is open for writing, and that is not run.
        let written = std::process::Command::new("sh")
            .args([
                "-c",
                "printf '#!/bin/sh\\n%s\\n' \"$2\" > \"$1\" && chmod 755 \"$1\"",
                "sh",
            ])
            .args([path.as_os_str(), text.as_ref()])
            .status();
        assert!(written.expect("sh").success());
        Executable {
            package: "flannel-agent".to_owned(),
            version: "0.1.0".to_owned(),
            manifest_dir: dir.to_owned(),
            target: format!("netns_{name}"),
            kind: "test".to_owned(),
            is_test: true,
            path,
        }
    }

    #[test]
    fn labs_run_beside_each_other_and_all_of_them_count() {
        let dir = tempfile::tempdir().expect("a directory");
        // Each waits for the other to have begun.
        let meet = |mine: &str, other: &str| {
            format!(
                "touch {mine}; for i in $(seq 100); do test -e {other} && break; sleep 0.1; done; test -e {other} || exit 3; \
                 echo 'test result: ok. 2 passed; 0 failed; 0 ignored;'"
            )
        };
        let built = [
            script(dir.path(), "a", &meet("at-a", "at-b")),
            script(dir.path(), "b", &meet("at-b", "at-a")),
            script(dir.path(), "c", "test \"$1\" = word && exit 7"),
        ];
        let mut outcome = Outcome::default();
        let mut output = Vec::new();
        run_labs(
            &suite::all(&built),
            &built,
            &["word".to_owned()],
            &mut output,
            &mut outcome,
        )
        .expect("to run");
        let Outcome { tally, failures } = outcome;
        assert_eq!((tally.passed, tally.failed), (4, 1), "{failures:?}");
        assert_eq!(
            failures,
            ["flannel-agent/tests/netns_c: the test binary ended with exit status: 7"]
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
