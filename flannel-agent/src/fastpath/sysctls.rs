//! The kernel settings that the gate depends on: written where that is needed, read back always, never taken back.
//!
//! They stay when the agent ends: connections that went around the stack would be called invalid the moment they return to it.

use std::{fs, io, path::Path};

use flannel_core::fastpath::{Sysctl, Sysctls};

/// Where the settings of this network namespace are.
const DIR: &str = "/proc/sys/net/netfilter";
/// There as soon as connections are tracked.
const TRACKING: &str = "nf_conntrack_max";

const BE_LIBERAL: &str = "nf_conntrack_tcp_be_liberal";
const IGNORE_INVALID_RST: &str = "nf_conntrack_tcp_ignore_invalid_rst";
const LOOSE: &str = "nf_conntrack_tcp_loose";

/// Reads the settings, after an attempt to set them if `set`.
pub(super) fn look(set: bool) -> Sysctls {
    let wanted = |name| if set { ensure(name) } else { read(name) };
    Sysctls {
        tracking: Path::new(DIR).join(TRACKING).exists(),
        be_liberal: wanted(BE_LIBERAL),
        ignore_invalid_rst: wanted(IGNORE_INVALID_RST),
        loose: read(LOOSE),
    }
}

/// Sets a setting to 1 where it is something else, and reads it back.
fn ensure(name: &'static str) -> Sysctl {
    let before = read(name);
    let Some(value) = before.value.filter(|value| *value != 1) else {
        return before;
    };
    let written = fs::write(Path::new(DIR).join(name), "1");
    let mut after = read(name);
    match written {
        Ok(()) if after.value == Some(1) => {
            tracing::info!(
                setting = format!("net.netfilter.{name}"),
                before = value,
                "set to 1 for the fast path; it stays so"
            );
        }
        Ok(()) => {}
        Err(error) => after.error = Some(error.to_string()),
    }
    after
}

fn read(name: &'static str) -> Sysctl {
    let text = fs::read_to_string(Path::new(DIR).join(name));
    let value = text.and_then(|text| {
        text.trim()
            .parse()
            .map_err(|_not_a_number| io::Error::other(format!("its value is {:?}", text.trim())))
    });
    match value {
        Ok(value) => Sysctl {
            name,
            value: Some(value),
            error: None,
        },
        Err(error) => Sysctl {
            name,
            value: None,
            error: Some(error.to_string()),
        },
    }
}
