//! From the command line and the environment to [`Args`].

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use clap::{
    Command, CommandFactory as _, FromArgMatches as _,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::{Args, KubeVariables, PROGRAM, check, quotes, spelling};

impl Args {
    /// Reads the command line, the first argument being the program's name, and the environment for what is not on it.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        command.build();
        let read = spelling::rewrite(&command, arguments)
            .map_err(|text| Self::command().error(ErrorKind::InvalidValue, text))?;
        let mut warnings = read.warnings;
        warnings.extend(unread_variables(&command, std::env::vars_os()));
        let command = Self::command().mut_args(|arg| {
            let value = arg.get_env().and_then(std::env::var_os);
            if value.is_some_and(|value| value.is_empty()) {
                // To upstream, and to manifests that always set it, an empty variable is none.
                arg.env(Resettable::Reset)
            } else {
                arg.hide_env_values(true)
            }
        });
        let command = check::offer(command);
        let odd = odd(&read.arguments, &command);
        let program = program(read.arguments.first());
        let mut matches =
            command
                .try_get_matches_from(read.arguments)
                .map_err(|error| match odd {
                    Some(odd) if error.kind() == ErrorKind::InvalidUtf8 => Self::command().error(
                        ErrorKind::InvalidUtf8,
                        format!("{odd} is not UTF-8: write it in UTF-8"),
                    ),
                    _ => error,
                })?;
        let behind = matches.clone();
        let mut args = Self::from_arg_matches_mut(&mut matches)?;
        check::merge(&mut args, &behind)?;
        warnings.extend(quotes::strip(&mut args));
        args.kube.variables = KubeVariables::read(|name| std::env::var(name).ok());
        args.program = program;
        args.warnings = warnings;
        Ok(args)
    }

    /// The environment variable that a complaint is about, if it was not the command line.
    pub fn variable_of(error: &clap::Error) -> Option<String> {
        let (Some(ContextValue::String(name)), Some(ContextValue::String(value))) = (
            error.get(ContextKind::InvalidArg),
            error.get(ContextKind::InvalidValue),
        ) else {
            return None;
        };
        let mut command = Self::command();
        command.build();
        let arg = command
            .get_arguments()
            .find(|arg| arg.to_string() == *name)?;
        let variable = arg.get_env()?;
        let given = std::env::var_os(variable).is_some_and(|given| given.to_str() == Some(value));
        given.then(|| variable.to_string_lossy().into_owned())
    }
}

/// The first argument or variable that is not UTF-8. Of a variable only the name: it may be a password.
fn odd(arguments: &[OsString], command: &Command) -> Option<String> {
    let argument = arguments.iter().find(|given| given.to_str().is_none());
    let argument = argument.map(|given| given.display().to_string());
    argument.or_else(|| {
        let variables = command.get_arguments().filter_map(|arg| arg.get_env());
        let mut odd =
            variables.filter(|name| std::env::var_os(name).is_some_and(|v| v.to_str().is_none()));
        odd.next().map(|name| name.display().to_string())
    })
}

/// The name under which the program was called, such as `flanneld` in a manifest of flannel's.
pub(in crate::cli) fn program(first: Option<&OsString>) -> String {
    let name = first.and_then(|first| Path::new(first).file_name());
    name.map_or(PROGRAM.into(), OsStr::to_string_lossy)
        .into_owned()
}

/// A misspelt variable is as good as none, and nothing else would say so. Kubernetes sets some for a service named flanneld.
fn unread_variables(
    command: &Command,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Vec<String> {
    let known: Vec<String> = command
        .get_arguments()
        .filter_map(|arg| arg.get_env())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    let mut unread: Vec<String> = variables
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| name.starts_with("FLANNELD_") && !known.contains(name))
        .filter(|name| {
            let rest = name.trim_start_matches("FLANNELD_");
            !(rest.starts_with("SERVICE_") || rest.starts_with("PORT") || rest == "VERSION")
        })
        .collect();
    unread.sort();
    let bare = |name: &str| name.replace('_', "");
    let tell = |name: String| {
        let similar = known.iter().find(|known| bare(known) == bare(&name));
        let hint = similar.map(|similar| format!(": did you mean {similar}?"));
        format!(
            "{name} is set, but no flag reads it{}",
            hint.unwrap_or_default()
        )
    };
    unread.into_iter().map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_called_as_it_was_called() {
        for (first, name) in [
            (Some("/opt/bin/flanneld"), "flanneld"),
            (Some("flannel-agent"), "flannel-agent"),
            (Some(""), "flannel-agent"),
            (None, "flannel-agent"),
        ] {
            assert_eq!(program(first.map(OsString::from).as_ref()), name);
        }
    }

    #[test]
    fn misspelt_variables_are_told_about() {
        let mut command = Args::command();
        command.build();
        let unread = |names: &[&str]| {
            let variables = names.iter().map(|name| ((*name).into(), "x".into()));
            unread_variables(&command, variables)
        };
        assert_eq!(
            unread(&[
                "FLANNELD_IPMASQ",
                "FLANNELD_NETWORKS",
                "FLANNELD_IFACE",
                "HOME"
            ]),
            [
                "FLANNELD_IPMASQ is set, but no flag reads it: did you mean FLANNELD_IP_MASQ?",
                "FLANNELD_NETWORKS is set, but no flag reads it",
            ]
        );
        let service = [
            "FLANNELD_SERVICE_HOST",
            "FLANNELD_PORT_8472_UDP",
            "FLANNELD_PORT",
        ];
        assert_eq!(unread(&service), Vec::<String>::new());
        let empty = [("FLANNELD_IPMASQ".into(), "".into())];
        assert_eq!(unread_variables(&command, empty), Vec::<String>::new());
    }
}
