//! Arguments as Go's `flag` package and older releases of flannel take them, rewritten to what clap reads.
//!
//! Pure: arguments in, arguments and warnings out. Go ends at the first argument that is no flag and silently drops the rest; here
//! such an argument is an error.

use std::{collections::BTreeMap, ffi::OsString};

use clap::{ArgAction, Command};

use super::{boolean, old};

/// What comes after the name of a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// Nothing; Go would accept `=true` and `=false`.
    Nothing,
    /// Nothing, or a boolean after `=`.
    Boolean,
    /// A value, after `=` or as the next argument.
    Value {
        /// Whether an empty value is the same as none.
        optional: bool,
    },
}

/// What is left of the arguments, and what to say of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rewritten {
    pub(super) arguments: Vec<OsString>,
    pub(super) warnings: Vec<String>,
}

/// Rewrites the arguments, the first of which is the program's name, for a `command` that has been built.
pub(super) fn rewrite(
    command: &Command,
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<Rewritten, String> {
    let known = known(command);
    let mut out = Rewritten::default();
    let mut arguments = arguments.into_iter().peekable();
    out.arguments.extend(arguments.next());
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        if text == "--" {
            out.arguments.push(argument);
            break;
        }
        let Some((name, inline)) = flag(text) else {
            out.arguments.push(argument);
            continue;
        };
        let mut name = name.to_owned();
        let mut inline = inline.map(str::to_owned);
        let was = old::find(&name);
        let takes = match was {
            Some(old::Flag::Refused(why)) => return Err(format!("--{name} {why}")),
            Some(old::Flag::Renamed(new, why)) => {
                out.warnings.push(format!("--{name} {why}"));
                new.clone_into(&mut name);
                known.get(new).copied()
            }
            Some(old::Flag::Ignored { boolean: true, .. }) => Some(Takes::Boolean),
            Some(old::Flag::Ignored { boolean: false, .. }) => {
                Some(Takes::Value { optional: true })
            }
            None => known.get(&name).copied(),
        };
        if takes == Some(Takes::Boolean) && inline.is_none() {
            let next = arguments.peek().and_then(|next| next.to_str());
            if let Some(next) = next.filter(|next| boolean(next).is_ok()) {
                return Err(format!(
                    "'--{name} {next}' does not say what it seems to, and flannel would ignore all that follows: write --{name}={next}"
                ));
            }
        }
        let separate = match takes {
            Some(Takes::Value { .. }) if inline.is_none() => arguments.next(),
            _ => None,
        };
        if let Some(old::Flag::Ignored { why, .. }) = was {
            let off = inline.as_deref().is_some_and(|v| boolean(v) == Ok(false));
            if !(off && name == old::SILENT_WHEN_OFF) {
                out.warnings.push(format!("--{name} {why}"));
            }
            continue;
        }
        match (takes, &inline) {
            (Some(Takes::Value { optional: true }), Some(value)) if value.is_empty() => continue,
            (Some(Takes::Value { optional: true }), None)
                if separate.as_ref().is_some_and(|value| value.is_empty()) =>
            {
                continue;
            }
            (Some(Takes::Nothing), Some(value)) => match boolean(value) {
                Ok(true) => inline = None,
                Ok(false) => continue,
                Err(_) => {}
            },
            _ => {}
        }
        let dashes = if name.len() == 1 { "-" } else { "--" };
        out.arguments.push(match inline {
            Some(value) => format!("{dashes}{name}={value}").into(),
            None => format!("{dashes}{name}").into(),
        });
        out.arguments.extend(separate);
    }
    out.arguments.extend(arguments);
    Ok(out)
}

/// All flags, of subcommands too.
fn known(command: &Command) -> BTreeMap<String, Takes> {
    let commands = std::iter::once(command).chain(command.get_subcommands());
    let mut known = BTreeMap::new();
    for argument in commands.flat_map(Command::get_arguments) {
        let takes = match argument.get_action() {
            ArgAction::Set | ArgAction::Append if argument.is_require_equals_set() => {
                Takes::Boolean
            }
            ArgAction::Set | ArgAction::Append => Takes::Value {
                optional: argument.get_default_values().is_empty(),
            },
            _ => Takes::Nothing,
        };
        known.extend(argument.get_long().map(|long| (long.to_owned(), takes)));
        known.extend(argument.get_short().map(|short| (short.to_string(), takes)));
    }
    known
}

