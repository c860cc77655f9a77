//! Lines in the shape of flanneld's: `I1120 22:23:09.177033   15982 main.go:227] message`.

use std::{
    fmt::{self, Write as _},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use super::one_line;

/// Formats events as klog does (upstream: k8s.io/klog/v2, `formatHeader`). Time is local time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Klog;

impl<S, N> FormatEvent<S, N> for Klog
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let stamp = Stamp::local(now.unwrap_or_default());
        let meta = event.metadata();
        let place = (meta.file(), meta.line());
        let mut text = Text::default();
        event.record(&mut text);
        writeln!(
            writer,
            "{}{}{}",
            header(*meta.level(), stamp, std::process::id(), place),
            text.message,
            text.fields
        )
    }
}

/// A moment as people of this place write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    micros: u32,
}

impl Stamp {
    /// The local time so long after 1970 in UTC.
    fn local(since_epoch: Duration) -> Self {
        let seconds = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
        let part = |number: i32| u8::try_from(number).unwrap_or(0);
        // SAFETY: all zeroes is a value of this struct of integers and a pointer that nothing follows.
        #[expect(unsafe_code, reason = "the standard library knows no time zones")]
        let mut parts: libc::tm = unsafe { std::mem::zeroed() };
        // SAFETY: both point to live values of the right type; the function keeps neither.
        #[expect(unsafe_code, reason = "the standard library knows no time zones")]
        let _same = unsafe { libc::localtime_r(&raw const seconds, &raw mut parts) };
        Self {
            month: part(parts.tm_mon + 1),
            day: part(parts.tm_mday),
            hour: part(parts.tm_hour),
            minute: part(parts.tm_min),
            second: part(parts.tm_sec),
            micros: since_epoch.subsec_micros(),
        }
    }
}

/// Everything up to and including `] `, but for that blank.
fn header(level: Level, at: Stamp, pid: u32, (file, line): (Option<&str>, Option<u32>)) -> String {
    // klog has no letter for what its `-v` adds: those lines are I too.
    let letter = match level {
        Level::ERROR => 'E',
        Level::WARN => 'W',
        _ => 'I',
    };
    let file = file.and_then(|path| path.rsplit('/').next());
    format!(
        "{letter}{:02}{:02} {:02}:{:02}:{:02}.{:06} {pid:>7} {}:{}]",
        at.month,
        at.day,
        at.hour,
        at.minute,
        at.second,
        at.micros,
        file.unwrap_or("???"),
        line.unwrap_or(1)
    )
}

/// The message, and behind it what it is about.
#[derive(Debug, Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn put(&mut self, field: &Field, value: &str) {
        let outcome = if field.name() == "message" {
            write!(self.message, " {}", one_line(value))
        } else if let Some(_bridged) = field.name().strip_prefix("log.") {
            // Where a line of the `log` crate came from is in the header.
            Ok(())
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
        debug_assert!(outcome.is_ok(), "a string takes everything");
    }
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format!("{value:?}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, &value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_klogs() {
        let at = Stamp {
            month: 11,
            day: 20,
            hour: 22,
            minute: 23,
            second: 9,
            micros: 177_033,
        };
        // Two lines that flanneld was seen to write.
        assert_eq!(
            header(Level::INFO, at, 15982, (Some("main.go"), Some(227))),
            "I1120 22:23:09.177033   15982 main.go:227]"
        );
        let at = Stamp {
            month: 7,
            day: 8,
            hour: 4,
            micros: 33,
            ..at
        };
        let place = (Some("flannel-agent/src/app/session.rs"), Some(8));
        assert_eq!(
            header(Level::WARN, at, 12_345_678, place),
            "W0708 04:23:09.000033 12345678 session.rs:8]"
        );
        assert_eq!(
            header(Level::ERROR, at, 1, (None, None)),
            "E0708 04:23:09.000033       1 ???:1]"
        );
        assert!(header(Level::TRACE, at, 1, place).starts_with('I'));
    }
}
