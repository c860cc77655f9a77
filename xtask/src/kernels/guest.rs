//! One guest from its initramfs to the account of its tests.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::cpio::Archive;
use super::debian;
use super::machine::{self, End, Machine};
use super::modules;
use super::nics::Cards;
use super::programs::Programs;
use super::report::Said;
use super::suites::{Place, Tier};
use crate::libtest::Report;

/// Many times what a guest needs on an idle machine.
const LIMIT: Duration = Duration::from_hours(1);
/// What a test binary may take.
const SUITE_LIMIT: Duration = Duration::from_mins(20);
/// How many times longer than here things may take there.
const PATIENCE: u32 = 8;

/// How a guest went.
pub(crate) struct Done {
    /// `7.2 arm64`, and what the machine lacked.
    pub(crate) label: String,
    pub(crate) suites: Vec<(String, Report)>,
    /// What went wrong beside tests that failed.
    pub(crate) troubles: Vec<String>,
    /// Tests that were left out, and why.
    pub(crate) not_run: Vec<String>,
    /// What the kernel has, in a few words.
    pub(crate) facts: String,
    pub(crate) took: Duration,
    /// Where the console and everything else is.
    pub(crate) place: PathBuf,
}

/// A guest to be.
pub(super) struct Guest<'a> {
    pub(super) dir: &'a Path,
    pub(super) place: Place,
    pub(super) tier: Tier,
    pub(super) filter: Option<&'a str>,
    pub(super) programs: &'a Programs,
    pub(super) base: &'a Archive,
}

impl Guest<'_> {
    /// Runs it; never fails, because others are to run after it.
    pub(super) fn run(&self) -> Done {
        let started = Instant::now();
        let mut done = Done {
            label: self.label(self.place.kernel.name()),
            suites: Vec::new(),
            troubles: Vec::new(),
            not_run: Vec::new(),
            facts: String::new(),
            took: Duration::ZERO,
            place: self.home(),
        };
        if let Err(error) = self.boot(&mut done) {
            done.troubles.push(format!("{error:#}"));
        }
        done.took = started.elapsed();
        done
    }

    fn label(&self, kernel: &str) -> String {
        let Place { arch, case, .. } = self.place;
        format!("{kernel} {arch}{}", case.description())
    }

    /// The directory of its files.
    fn home(&self) -> PathBuf {
        let Place { kernel, arch, case } = self.place;
        self.dir
            .join(format!("{}-{arch}-{}", kernel.name(), case.name()))
    }

    fn boot(&self, done: &mut Done) -> Result<()> {
        let Place { kernel, arch, case } = self.place;
        let home = self.home();
        if home.exists() {
            fs::remove_dir_all(&home).with_context(|| format!("remove {}", home.display()))?;
        }
        fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
        let files = debian::fetch(self.dir, kernel, arch, false)?;
        done.label = self.label(series(&files.release));
        let staged = home.join("modules");
        modules::stage(&files, case.withheld(), &staged)?;
        let mut archive = self.base.clone();
        // /lib is a link to /usr/lib.
        let mut of_kernel = Archive::default();
        of_kernel.add_below(&staged)?;
        archive.merge_below("/usr", of_kernel);
        archive.add("/guest/plan.json", self.plan(done).into_bytes());
        let initrd = home.join("initramfs.cpio");
        archive.write(&initrd)?;
        drop(archive);
        let machine = Machine {
            arch,
            vmlinuz: &files.vmlinuz,
            initrd: &initrd,
            append: case.append(),
            cards: case.cards(),
            console: home.join("console.log"),
            results: home.join("results.log"),
        };
        let mut follower = Follower::new(&machine.results, &done.label);
        let end = machine::run(&machine, LIMIT, || follower.look())?;
        follower.look();
        let said = follower.end();
        // Quickly made again, and large.
        fs::remove_file(&initrd).with_context(|| format!("remove {}", initrd.display()))?;
        fs::remove_dir_all(&staged).with_context(|| format!("remove {}", staged.display()))?;
        Self::judge(done, said, end, &machine.console)
    }

    fn plan(&self, done: &mut Done) -> String {
        let mut suites = Vec::new();
        for (target, tests) in self.place.suites(self.tier) {
            let Some(test) = self
                .programs
                .tests
                .iter()
                .find(|test| test.target == target)
            else {
                continue;
            };
            let mut args = vec!["--test-threads=1".to_owned()];
            if let Some(filter) = self.filter {
                args.push(filter.to_owned());
            } else if !tests.is_empty() {
                args.push("--exact".to_owned());
                let is_left_out = |test: &str| {
                    let rows = self.place.left_out(target);
                    rows.iter().any(|(name, _)| test.starts_with(name))
                };
                let here = tests.iter().filter(|test| !is_left_out(test));
                args.extend(here.map(|test| (*test).to_owned()));
            }
            let is_asked_for =
                |name: &str| tests.is_empty() || tests.iter().any(|test| test.starts_with(name));
            for (name, why) in self.place.left_out(target) {
                if !is_asked_for(name) {
                    continue;
                }
                args.extend(["--skip".to_owned(), name.to_owned()]);
                done.not_run.push(format!("{target}::{name}: {why}"));
            }
            let rows = self.place.left_out(target);
            let is_left_out = |test: &str| rows.iter().any(|(name, _)| test.starts_with(name));
            if !tests.is_empty() && tests.iter().all(|test| is_left_out(test)) {
                // With no name at all every test of the binary would run.
                continue;
            }
            let manifest_dir = test.manifest_dir.display().to_string();
            suites.push(json!({
                "name": format!("flannel-agent/tests/{target}"),
                "program": test.path,
                "args": args,
                "dir": "/",
                "limit": SUITE_LIMIT.as_secs(),
                "env": {
                    "CARGO_MANIFEST_DIR": manifest_dir,
                    "CARGO_PKG_NAME": "flannel-agent",
                    "CARGO_PKG_VERSION": test.version,
                    "FLANNEL_TEST_REQUIRE_ROOT": "1",
                    "FLANNEL_TEST_PATIENCE": PATIENCE.to_string(),
                    "FLANNEL_TEST_LACKS": self.place.lacks(),
                    // Its modules are nobody else's.
                    "FLANNEL_TEST_OWN_KERNEL": "1",
                    "FLANNEL_AGENT": self.programs.agent,
                },
            }));
        }
        if self.place.case.cards().is_some() {
            for suite in &mut suites {
                suite["env"]["FLANNEL_LAB_NICS"] = Cards::addresses().into();
            }
        }
        json!({
            "modules": modules::LOADED,
            "refuse_bpf": self.place.case.refuse_bpf(),
            "suites": suites,
        })
        .to_string()
    }

    fn judge(done: &mut Done, said: Said, end: End, console: &Path) -> Result<()> {
        match end {
            End::Ended => {}
            End::TooLong => done.troubles.push(format!(
                "it still ran after {} min and was ended",
                LIMIT.as_secs() / 60
            )),
            End::Interrupted => done.troubles.push("interrupted".to_owned()),
        }
        if let Some(name) = said.unfinished() {
            done.troubles.push(format!("{name} had not ended"));
        }
        match said.tainted {
            Some(0) => {}
            Some(flags) => done.troubles.push(format!(
                "the kernel warned (tainted: {flags}), see {}",
                console.display()
            )),
            None => done.troubles.push(format!(
                "it did not come to its end: {}",
                last_line(console)
            )),
        }
        if !said.left.is_empty() {
            done.troubles.push(format!(
                "network namespaces left behind: {}",
                said.left.join(" ")
            ));
        }
        for (name, text) in &said.files {
            let path = done.place.join(name);
            if let Some(above) = path.parent() {
                fs::create_dir_all(above).with_context(|| format!("create {}", above.display()))?;
            }
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        done.facts = facts(&said);
        for suite in said.suites {
            if let Some(trouble) = suite.trouble() {
                done.troubles.push(format!("{}: {trouble}", suite.name));
            }
            done.suites.push((suite.name, suite.report));
        }
        Ok(())
    }
}

