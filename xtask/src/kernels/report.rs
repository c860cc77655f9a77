//! Reading what a guest's first process (`flannel-testkit/examples/guest_init.rs`) says.

use std::collections::BTreeMap;

use crate::libtest::Report;

/// How the lines begin that are not a test's.
const MARK: &str = "@guest ";

/// A test binary that has come to its end.
#[derive(Debug)]
pub(super) struct Suite {
    pub(super) name: String,
    /// `ok`, `code-101`, `signal-9`, `killed-after-600-s`, `not-started:…`.
    pub(super) status: String,
    pub(super) seconds: f32,
    pub(super) report: Report,
    /// All that it printed.
    pub(super) text: String,
}

impl Suite {
    /// What is wrong with it beside the tests that it says have failed.
    pub(super) fn trouble(&self) -> Option<String> {
        if self.report.summaries == 0 {
            return Some(format!(
                "the test binary ended without a result: {}",
                self.status
            ));
        }
        let counted = self.report.tally.failed > 0;
        (self.status != "ok" && !counted)
            .then(|| format!("the test binary ended with {}", self.status))
    }
}

/// What has been said so far.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) release: Option<String>,
    pub(super) suites: Vec<Suite>,
    /// Files that tests left to be kept, by their paths.
    pub(super) files: BTreeMap<String, String>,
    /// Network namespaces that were left behind.
    pub(super) left: Vec<String>,
    /// The kernel's account of what went wrong, which is the last line.
    pub(super) tainted: Option<u64>,
    state: State,
}

/// Whose lines come.
#[derive(Debug, Default)]
enum State {
    #[default]
    Nobody,
    Suite(String, Box<Report>, String),
    File(String),
}

impl Said {
    /// Takes a line; tells when a suite has come to its end.
    pub(super) fn line(&mut self, line: &str) -> Option<&Suite> {
        let line = line.trim_end_matches('\r');
        let Some(words) = line.strip_prefix(MARK) else {
            self.content(line);
            return None;
        };
        let (word, rest) = words.split_once(' ').unwrap_or((words, ""));
        match word {
            "kernel" => self.release = Some(rest.to_owned()),
            "begin" => {
                self.state = State::Suite(rest.to_owned(), Box::default(), String::new());
            }
            "end" => return self.end(rest),
            "file" => {
                self.files.entry(rest.to_owned()).or_default();
                self.state = State::File(rest.to_owned());
            }
            "left" => self.left.push(rest.to_owned()),
            "tainted" => self.tainted = rest.parse().ok(),
            _ => self.content(line),
        }
        None
    }

    fn content(&mut self, line: &str) {
        let text = match &mut self.state {
            State::Nobody => return,
            State::Suite(_, report, text) => {
                report.line(line);
                text
            }
            State::File(name) => self.files.entry(name.clone()).or_default(),
        };
        text.push_str(line);
        text.push('\n');
    }

    fn end(&mut self, rest: &str) -> Option<&Suite> {
        let State::Suite(name, report, text) = std::mem::take(&mut self.state) else {
            return None;
        };
        let mut words = rest.rsplit(' ');
        let seconds = words.next()?.parse().ok()?;
        let status = words.next()?.to_owned();
        self.suites.push(Suite {
            name,
            status,
            seconds,
            report: *report,
            text,
        });
        self.suites.last()
    }

    /// The suite that was running when the machine came to its end.
    pub(super) fn unfinished(&self) -> Option<&str> {
        match &self.state {
            State::Suite(name, ..) => Some(name),
            State::Nobody | State::File(_) => None,
        }
    }

    /// A fact that a test wrote down.
    pub(super) fn fact<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let mut pairs = self.facts(name);
        pairs
            .find(|(rest, _)| rest.is_empty())
            .map(|(_, value)| value)
    }

    /// The facts whose names begin like this, without that beginning, from the file `facts` of lines `name value`.
    pub(super) fn facts<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let text = self.files.get("facts").map_or("", String::as_str);
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Said {
        let mut said = Said::default();
        for line in text.lines() {
            said.line(line);
        }
        said
    }

    const GOOD: &str = "@guest kernel 6.1.0\n@guest begin a/tests/b\nrunning 1 test\n\
                        test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n\n@guest end a/tests/b ok 1.5\n\
                        @guest file facts\nattach tcx\nl2_eth true\n@guest file v/x.log\nprocessed 7 insns\n@guest tainted 0\n";

    #[test]
    fn a_good_guest_is_read() {
        let said = read(GOOD);
        assert_eq!(said.release.as_deref(), Some("6.1.0"));
        assert_eq!(said.tainted, Some(0));
        assert_eq!(said.fact("attach"), Some("tcx"));
        assert_eq!(said.fact("nothing"), None);
        assert_eq!(
            said.files.get("v/x.log").map(String::as_str),
            Some("processed 7 insns\n")
        );
        let [suite] = &said.suites[..] else {
            panic!("{said:?}")
        };
        assert_eq!(
            (suite.name.as_str(), suite.report.tally.passed),
            ("a/tests/b", 1)
        );
        assert_eq!(suite.trouble(), None);
        assert_eq!(said.unfinished(), None);
    }

    #[test]
    fn a_suite_that_died_is_trouble() {
        let said =
            read("@guest begin x\nrunning 2 tests\ntest a ... ok\n\n@guest end x signal-11 3.0\n");
        assert!(
            said.suites[0]
                .trouble()
                .expect("trouble")
                .contains("signal-11")
        );
        let text = GOOD.replace("end a/tests/b ok", "end a/tests/b code-101");
        assert!(
            read(&text).suites[0]
                .trouble()
                .expect("trouble")
                .contains("code-101")
        );
    }

    #[test]
    fn a_machine_that_stopped_half_way_has_no_last_line() {
        let said = read("@guest kernel 6.1.0\n@guest begin x\nrunning 2 tests\n");
        assert_eq!(said.tainted, None);
        assert_eq!(said.unfinished(), Some("x"));
    }
}