/// Name and value of `-name`, `--name`, `-name=value` and `--name=value`. `-v4` and `-ojson` are clap's own.
fn flag(text: &str) -> Option<(&str, Option<&str>)> {
    let rest = text.strip_prefix('-')?;
    let (rest, short) = match rest.strip_prefix('-') {
        Some(rest) => (rest, false),
        None => (rest, true),
    };
    let short_with_value = matches!(rest, "ojson" | "otable")
        || rest
            .strip_prefix('v')
            .is_some_and(|level| level.starts_with(|c: char| c.is_ascii_digit()));
    if rest.is_empty() || rest.starts_with('-') || (short && short_with_value) {
        return None;
    }
    Some(match rest.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (rest, None),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use proptest::prelude::*;

    use super::*;
    use crate::cli::Args;

    fn read(arguments: &[&str]) -> Result<(String, Vec<String>), String> {
        let mut command = Args::command();
        command.build();
        let arguments = std::iter::once(&"flanneld").chain(arguments);
        rewrite(&command, arguments.map(OsString::from)).map(|out| {
            let words: Vec<_> = out.arguments.iter().skip(1).collect();
            let words: Vec<_> = words.iter().filter_map(|word| word.to_str()).collect();
            (words.join(" "), out.warnings)
        })
    }

    #[test]
    fn gos_spelling_is_made_claps() {
        for (given, expected) in [
            (
                &["-iface=eth0", "-iface", "eth1"][..],
                "--iface=eth0 --iface eth1",
            ),
            (&["--iface", "eth0", "-ip-masq"], "--iface eth0 --ip-masq"),
            (
                &["-v=4", "--v", "10", "-v4", "-v", "-10"],
                "-v=4 -v 10 -v4 -v -10",
            ),
            (
                &["-ip-masq=F", "-healthz-port=0"],
                "--ip-masq=F --healthz-port=0",
            ),
            (&["-etcd-password", "-iface=x"], "--etcd-password -iface=x"),
            (
                &["-etcd-password", "--", "-iface=x"],
                "--etcd-password -- --iface=x",
            ),
            (
                &["-vmodule=a=1", "--log_backtrace_at", "x:1"],
                "--vmodule=a=1 --log_backtrace_at x:1",
            ),
            (&["-bogus=1", "-x"], "--bogus=1 -x"),
            (&["-version=true", "--version=false"], "--version"),
            (&["-h=1", "-help=0"], "-h"),
            (&["status", "-ojson", "-o", "json"], "status -ojson -o json"),
            (&["--", "-iface=x"], "-- -iface=x"),
            (&["-"], "-"),
            // What flannel takes an empty value for: nothing given.
            (&["-public-ip=", "--iface", "", "-etcd-keyfile="], ""),
            (&["-etcd-prefix="], "--etcd-prefix="),
        ] {
            let (read, warnings) = read(given).expect("arguments");
            assert_eq!(read, expected, "{given:?}");
            assert_eq!(warnings, Vec::<String>::new(), "{given:?}");
        }
    }

    #[test]
    fn a_boolean_after_a_blank_is_refused() {
        for (given, fix) in [
            (
                &["--ip-masq", "true", "--kube-subnet-mgr"][..],
                "write --ip-masq=true",
            ),
            (
                &["-iptables-forward-rules", "False"],
                "write --iptables-forward-rules=False",
            ),
            (&["-logtostderr", "1"], "write --logtostderr=1"),
        ] {
            let error = read(given).expect_err("refused");
            assert!(error.ends_with(fix), "{given:?}: {error}");
        }
    }

    #[test]
    fn old_flags_are_told_about() {
        for (given, left, warning) in [
            (&["-interface=eth0"][..], "--iface=eth0", "--interface"),
            (&["-interface", "eth0"], "--iface eth0", "--iface"),
            (
                &["-etcd-endpoint", "http://a:1"],
                "--etcd-endpoints http://a:1",
                "--etcd-endpoints",
            ),
            (&["-logtostderr", "-v=1"], "-v=1", "--logtostderr"),
            (&["--alsologtostderr=true"], "", "--alsologtostderr"),
            (&["-stderrthreshold=INFO"], "", "--stderrthreshold"),
            (&["-log_dir", "/var/log", "-v=1"], "-v=1", "--log_dir"),
            (&["-subnet-dir=/var/lib"], "", "--subnet-dir"),
            (
                &["--use-multi-cluster-cidr"],
                "",
                "--use-multi-cluster-cidr",
            ),
            (
                &["--use-multi-cluster-cidr=true"],
                "",
                "--use-multi-cluster-cidr",
            ),
        ] {
            let (read, warnings) = read(given).expect("arguments");
            assert_eq!(read, left, "{given:?}");
            assert!(
                matches!(&warnings[..], [line] if line.contains(warning)),
                "{given:?}: {warnings:?}"
            );
        }
        assert_eq!(
            read(&["--use-multi-cluster-cidr=false"]),
            Ok((String::new(), vec![]))
        );
        for (given, fix) in [
            (&["-networks=a,b"][..], "--etcd-prefix"),
            (&["-watch-networks"], "--etcd-prefix"),
            (&["-listen=:8888"], "--etcd-endpoints"),
            (&["-remote", "10.0.0.1:8888"], "--etcd-endpoints"),
            (&["-remote-keyfile=/k"], "--etcd-endpoints"),
            (&["-remote-certfile=/k"], "--etcd-endpoints"),
            (&["-remote-cafile=/k"], "--etcd-endpoints"),
        ] {
            let error = read(given).expect_err("refused");
            assert!(error.contains(fix), "{given:?}: {error}");
        }
    }

    proptest! {
        /// Nothing is made up: what comes out is what was given, or is left out.
        #[test]
        fn any_arguments_are_rewritten_or_refused(
            words in proptest::collection::vec(
                prop_oneof![
                    "-{0,3}[a-z=\\-\\.\"]{0,9}",
                    "--?(iface|ip-masq|v|etcd-password|interface|log_dir|version|public-ip)(=[a-z0-9]{0,3})?",
                    "(?s).{0,6}",
                ],
                0..8,
            ),
        ) {
            let given: Vec<&str> = words.iter().map(String::as_str).collect();
            if let Ok((left, _)) = read(&given) {
                prop_assert!(left.split(' ').count() <= given.join(" ").split(' ').count() + 1);
            }
        }
    }
}