/// What the kernel can, and how much work the largest program was for the verifier.
fn facts(said: &Said) -> String {
    let with = |name: &'static str, word: &str| {
        let value = said.fact(name)?;
        Some(if value == "true" {
            word.to_owned()
        } else {
            format!("no {word}")
        })
    };
    let largest = said
        .facts("insns_")
        .filter_map(|(name, count)| Some((count.parse::<u64>().ok()?, name)))
        .max();
    let known = [
        said.fact("attach").map(str::to_owned),
        with("l2_eth", "L2_ETH"),
        with("decap_l4_udp", "DECAP_L4_UDP"),
        largest.map(|(count, name)| format!("{count} instructions seen in {name}")),
    ];
    known.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Reads a file that grows, and tells of each test binary that has ended.
struct Follower<'a> {
    path: &'a Path,
    label: &'a str,
    read: u64,
    rest: Vec<u8>,
    said: Said,
}

impl<'a> Follower<'a> {
    fn new(path: &'a Path, label: &'a str) -> Self {
        Self {
            path,
            label,
            read: 0,
            rest: Vec::new(),
            said: Said::default(),
        }
    }

    fn look(&mut self) {
        use std::io::{Seek as _, SeekFrom};
        let Ok(mut file) = fs::File::open(self.path) else {
            return;
        };
        let mut bytes = Vec::new();
        let more = file
            .seek(SeekFrom::Start(self.read))
            .and_then(|_| file.read_to_end(&mut bytes));
        // What cannot be read now can the next time; a file that stays unreadable has no last line, which is a failure.
        self.read += more.unwrap_or(0) as u64;
        for byte in bytes {
            if byte == b'\n' {
                self.line();
            } else {
                self.rest.push(byte);
            }
        }
    }

    fn line(&mut self) {
        let line = String::from_utf8_lossy(&self.rest).into_owned();
        self.rest.clear();
        if let Some(suite) = self.said.line(&line) {
            let tally = &suite.report.tally;
            let trouble = suite.trouble();
            if trouble.is_some() || tally.failed > 0 {
                print!("\n{}", suite.text);
            }
            println!(
                "{}: {}: {} passed, {} failed{} ({:.0} s)",
                self.label,
                suite.name,
                tally.passed,
                tally.failed,
                trouble.map_or_else(String::new, |trouble| format!(", {trouble}")),
                suite.seconds
            );
        }
    }

    fn end(mut self) -> Said {
        if !self.rest.is_empty() {
            self.line();
        }
        self.said
    }
}

/// `5.10` of `5.10.0-32-cloud-amd64`.
fn series(release: &str) -> &str {
    let second = release.match_indices('.').nth(1);
    second
        .and_then(|(at, _)| release.get(..at))
        .unwrap_or(release)
}

fn last_line(console: &Path) -> String {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines().rev().map(str::trim);
    lines
        .find(|line| !line.is_empty())
        .map_or_else(|| "its console is silent".to_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_is_the_first_two_numbers() {
        assert_eq!(series("5.10.0-32-cloud-amd64"), "5.10");
        assert_eq!(series("7.2.12+deb13-cloud-amd64"), "7.2");
    }
}
