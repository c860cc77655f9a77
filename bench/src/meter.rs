//! How far a run is, on standard error.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

const WIDTH: usize = 28;

/// A bar on a terminal; elsewhere a line for each new stage.
#[derive(Debug)]
pub struct Meter {
    total: usize,
    done: usize,
    stage: String,
    start: Instant,
    terminal: bool,
}

impl Meter {
    /// For so many samples.
    pub fn new(total: usize) -> Self {
        Self {
            total: total.max(1),
            done: 0,
            stage: String::new(),
            start: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// What comes next.
    pub fn stage(&mut self, stage: &str) {
        stage.clone_into(&mut self.stage);
        if self.terminal {
            self.draw("");
        } else {
            write(&format!(
                "[{:>3} %] {stage}{}\n",
                self.done * 100 / self.total,
                self.left()
            ));
        }
    }

    /// A sample is done.
    pub fn step(&mut self, detail: &str) {
        self.done = (self.done + 1).min(self.total);
        if self.terminal {
            self.draw(detail);
        }
    }

    /// A line that stays.
    pub fn note(&self, line: &str) {
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        write(&format!("{clear}{line}\n"));
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if self.terminal {
            write("\r\x1b[K");
        }
    }

    fn draw(&self, detail: &str) {
        let filled = self.done * WIDTH / self.total;
        write(&format!(
            "\r\x1b[K[{}{}] {:>3} % {} {detail}{}",
            "#".repeat(filled),
            ".".repeat(WIDTH - filled),
            self.done * 100 / self.total,
            self.stage,
            self.left()
        ));
    }

    fn left(&self) -> String {
        if self.done * 20 < self.total {
            return String::new();
        }
        let all = self.start.elapsed().as_secs_f64() * self.total as f64 / self.done as f64;
        let left = Duration::from_secs_f64(all).saturating_sub(self.start.elapsed());
        let seconds = left.as_secs();
        format!(", {}:{:02} left", seconds / 60, seconds % 60)
    }
}

fn write(text: &str) {
    let mut out = std::io::stderr();
    // Nobody to tell if standard error is closed.
    let _closed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
