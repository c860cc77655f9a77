//! Running the delegate (upstream: libcni's `pkg/invoke`).

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::{
    call::{Call, Verb},
    delegate::Delegate,
    error::CniError,
    json,
    netconf::Attachment,
    version,
};

/// How often a plugin is tried that somebody is writing at the moment, and how long apart.
const BUSY: (u32, Duration) = (5, Duration::from_secs(1));

/// Runs a delegate for the container of the call, and gives what it printed.
pub(crate) fn run(call: &Call, verb: Verb, delegate: &Delegate) -> Result<String, CniError> {
    exec(call, verb, delegate, |_| {})
}

/// Runs a delegate's DEL for a container other than that of the call, whose namespace is gone.
pub(crate) fn delete(
    call: &Call,
    delegate: &Delegate,
    attachment: &Attachment,
) -> Result<(), CniError> {
    exec(call, Verb::Del, delegate, |command| {
        command
            .env("CNI_CONTAINERID", &attachment.container)
            .env("CNI_IFNAME", &attachment.ifname)
            .env("CNI_NETNS", "");
    })
    .map(drop)
}

/// The versions of the specification that a delegate knows.
pub(crate) fn versions(call: &Call, delegate: &Delegate) -> Result<Vec<String>, CniError> {
    let answer = exec(call, Verb::Version, delegate, |_| {})?;
    Ok(version::in_answer(&answer))
}

fn exec(
    call: &Call,
    verb: Verb,
    delegate: &Delegate,
    adapt: impl Fn(&mut Command),
) -> Result<String, CniError> {
    let program = find(&delegate.kind, &call.path)?;
    let conf = json::compact(&delegate.conf);
    let mut tries = 1;
    let (status, stdout, stderr) = loop {
        let mut command = Command::new(&program);
        command.env("CNI_COMMAND", verb.as_str());
        adapt(&mut command);
        match talk(&mut command, &conf) {
            Ok(done) => break done,
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY.0 => {
                tries += 1;
                thread::sleep(BUSY.1);
            }
            Err(error) => {
                return Err(CniError::internal(format!(
                    "run {}: {error}",
                    program.display()
                )));
            }
        }
    };
    // Runtimes look for it there.
    let _closed = io::stderr().write_all(&stderr);
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    if status.success() {
        return Ok(stdout);
    }
    if stdout.trim().is_empty() {
        let said = String::from_utf8_lossy(&stderr);
        return Err(CniError::internal(if said.trim().is_empty() {
            format!("netplugin failed with no error message: {status}")
        } else {
            format!("netplugin failed: {said:?}")
        }));
    }
    Err(match serde_json::from_str::<CniError>(&stdout) {
        // With its own code and words.
        Ok(error) => error,
        Err(error) => CniError::internal(format!(
            "netplugin failed but error parsing its diagnostic message {stdout:?}: {error}"
        )),
    })
}

fn talk(
    command: &mut Command,
    input: &str,
) -> io::Result<(std::process::ExitStatus, Vec<u8>, Vec<u8>)> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take();
    let output = thread::scope(|scope| {
        scope.spawn(|| {
            // A plugin that does not read it to the end may still answer.
            stdin.map(|mut stdin| stdin.write_all(input.as_bytes()))
        });
        child.wait_with_output()
    })?;
    Ok((output.status, output.stdout, output.stderr))
}

fn find(name: &str, path: &[PathBuf]) -> Result<PathBuf, CniError> {
    if name.is_empty() {
        return Err(CniError::internal("no plugin name provided"));
    }
    if name.contains('/') || name == "." || name == ".." {
        return Err(CniError::internal(format!("invalid plugin name: {name}")));
    }
    let file = |dir: &PathBuf| Some(dir.join(name)).filter(|file| Path::is_file(file));
    path.iter().find_map(file).ok_or_else(|| {
        let dirs: Vec<String> = path.iter().map(|dir| dir.display().to_string()).collect();
        CniError::internal(format!(
            "failed to find plugin {name:?} in path [{}]",
            dirs.join(" ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_a_file_in_the_path() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let path: Vec<PathBuf> = dirs.iter().map(|dir| dir.path().to_owned()).collect();
        std::fs::write(path[1].join("bridge"), "").unwrap();
        std::fs::create_dir(path[0].join("bridge")).unwrap();
        assert_eq!(find("bridge", &path), Ok(path[1].join("bridge")));
        let missing = find("ptp", &path).unwrap_err().msg;
        assert_eq!(
            missing,
            format!(
                "failed to find plugin \"ptp\" in path [{} {}]",
                path[0].display(),
                path[1].display()
            )
        );
        for name in ["", "../bridge", "/bin/sh", ".."] {
            assert!(find(name, &path).is_err(), "{name}");
        }
    }
}
