//! Running other programs: found where administrators keep them, with an end to waiting.

use std::{
    env,
    path::PathBuf,
    process::{ExitStatus, Output, Stdio},
    time::Duration,
};

use thiserror::Error;
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

use crate::telemetry::one_line;

/// Why a program gave no answer.
#[derive(Debug, Error)]
pub(crate) enum ProgramError {
    /// It is not installed.
    #[error("install {0}")]
    Missing(String),
    /// It could not be started, or talked to.
    #[error("run {program}: {source}")]
    Run {
        program: String,
        source: std::io::Error,
    },
    /// It did not end.
    #[error("{program} took more than {patience:?}")]
    Slow { program: String, patience: Duration },
    /// It said no.
    #[error("{program} ended with {status}: {said}")]
    Failed {
        program: String,
        status: ExitStatus,
        said: String,
    },
}

/// Runs a program with this standard input and gives its standard output.
pub(crate) async fn run(
    program: &str,
    arguments: &[&str],
    input: &str,
    patience: Duration,
) -> Result<String, ProgramError> {
    let path = find(program).ok_or_else(|| ProgramError::Missing(program.to_owned()))?;
    let failed = |source| ProgramError::Run {
        program: program.to_owned(),
        source,
    };
    let work = async {
        let mut command = Command::new(path);
        command
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(if input.is_empty() {
                Stdio::null()
            } else {
                Stdio::piped()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn()?;
        let mut stdin = child.stdin.take();
        let feed = async {
            if let Some(stdin) = &mut stdin {
                // A program that ends without reading says why by itself.
                let _unread = stdin.write_all(input.as_bytes()).await;
            }
            drop(stdin.take());
        };
        let ((), output) = tokio::join!(feed, child.wait_with_output());
        output
    };
    let Output {
        status,
        stdout,
        stderr,
    } = timeout(patience, work)
        .await
        .map_err(|_elapsed| ProgramError::Slow {
            program: program.to_owned(),
            patience,
        })?
        .map_err(failed)?;
    if !status.success() {
        let said = String::from_utf8_lossy(&stderr);
        let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
        // What nft puts on a line of its own is the input again, with marks under it.
        let first = lines.next().unwrap_or("without a word");
        let said = match lines.next() {
            Some(second) if first.ends_with(':') => format!("{first} {second}"),
            _ => first.to_owned(),
        };
        return Err(ProgramError::Failed {
            program: program.to_owned(),
            status,
            said: one_line(&said),
        });
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Looks where administrators' programs are, too: a service's PATH may lack them.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(administrators)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}
