//! What the runtime asks for, in environment variables.

use std::path::{Path, PathBuf};

use crate::error::{CniError, INVALID_ENVIRONMENT};

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    const ALL: [Self; 6] = [
        Self::Add,
        Self::Check,
        Self::Del,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    /// Whether it is about one container.
    const fn is_about_one(self) -> bool {
        matches!(self, Self::Add | Self::Check | Self::Del)
    }
}

/// A call. What the command does not need is empty if it was not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) verb: Verb,
    pub(crate) container: String,
    pub(crate) netns: String,
    pub(crate) ifname: String,
    /// Directories in which delegates are looked for.
    pub(crate) path: Vec<PathBuf>,
}

impl Call {
    /// Reads and checks the variables, with upstream's messages (upstream: libcni's `pkg/skel`).
    pub(crate) fn read(variable: &dyn Fn(&str) -> String) -> Result<Self, CniError> {
        let command = variable("CNI_COMMAND");
        let verb = Verb::ALL.into_iter().find(|verb| verb.as_str() == command);
        let one = verb.is_some_and(Verb::is_about_one);
        let needed = [
            ("CNI_CONTAINERID", one),
            ("CNI_NETNS", one && verb != Some(Verb::Del)),
            ("CNI_IFNAME", one),
            ("CNI_PATH", verb.is_some_and(|verb| verb != Verb::Version)),
        ];
        let missing: Vec<&str> = needed
            .iter()
            .filter(|(name, needed)| *needed && variable(name).is_empty())
            .map(|(name, _)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(wrong(format!(
                "required env variables [{}] missing",
                missing.join(",")
            )));
        }
        let Some(verb) = verb else {
            return Err(wrong(format!("unknown CNI_COMMAND: {command}")));
        };
        let call = Self {
            verb,
            container: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS"),
            ifname: variable("CNI_IFNAME"),
            path: std::env::split_paths(&variable("CNI_PATH")).collect(),
        };
        if one {
            if !is_name(&call.container) {
                return Err(wrong("invalid characters in containerID").with_details(call.container));
            }
            check_ifname(&call.ifname)?;
        }
        Ok(call)
    }

    /// Refuses the host's own namespace in place of a container's.
    pub(crate) fn check_netns(&self) -> Result<(), CniError> {
        if std::env::var("CNI_NETNS_OVERRIDE")
            .is_ok_and(|value| value == "1" || value.eq_ignore_ascii_case("true"))
        {
            return Ok(());
        }
        let ours = identity(Path::new("/proc/thread-self/ns/net"));
        // Whether it is there at all is for the delegate to say.
        if ours.is_some() && ours == identity(Path::new(&self.netns)) {
            return Err(CniError::new(
                crate::error::INVALID_NETNS,
                "plugin's netns and netns from CNI_NETNS should not be the same",
            ));
        }
        Ok(())
    }
}

/// Whether this can be a container's or a network's name. It is one component of a path then, and not a hidden one.
pub(crate) fn is_name(text: &str) -> bool {
    let mut letters = text.chars();
    let first = letters.next();
    first.is_some_and(|letter| letter.is_ascii_alphanumeric())
        && letters.all(|letter| letter.is_ascii_alphanumeric() || "_.-".contains(letter))
}

fn check_ifname(name: &str) -> Result<(), CniError> {
    // IFNAMSIZ, with its terminating zero.
    if name.len() > 15 {
        return Err(wrong("interface name is too long")
            .with_details("interface name should be less than 16 characters"));
    }
    if name == "." || name == ".." {
        return Err(wrong("interface name is . or .."));
    }
    if name.contains(['/', ':']) || name.contains(char::is_whitespace) {
        return Err(wrong(
            "interface name contains / or : or whitespace characters",
        ));
    }
    Ok(())
}

fn wrong(msg: impl Into<String>) -> CniError {
    CniError::new(INVALID_ENVIRONMENT, msg)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Call, CniError> {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        Call::read(&|name| variables.get(name).copied().unwrap_or_default().to_owned())
    }

    fn del(container: &str, ifname: &str) -> Result<Call, CniError> {
        read(&[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", container),
            ("CNI_IFNAME", ifname),
            ("CNI_PATH", "/a:/b"),
        ])
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = |command| read(&[("CNI_COMMAND", command)]).unwrap_err();
        let one = "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing";
        assert_eq!(missing("ADD"), wrong(one));
        assert_eq!(missing("CHECK"), wrong(one));
        let del = "required env variables [CNI_CONTAINERID,CNI_IFNAME,CNI_PATH] missing";
        assert_eq!(missing("DEL"), wrong(del));
        for command in ["GC", "STATUS"] {
            assert_eq!(
                missing(command),
                wrong("required env variables [CNI_PATH] missing")
            );
        }
        assert_eq!(missing("add"), wrong("unknown CNI_COMMAND: add"));
        assert_eq!(
            read(&[("CNI_COMMAND", "VERSION")]).unwrap().verb,
            Verb::Version
        );
    }

    #[test]
    fn names_stay_inside_their_directory() {
        for id in [
            "..", ".", "../x", "a/b", "/etc", "", "-x", ".x", "a b", "a\0b", "ä", "a\nb",
        ] {
            assert!(del(id, "eth0").is_err(), "{id:?}");
        }
        for id in ["a", "0", "a..b", "4ab5_-.x", &"f".repeat(64)] {
            assert_eq!(del(id, "eth0").unwrap().container, id);
        }
    }

    #[test]
    fn interface_names_are_the_kernels() {
        for name in ["..", ".", "a/b", "a:b", "a b", "abcdefghijklmnop"] {
            assert_eq!(
                del("a", name).unwrap_err().code,
                INVALID_ENVIRONMENT,
                "{name}"
            );
        }
        let call = del("a", "abcdefghijklmno").unwrap();
        assert_eq!(call.path, [Path::new("/a"), Path::new("/b")]);
    }
}
