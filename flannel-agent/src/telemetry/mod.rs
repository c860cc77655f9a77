//! Logging: text on standard error, one INFO line per change made to the kernel.

mod klog;

use std::{error::Error, io::IsTerminal as _};

use tracing::subscriber::set_global_default;
use tracing_subscriber::{EnvFilter, fmt};

use crate::cli::LogFormat;

/// Starts logging. flannel's `-v`: 0 is info, 1 debug, 2 and more trace; `RUST_LOG` overrides.
pub(crate) fn init(verbosity: u8, format: LogFormat) {
    let level = match verbosity {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    // The netlink library warns of a full socket buffer, which our monitor already handles; the Kubernetes library writes a line for
    // each request that failed, which we do once.
    let quiet = "netlink_proto=error,aya=warn,tower=warn,h2=warn,hyper=warn,hyper_util=warn,rustls=warn,kube_client=off";
    let fallback = format!("{level},{quiet}");
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_unset| EnvFilter::new(fallback));
    let lines = fmt::Subscriber::builder()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && format == LogFormat::Text)
        .with_target(false);
    // Set already only when a test runs two daemons in one process.
    let _already = match format {
        LogFormat::Text => set_global_default(lines.finish()),
        LogFormat::Klog => set_global_default(lines.event_format(klog::Klog).finish()),
        LogFormat::Json => set_global_default(lines.json().flatten_event(true).finish()),
    };
}

/// An error with its causes, each once: `attach program x: bpf_link_create: Operation not permitted`.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

/// Keeps what others wrote, such as a name with a line break in it, from looking like lines of ours.
pub(crate) fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}
