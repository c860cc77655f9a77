//! Printing, in one place.

use std::io::Write as _;

use comfy_table::{Table, presets::NOTHING};

use super::args::PROGRAM;
use crate::telemetry::one_line;

/// Prints one line to standard output. A closed pipe ends the program quietly, as `head` expects.
pub(super) fn line(text: &str) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// Prints one line to standard error.
pub(super) fn complaint(text: &str) {
    complaint_of(PROGRAM, text);
}

/// Prints one line of the program of that name to standard error.
pub(super) fn complaint_of(program: &str, text: &str) {
    // Nobody to tell if standard error is closed.
    let _closed = writeln!(
        std::io::stderr(),
        "{}",
        one_line(&format!("{program}: {text}"))
    );
}

/// Prints one line to standard error as it is.
pub(super) fn plain_complaint(text: &str) {
    // Nobody to tell if standard error is closed.
    let _closed = writeln!(std::io::stderr(), "{}", one_line(text));
}

/// Prints rows under a header, aligned, without a frame.
pub(super) fn rows(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let mut table = Table::new();
    *table.style_mut() = NOTHING;
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for text in table.lines() {
        line(text.trim_end());
    }
}

/// Prints name and value pairs, aligned.
pub(super) fn pairs(rows: Vec<Vec<String>>) {
    let mut table = Table::new();
    *table.style_mut() = NOTHING;
    for row in rows {
        table.add_row(row);
    }
    for text in table.lines() {
        line(text.trim_end());
    }
}
