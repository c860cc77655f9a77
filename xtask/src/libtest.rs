//! Reads the output of Rust's test harness.

use std::{collections::BTreeMap, ops::AddAssign};

/// Lines of a panic's message that are repeated in the summary: enough to tell what went wrong.
const MESSAGE_LINES: usize = 12;
/// Characters of each of them.
const MESSAGE_WIDTH: usize = 300;

/// What test binaries reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl AddAssign<&Tally> for Tally {
    fn add_assign(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Follows the output of one or more test binaries, line by line.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) tally: Tally,
    pub(crate) failures: Vec<String>,
    /// Summary lines seen: a binary that died early has none.
    pub(crate) summaries: usize,
    listed: Option<Vec<String>>,
    /// The first panic of every failed test.
    panics: BTreeMap<String, Vec<String>>,
    /// The test whose output this is, and whether its panic's message is still going on.
    section: Option<(String, bool)>,
}

impl Report {
    /// Where a failed test panicked and with what words, a few lines at most; none if it did not say.
    pub(crate) fn panic(&self, test: &str) -> &[String] {
        self.panics.get(test).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn line(&mut self, line: &str) {
        if let Some(tally) = summary(line) {
            self.tally += &tally;
            self.summaries += 1;
            self.failures.extend(self.listed.take().unwrap_or_default());
        } else if line == "failures:" {
            // Printed twice: before the output of the failed tests, and before their names.
            self.listed = Some(Vec::new());
            self.section = None;
        } else if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.section = Some((name.to_owned(), false));
        } else if self.section.is_some() {
            self.output(line);
        } else if let (Some(listed), Some(name)) = (&mut self.listed, line.strip_prefix("    ")) {
            listed.push(name.to_owned());
        }
    }

    /// A line of a failed test's output.
    fn output(&mut self, line: &str) {
        let Some((test, goes_on)) = &mut self.section else {
            return;
        };
        let said = self.panics.entry(test.clone()).or_default();
        if said.is_empty() && line.contains("panicked at ") {
            *goes_on = true;
        } else if line.is_empty()
            || said.len() == MESSAGE_LINES
            || ["stack backtrace:", "note: ", "---"]
                .iter()
                .any(|end| line.starts_with(end))
        {
            *goes_on = false;
        }
        if *goes_on {
            said.push(line.chars().take(MESSAGE_WIDTH).collect());
        }
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`.
///
/// Programs that a test starts write to the same output, so the line need not begin there.
fn summary(line: &str) -> Option<Tally> {
    let (_, result) = line.split_once("test result: ")?;
    let (_, counts) = result.split_once(". ")?;
    let count = |word: &str| {
        counts
            .split(';')
            .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
    };
    Some(Tally {
        passed: count("passed")?,
        failed: count("failed")?,
        skipped: count("ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILING: &str = "
running 4 tests
test a::fine ... ok
test a::left_out ... ignored
test a::wrong ... FAILED
test b::worse ... FAILED

failures:

---- a::wrong stdout ----
    an indented line of output
    b::not a name
thread 'a::wrong' panicked at src/a.rs:3:5:
assertion `left == right` failed: the number
  left: 1
 right: 2
stack backtrace:
   0: something
--- the agent said:
thread 'of the agent' panicked at src/b.rs:1:1:

---- b::worse stdout ----


failures:
    a::wrong
    b::worse

test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s
";

    fn read(text: &str) -> Report {
        let mut report = Report::default();
        text.lines().for_each(|line| report.line(line));
        report
    }

    #[test]
    fn counts_and_names_of_failures() {
        let report = read(FAILING);
        assert_eq!(
            report.tally,
            Tally {
                passed: 1,
                failed: 2,
                skipped: 1
            }
        );
        assert_eq!(report.failures, ["a::wrong", "b::worse"]);
        assert_eq!(report.summaries, 1);
    }

    #[test]
    fn a_failure_comes_with_the_words_of_its_panic() {
        let report = read(FAILING);
        assert_eq!(
            report.panic("a::wrong"),
            [
                "thread 'a::wrong' panicked at src/a.rs:3:5:",
                "assertion `left == right` failed: the number",
                "  left: 1",
                " right: 2",
            ]
        );
        assert_eq!(report.panic("b::worse"), [""; 0]);
    }

    #[test]
    fn a_long_message_is_cut() {
        let long = "x".repeat(2 * MESSAGE_WIDTH);
        let lines = format!("{long}\n").repeat(2 * MESSAGE_LINES);
        let report = read(&format!(
            "failures:\n\n---- a stdout ----\nthread 'a' panicked at a.rs:1:1:\n{lines}"
        ));
        let said = report.panic("a");
        assert_eq!(said.len(), MESSAGE_LINES);
        assert!(said.iter().all(|line| line.len() <= MESSAGE_WIDTH));
    }

    #[test]
    fn several_summaries_add_up() {
        let report = read(&format!("{FAILING}{FAILING}"));
        assert_eq!(
            report.tally,
            Tally {
                passed: 2,
                failed: 4,
                skipped: 2
            }
        );
        assert_eq!(report.failures.len(), 4);
        assert_eq!(report.summaries, 2);
    }

    #[test]
    fn a_summary_behind_other_output_counts() {
        let line = "pongtest result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.0s";
        assert_eq!(
            summary(line),
            Some(Tally {
                passed: 12,
                failed: 0,
                skipped: 0
            })
        );
    }

    #[test]
    fn a_binary_that_died_has_no_summary() {
        let report = read("running 2 tests\ntest a ... ok\n");
        assert_eq!(report.summaries, 0);
        assert_eq!(report.tally, Tally::default());
    }
}
