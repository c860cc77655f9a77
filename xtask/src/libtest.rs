//! Reads the output of Rust's test harness.

use std::ops::AddAssign;

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
}

impl Report {
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(tally) = summary(line) {
            self.tally += &tally;
            self.summaries += 1;
            self.failures.extend(self.listed.take().unwrap_or_default());
        } else if line == "failures:" {
            // Printed twice: before the output of the failed tests, and before their names.
            self.listed = Some(Vec::new());
        } else if let (Some(listed), Some(name)) = (&mut self.listed, line.strip_prefix("    ")) {
            listed.push(name.to_owned());
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
thread 'a::wrong' panicked at src/a.rs:3:5:

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
