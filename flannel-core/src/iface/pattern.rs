//! `--iface-regex`: a regular expression as Go reads it.

use std::fmt;
use std::str::FromStr;

use regex::bytes::{Regex, RegexBuilder};
use thiserror::Error;

/// A regular expression, found anywhere in a text. Its classes are ASCII's, as in Go's RE2 syntax.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

/// Text that is no regular expression.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not a regular expression: {0}")]
pub struct BadPattern(String);

impl Pattern {
    /// Whether it is found in the text.
    pub fn matches(&self, text: &str) -> bool {
        self.0.is_match(text.as_bytes())
    }

    /// The expression as written.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for Pattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Self, BadPattern> {
        // Without Unicode `.` is a byte, so that only an expression over bytes may have it.
        let regex = RegexBuilder::new(text).unicode(false).build();
        regex.map(Self).map_err(|error| {
            // The library draws the expression, a caret below it, and says on the last line what is wrong.
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default();
            BadPattern(last.trim_start_matches("error: ").to_owned())
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Pattern {}
