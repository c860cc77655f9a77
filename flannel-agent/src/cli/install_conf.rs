//! `install-conf`: copies one file so that nobody ever reads half of it, as flannel's program of that name does for the
//! configuration of CNI.
//!
//! The name in `argv[0]` is enough: in the image `/opt/bin/install-conf` is this program.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use thiserror::Error;

use super::table;
use crate::telemetry::chain;

/// The name of the command, and of the program.
const NAME: &str = "install-conf";
/// Type and permissions are told in one number; these are the permissions.
const PERMISSIONS: u32 = 0o7777;
/// Names to try before giving up: leftovers of runs that were killed take some.
const ATTEMPTS: u32 = 100;

/// How the program was called, and with what.
pub(super) struct Asked<'a> {
    program: String,
    paths: &'a [OsString],
}

/// What to install, if that is what is wanted; not if it is the command's help page.
pub(super) fn asked_for(arguments: &[OsString]) -> Option<Asked<'_>> {
    let (program, rest) = arguments.split_first()?;
    if Path::new(program)
        .file_name()
        .is_some_and(|name| name == NAME)
    {
        return Some(Asked {
            program: program.display().to_string(),
            paths: rest,
        });
    }
    let (name, paths) = rest.split_first()?;
    let help = paths.iter().any(|path| path == "--help" || path == "-h");
    (name == NAME && !help).then(|| Asked {
        program: format!("{} {NAME}", program.display()),
        paths,
    })
}

/// Runs the command (upstream: the same two texts and exit codes).
pub(super) fn main(asked: &Asked<'_>) -> ExitCode {
    let [source, destination] = asked.paths else {
        table::plain_complaint(&format!("usage: {} <src> <dest>", asked.program));
        return ExitCode::FAILURE;
    };
    run(Path::new(source), Path::new(destination))
}

/// Installs, and says why if it cannot.
pub(super) fn run(source: &Path, destination: &Path) -> ExitCode {
    match install(source, destination) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let source = source.display().to_string();
            table::plain_complaint(&format!("error installing {source:?}: {}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Why a file was not installed. The destination is as it was.
#[derive(Debug, Error)]
enum InstallError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} names no file: name one in a directory that exists", path.display())]
    NoName { path: PathBuf },
    #[error("create a file in {}: mount or create it, writable for this user", dir.display())]
    Create { dir: PathBuf, source: io::Error },
    #[error("write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("rename {} to {}", from.display(), to.display())]
    Rename {
        from: PathBuf,
        to: PathBuf,
        source: io::Error,
    },
}

/// Writes beside the destination, syncs, renames. The permissions are the source's, whatever the umask.
fn install(source: &Path, destination: &Path) -> Result<(), InstallError> {
    let reading = |error| InstallError::Read {
        path: source.to_owned(),
        source: error,
    };
    let mut from = File::open(source).map_err(reading)?;
    let meta = from.metadata().map_err(reading)?;
    if meta.is_dir() {
        return Err(reading(io::ErrorKind::IsADirectory.into()));
    }
    let permissions = Permissions::from_mode(meta.permissions().mode() & PERMISSIONS);
    let (temporary, mut to) = beside(destination)?;
    let installed = io::copy(&mut from, &mut to)
        .and_then(|_length| to.set_permissions(permissions))
        .and_then(|()| to.sync_all())
        .map_err(|error| InstallError::Write {
            path: temporary.clone(),
            source: error,
        })
        .and_then(|()| {
            fs::rename(&temporary, destination).map_err(|error| InstallError::Rename {
                from: temporary.clone(),
                to: destination.to_owned(),
                source: error,
            })
        });
    if installed.is_err() {
        // The first error is the one worth telling.
        let _gone = fs::remove_file(&temporary);
    }
    installed
}

/// A new file `.<name>.tmp<number>` in the destination's directory. Process ids do not tell runs apart: in a container all have the
/// same one.
fn beside(destination: &Path) -> Result<(PathBuf, File), InstallError> {
    let name = destination
        .file_name()
        .ok_or_else(|| InstallError::NoName {
            path: destination.to_owned(),
        })?;
    let dir = match destination.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
    for attempt in 0..ATTEMPTS {
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".tmp{}", now.subsec_nanos().wrapping_add(attempt)));
        let path = dir.join(hidden);
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
        {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
            Err(error) => {
                last = error;
                break;
            }
        }
    }
    Err(InstallError::Create {
        dir: dir.to_owned(),
        source: last,
    })
}
